"""Perplexity with one fixed, printed protocol, through transformers.

Numbers of different tools differ by window, by what a window starts with and by the precision of
the logarithms, so the protocol is part of the result. Quantized folders are evaluated through
their dense twin: the same weights written out, so the number belongs to the format and holds for
every kernel that computes it correctly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from flute_vllm.errors import FluteError

DEFAULT_WINDOW = 1024
LOGIT_ROWS = 512  # rows turned to float32 at once: 0.25 GB at a vocabulary of 128k


@dataclass(frozen=True)
class PerplexityResult:
    """What an evaluation measured.

    Attributes:
        nll: mean negative log-likelihood for each scored token, in nats.
        tokens: number of scored tokens.
        ppl: ``exp(nll)``.
        protocol: how it was measured, one line.
        kl: mean KL(reference || model) in nats for each scored token; None without a reference.
        top1_agreement: share of scored tokens where both models rank the same token first.
    """

    nll: float
    tokens: int
    ppl: float
    protocol: str
    kl: float | None = None
    top1_agreement: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Window:
    """One forward pass: ``tokens`` go in, the last ``scored`` of them are predicted."""

    tokens: list[int]
    scored: int


def cut_windows(
    ids: Sequence[int], window: int, stride: int | None = None, bos: int | None = None
) -> Iterator[Window]:
    """Cuts the tokens of one text so that each is scored once.

    Args:
        ids: the text's tokens without special tokens.
        window: tokens of one forward pass, begin token included.
        stride: distance between the starts of windows; ``window - 1`` when None, so that they
            share nothing. A smaller one repeats tokens as unscored context of the next window.
        bos: put in front of every window. Without one, the token before the window takes its
            place, and the first token of the text is not scored.
    """
    body = window - 1
    stride = body if stride is None else stride
    if window < 2 or not 1 <= stride <= body:
        raise FluteError(
            "invalid evaluation window",
            where=f"window={window}, stride={stride}",
            why="window must be at least 2 and stride between 1 and window - 1",
            fix=f"leave the stride out, or use for example window={DEFAULT_WINDOW}",
        )
    first = 0 if bos is not None else 1
    done = begin = first
    while done < len(ids):
        end = min(len(ids), begin + body)
        prefix = bos if bos is not None else ids[begin - 1]
        yield Window([prefix, *ids[begin:end]], end - done)
        done, begin = end, begin + stride


@torch.inference_mode()
def perplexity(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str],
    window: int = DEFAULT_WINDOW,
    stride: int | None = None,
    batch_size: int = 1,
    reference: Any = None,
) -> PerplexityResult:
    """Perplexity of a causal language model over texts.

    Args:
        model: maps ``input_ids`` int64 [B, T] to an object with ``logits`` [B, T, vocabulary].
        tokenizer: Hugging Face tokenizer; called without special tokens.
        texts: each is scored on its own; the mean runs over the tokens of all of them.
        window: tokens of one forward pass, begin token included; cut to the model's length.
        stride: see :func:`cut_windows`.
        batch_size: windows of equal length in one forward pass. Changes speed, not the result.
        reference: a second model with the same vocabulary; adds KL divergence and agreement.

    Raises:
        FluteError: no text, an empty text, a window out of range or NaN logits.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    window = min(window, limit) if limit else window
    bos = tokenizer.bos_token_id
    windows: list[Window] = []
    for number, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        pieces = list(cut_windows(ids, window, stride, bos))
        if not pieces:
            raise FluteError(
                "cannot score an empty text", where=f"text {number}",
                why=f"{len(text)} characters make {len(ids)} tokens; nothing can be predicted",
                fix="remove the text, or check the file it comes from",
            )  # fmt: skip
        windows += pieces
    if not windows:
        raise FluteError(
            "no text to evaluate", where="texts", why="the list is empty",
            fix="pass at least one text file",
        )  # fmt: skip
    total = torch.zeros(3, dtype=torch.float64)  # negative log-likelihood, KL, same first choice
    for batch in _batches(windows, batch_size):
        total += _score(model, reference, batch)
    tokens = sum(piece.scored for piece in windows)
    nll, kl, same = (total / tokens).tolist()
    if not math.isfinite(nll):
        raise FluteError(
            "the model's output is not a number", where=type(model).__name__,
            why=f"the mean negative log-likelihood is {nll}",
            fix="evaluate in float32; if that is NaN too, the weights are damaged",
        )  # fmt: skip
    start = "bos" if bos is not None else "the token before it"
    protocol = (
        f"window {window} tokens, each starting with {start}, "
        f"stride {window - 1 if stride is None else stride}, texts separate, "
        f"weights {_dtype_name(model)}, NLL float32, mean over {tokens} tokens"
    )
    extras = (kl, same) if reference is not None else (None, None)
    return PerplexityResult(nll, tokens, math.exp(min(nll, 700.0)), protocol, *extras)


