"""Perplexity and KL divergence as vLLM serves a model: the windows of :mod:`flute_vllm.evaluate`.

The transformers way judges the format, this one judges what users get: kernels, fused layers and
16-bit activations included. vLLM hands out the best tokens of each position; the KL divergence is
taken over those that both models name, with all others as one. Lumping can only lower it, so the
figure is a lower bound, and exact when the whole vocabulary is asked for.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flute_vllm.checkpoint import read_json
from flute_vllm.errors import FluteError
from flute_vllm.evaluate import DEFAULT_WINDOW, PerplexityResult, Window, cut_windows

DEFAULT_TOP = 256  # tokens a position; 1024 positions of them are some 50 MB of Python objects
WHOLE_VOCABULARY = 0
_WINDOWS_AT_ONCE = 8  # bounds those objects
_LEAST = 1e-12  # probability of "all others", where rounding leaves none
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")  # in config.json


@dataclass(frozen=True)
class Position:
    """One scored token: its log-probability, and ``ids`` int64 with their ``logprobs`` float64."""

    target: float
    ids: np.ndarray
    logprobs: np.ndarray

    @property
    def first(self) -> int:
        return int(self.ids[self.logprobs.argmax()])


def perplexity_vllm(
    folder: str | Path,
    texts: Iterable[str],
    window: int = DEFAULT_WINDOW,
    stride: int | None = None,
    dtype: str = "auto",
    reference: str | Path | None = None,
    top: int = DEFAULT_TOP,
) -> PerplexityResult:
    """Perplexity of a folder that vLLM can serve; with a reference, how far it is from that.

    Args:
        folder: dense or quantized, with its tokenizer.
        texts, window, stride: as :func:`flute_vllm.evaluate.perplexity`; the window is cut to one
            token less than the models' length, as vLLM generates one after it.
        dtype: of vLLM's activations.
        reference: folder of the original model, served first, with the same tokenizer.
        top: tokens of each position that are compared; 0: the whole vocabulary.

    Raises:
        FluteError: vLLM is not installed, nothing to score, a log-probability that is not finite.
    """
    if reference is None:
        top = 1  # of no use then
    window = _fitting(window, [folder, *([] if reference is None else [reference])])
    with _engine(folder if reference is None else reference, window, dtype, top) as llm:
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
        first = list(_positions(llm, windows, top))
    told, kl, same = "", None, None
    found = first
    if reference is not None:
        with _engine(folder, window, dtype, top) as llm:
            found = list(_positions(llm, windows, top))
        pairs = list(zip(first, found, strict=True))
        kl = math.fsum(divergence(dense, model) for dense, model in pairs) / len(pairs)
        same = sum(dense.first == model.first for dense, model in pairs) / len(pairs)
        told = ", KL over the whole vocabulary" if top == WHOLE_VOCABULARY else (
            f", KL over the tokens that are among the best {top} of both models, all others as "
            "one: a lower bound"
        )  # fmt: skip
    nll = -math.fsum(position.target for position in found) / len(found)
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
        f"{dtype}, mean over {len(found)} tokens{told}"
    )
    return PerplexityResult(nll, len(found), math.exp(min(nll, 700.0)), protocol, kl, same)


def divergence(reference: Position, model: Position) -> float:
    """KL(reference || model) in nats over the tokens that both name, all others as one."""
    _, here, there = np.intersect1d(
        reference.ids, model.ids, assume_unique=True, return_indices=True
    )
    log_p, log_q = reference.logprobs[here], model.logprobs[there]
    rest_p = max(1 - np.exp(log_p).sum(), _LEAST)
    rest_q = max(1 - np.exp(log_q).sum(), _LEAST)
    named = float((np.exp(log_p) * (log_p - log_q)).sum())
    return named + rest_p * math.log(rest_p / rest_q)


def _fitting(window: int, folders: Iterable[str | Path]) -> int:
    """The window, or what the shortest of the models can read and have room for another token."""
    lengths = []
    for folder in folders:
        config = read_json(Path(folder) / "config.json")
        text = config.get("text_config", config)
        lengths += [text[key] for key in _LENGTHS if isinstance(text.get(key), int)]
    return min([window, *(length - 1 for length in lengths)])


@contextlib.contextmanager
def _engine(folder: str | Path, window: int, dtype: str, top: int) -> Iterator[Any]:
    """A vLLM engine that is gone afterwards: two of them do not fit on one GPU."""
    try:
        from vllm import LLM
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    except ImportError as error:
        raise FluteError(
            "cannot evaluate through vLLM", where="--engine vllm",
            why=f"vLLM cannot be imported: {error}",
            fix="install vLLM, or use --engine transformers",
        ) from error  # fmt: skip
    llm = LLM(
        str(folder), dtype=dtype, max_model_len=window + 1, enforce_eager=True,
        enable_prefix_caching=False, max_logprobs=top if top != WHOLE_VOCABULARY else -1,
    )  # fmt: skip
    try:
        yield llm
    finally:
        with contextlib.suppress(AttributeError):
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def _positions(llm: Any, windows: list[Window], top: int) -> Iterator[Position]:
    """The scored tokens of all windows in order."""
    from vllm import SamplingParams

    # One token is generated, because vLLM wants at least one; it is not looked at.
    sampling = SamplingParams(
        temperature=0, max_tokens=1, detokenize=False,
        prompt_logprobs=top if top != WHOLE_VOCABULARY else -1,
    )  # fmt: skip
    for begin in range(0, len(windows), _WINDOWS_AT_ONCE):
        part = windows[begin : begin + _WINDOWS_AT_ONCE]
        prompts = [{"prompt_token_ids": piece.tokens} for piece in part]
        requests = llm.generate(prompts, sampling, use_tqdm=False)
        for piece, request in zip(part, requests, strict=True):
            steps = list(zip(piece.tokens, request.prompt_logprobs, strict=True))
            for token, entry in steps[-piece.scored :]:
                yield Position(
                    entry[token].logprob,
                    np.fromiter(entry, np.int64, len(entry)),
                    np.fromiter((e.logprob for e in entry.values()), np.float64, len(entry)),
                )
