"""Perplexity as vLLM serves a model: the same windows as :mod:`flute_vllm.evaluate`.

The transformers way judges the format, this one judges what users get: kernels, fused layers and
16-bit activations included. vLLM hands out the probabilities of the best tokens only, so the KL
divergence, which needs all, is left to the other way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from flute_vllm.errors import FluteError
from flute_vllm.evaluate import DEFAULT_WINDOW, PerplexityResult, Window, cut_windows


def perplexity_vllm(
    folder: str | Path,
    texts: Iterable[str],
    window: int = DEFAULT_WINDOW,
    stride: int | None = None,
    dtype: str = "auto",
) -> PerplexityResult:
    """Perplexity of a folder that vLLM can serve.

    Args:
        folder: dense or quantized, with its tokenizer.
        texts, window, stride: as :func:`flute_vllm.evaluate.perplexity`.
        dtype: of vLLM's activations.

    Raises:
        FluteError: vLLM is not installed, nothing to score, a log-probability that is not finite.
    """
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise FluteError(
            "cannot evaluate through vLLM", where="--engine vllm",
            why=f"vLLM cannot be imported: {error}",
            fix="install vLLM, or use --engine transformers",
        ) from error  # fmt: skip
    llm = LLM(
        str(folder), dtype=dtype, max_model_len=window + 1, enforce_eager=True,
        enable_prefix_caching=False,
    )  # fmt: skip
    tokenizer = llm.get_tokenizer()
    bos = tokenizer.bos_token_id
    windows: list[Window] = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        windows += cut_windows(ids, window, stride, bos)
    if not windows:
        raise FluteError(
            "no text to evaluate", where="texts", why="no token can be predicted",
            fix="pass at least one text file with text in it",
        )  # fmt: skip
    # One token is generated, because vLLM wants at least one; it is not looked at.
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    prompts = [{"prompt_token_ids": piece.tokens} for piece in windows]
    requests = llm.generate(prompts, sampling, use_tqdm=False)
    total, tokens = 0.0, 0
    for piece, request in zip(windows, requests, strict=True):
        for token, entry in list(zip(piece.tokens, request.prompt_logprobs, strict=True))[
            -piece.scored :
        ]:
            total -= entry[token].logprob
        tokens += piece.scored
    nll = total / tokens
    if not math.isfinite(nll):
        raise FluteError(
            "the model's output is not a number", where=str(folder),
            why=f"the mean negative log-likelihood is {nll}",
            fix="evaluate with --engine transformers; if that is NaN too, the weights are damaged",
        )  # fmt: skip
    start = "bos" if bos is not None else "the token before it"
    protocol = (
        f"window {window} tokens, each starting with {start}, "
        f"stride {window - 1 if stride is None else stride}, texts separate, vLLM with dtype "
        f"{dtype}, mean over {tokens} tokens"
    )
    return PerplexityResult(nll, tokens, math.exp(min(nll, 700.0)), protocol)