def _batches(windows: list[Window], size: int) -> Iterator[list[Window]]:
    """Groups of equally long windows: padding could change what a kernel computes."""
    ordered = sorted(windows, key=lambda piece: len(piece.tokens))
    group: list[Window] = []
    for piece in ordered:
        if group and (len(group) == size or len(group[0].tokens) != len(piece.tokens)):
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def _score(model: Any, reference: Any, batch: list[Window]) -> torch.Tensor:
    """Sums over the scored tokens of a batch: [3] of NLL, KL and agreement, float64 on the CPU."""
    device = next(model.parameters()).device
    ids = torch.tensor([piece.tokens for piece in batch], device=device)
    scored = torch.tensor([piece.scored for piece in batch], device=device)
    length = ids.shape[1] - 1
    mask = torch.arange(length, device=device) >= length - scored[:, None]
    targets = ids[:, 1:][mask]
    logits = model(input_ids=ids).logits[:, :-1][mask]
    other = None
    if reference is not None:
        home = next(reference.parameters()).device
        other = reference(input_ids=ids.to(home)).logits[:, :-1].to(device)[mask]
        if other.shape[-1] != logits.shape[-1]:
            raise FluteError(
                "cannot compare the models", where="reference",
                why=f"vocabularies of {logits.shape[-1]} and {other.shape[-1]} tokens",
                fix="pass the model that the quantized one was made from",
            )  # fmt: skip
    sums = torch.zeros(3, dtype=torch.float64)
    for rows in range(0, targets.numel(), LOGIT_ROWS):
        part = slice(rows, rows + LOGIT_ROWS)
        log_p = logits[part].float().log_softmax(-1)
        sums[0] -= log_p.gather(1, targets[part, None]).double().sum().cpu()
        if other is not None:
            log_q = other[part].float().log_softmax(-1)
            sums[1] += (log_q.exp() * (log_q - log_p)).sum(-1).double().sum().cpu()
            sums[2] += (log_p.argmax(-1) == log_q.argmax(-1)).sum().cpu()
    return sums


def _dtype_name(model: Any) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def read_texts(paths: Iterable[str | Path]) -> list[str]:
    """Texts of UTF-8 files. Raises FluteError for a missing, unreadable or empty one."""
    texts = []
    for path in map(Path, paths):
        try:
            text = path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FluteError(
                "cannot read the text", where=str(path),
                why=f"{type(error).__name__}: {error}", fix="pass a readable UTF-8 text file",
            ) from error  # fmt: skip
        if not text.strip():
            raise FluteError(
                "cannot score an empty text", where=str(path),
                why=f"the file has {len(text)} characters, none of them visible",
                fix="pass a file with text in it",
            )  # fmt: skip
        texts.append(text)
    if not texts:
        raise FluteError(
            "no text to evaluate", where="texts", why="the list of files is empty",
            fix="pass at least one text file",
        )  # fmt: skip
    return texts


def load_model(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Any, Any]:
    """Model and tokenizer of a dense or quantized folder, for transformers.

    Args:
        folder: holds config.json, safetensors files and the tokenizer. For a native or foreign
            quantized checkpoint the dense twin is built in memory, each weight rounded once to
            the dtype of its scales, as the kernels compute it, and then converted to ``dtype``.
        dtype: of all weights.
        device: torch device of the model.

    Raises:
        FluteError: the folder is damaged, or its tensors are not those of the architecture.
    """
    from transformers import AutoTokenizer

    from flute_vllm import importers
    from flute_vllm.checkpoint import Checkpoint

    checkpoint = Checkpoint(folder)
    is_quantized = checkpoint.config.get("quantization_config") or importers.find(checkpoint)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise FluteError(
            "cannot load the tokenizer", where=str(folder), why=f"{type(error).__name__}: {error}",
            fix="copy the tokenizer files of the original model into the folder",
        ) from error  # fmt: skip
    model = load_twin(folder, dtype) if is_quantized else load_dense(folder, dtype)
    return model.eval().to(device), tokenizer


def load_dense(folder: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """The transformers model of a folder that is not quantized; see :func:`load_model`."""
    from transformers import AutoConfig

    from flute_vllm.quantize.names import model_class

    model, report = model_class(AutoConfig.from_pretrained(folder)).from_pretrained(
        str(folder), dtype=dtype, output_loading_info=True
    )
    _check_report(folder, report, type(model).__name__)
    return model


def load_twin(folder: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """The dense twin of a quantized folder as a transformers model; see :func:`load_model`."""
    from transformers import AutoConfig

    from flute_vllm.convert import dense_state_dict
    from flute_vllm.quantize.names import model_class

    stored, tensors = dense_state_dict(folder)
    fields = {key: value for key, value in stored.items() if key != "quantization_config"}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor
             for name, tensor in tensors}  # fmt: skip
    with torch.device("meta"):
        architecture = type(model_class(config).from_config(config))
    # from_pretrained, not load_state_dict: it knows tied weights and renamed checkpoint keys.
    model, report = architecture.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    _check_report(folder, report, architecture.__name__, "unexpected_keys")
    return model


def _check_report(folder: str | Path, report: dict, architecture: str, *more_kinds: str) -> None:
    """Raises FluteError where transformers would go on with random weights."""
    for kind in ("missing_keys", "mismatched_keys", *more_kinds):
        if report.get(kind):
            names = sorted(map(str, report[kind]))
            raise FluteError(
                "the tensors do not fit the architecture", where=f"{folder}: {names[0]}",
                why=f"{len(names)} {kind.replace('_', ' ')} for {architecture}",
                fix="download or quantize the checkpoint again; config.json must be the original's",
            )  # fmt: skip
