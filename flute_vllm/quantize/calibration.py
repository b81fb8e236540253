"""Calibration text: where it comes from, and the windows of tokens that are cut from it.

The bundled text is half prose (the language reference of Python), half source code, and neither
WikiText nor C4, on which results are reported.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flute_vllm.checkpoint import Checkpoint
from flute_vllm.errors import FluteError
from flute_vllm.quantize.recipes import Calibration
from flute_vllm.resources import data_path

BUNDLED, NONE, HUB = "bundled", "none", "hf:"
RANDOM = "random tokens"
_FEWEST = 2  # windows: one to learn from, one to judge with


@dataclass(frozen=True)
class Windows:
    """Token ids int64 [samples, length]; the last ``heldout`` windows only judge.

    ``prior`` as in :class:`flute_vllm.quantize.recipes.Calibration`.
    """

    ids: torch.Tensor
    heldout: int
    origin: dict[str, Any]
    prior: float = 0.0


def draw(checkpoint: Checkpoint, wanted: Calibration, longest: int | None, seed: int) -> Windows:
    """Windows of tokens drawn evenly from the vocabulary: no text and no tokenizer is needed.

    None is held out: random tokens cannot tell what holds for text, so no gate trusts them.
    """
    text = checkpoint.config.get("text_config", checkpoint.config)
    generator = torch.Generator().manual_seed(seed)
    size = (wanted.samples, min(wanted.length, longest or wanted.length))
    ids = torch.randint(text["vocab_size"], size, generator=generator)
    origin = {"name": RANDOM, "samples": size[0], "length": size[1], "heldout": 0}
    return Windows(ids, 0, origin, wanted.prior)


def calibration_text(calib: str) -> str:
    """The text that ``--calib`` names. Raises FluteError for a file or data set without text."""
    if calib.startswith(HUB):
        return _hub_text(calib.removeprefix(HUB))
    path = data_path("configs", "calibration", "python.txt") if calib == BUNDLED else Path(calib)
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FluteError(
            "cannot read the calibration text", where=f"--calib {calib}",
            why=f"{type(error).__name__}: {error}",
            fix="pass a readable UTF-8 file, hf:DATASET, bundled or none",
        ) from error  # fmt: skip
    if not text.strip():
        raise FluteError(
            "the calibration text is empty", where=f"--calib {calib}",
            why=f"it has {len(text)} characters, none of them visible",
            fix="pass a file with text in it",
        )  # fmt: skip
    return text


def _hub_text(name: str, characters: int = 4_000_000) -> str:
    """The first characters of column ``text`` of a hub data set, streamed; ``NAME[:CONFIG]``."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise FluteError(
            "cannot read a hub data set", where=f"--calib hf:{name}",
            why="the package datasets is not installed", fix="pip install datasets",
        ) from error  # fmt: skip
    path, _, config = name.partition(":")
    try:
        rows = load_dataset(path, config or None, split="train", streaming=True)
        parts, size = [], 0
        for row in rows:
            parts.append(row["text"])
            size += len(row["text"])
            if size >= characters:
                break
    except Exception as error:  # datasets raises many kinds
        raise FluteError(
            "cannot read a hub data set", where=f"--calib hf:{name}",
            why=f"{type(error).__name__}: {error}",
            fix="name a data set with a train split and a column 'text': hf:NAME or hf:NAME:CONFIG",
        ) from error  # fmt: skip
    return "\n\n".join(parts)


def cut(
    checkpoint: Checkpoint, calib: str, wanted: Calibration, longest: int | None, seed: int
) -> Windows:
    """Windows of the calibration text, each begun with the tokenizer's begin token if it has one.

    They do not overlap. ``seed`` moves their starts and mixes their order, so that the held-out
    ones, the last, come from all parts of the text. Where the text is too short there are fewer
    windows, and a text shorter than two windows gets shorter ones.

    Args:
        checkpoint: its folder holds the tokenizer.
        calib: as :func:`calibration_text`.
        wanted: windows, tokens in each, share held out.
        longest: of the model, or None.
        seed: any integer.

    Raises:
        FluteError: no text, no tokenizer, less than two tokens a window.
    """
    from transformers import AutoTokenizer

    text = calibration_text(calib)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(checkpoint.folder))
    except (OSError, ValueError, KeyError) as error:
        raise FluteError(
            "cannot calibrate without a tokenizer", where=str(checkpoint.folder),
            why=f"{type(error).__name__}: {error}",
            fix="copy the tokenizer files into the folder, or use --calib none or --recipe fast",
        ) from error  # fmt: skip
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    length = min(wanted.length, longest or wanted.length)
    body = min(length - len(begin), len(ids) // _FEWEST)
    if body < 1:
        raise FluteError(
            "the calibration text is too short", where=f"--calib {calib}",
            why=f"{len(text)} characters make {len(ids)} tokens", fix="pass a longer text",
        )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    spare = len(ids) % body
    first = int(torch.randint(spare + 1, (), generator=generator))
    count = len(ids) // body
    windows = ids[first : first + count * body].view(count, body)
    chosen = windows[torch.randperm(count, generator=generator)[: wanted.samples]]
    chosen = torch.cat([torch.tensor(begin).long().expand(len(chosen), -1), chosen], 1)
    heldout = max(1, round(wanted.heldout_share * len(chosen)))
    origin = {
        "name": calib,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "samples": len(chosen),
        "length": chosen.shape[1],
        "heldout": heldout,
    }
    return Windows(chosen, heldout, origin)
