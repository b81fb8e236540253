"""The held-out texts of the bundled model, from the standard library of the running Python.

``python heldout.py [FOLDER]`` prints the perplexity of a model folder on each of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1])]

from flute_vllm.errors import FluteError  # noqa: E402
from flute_vllm.evaluate import load_model, perplexity, read_texts  # noqa: E402

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """Texts by path, and the paths whose contents are not those of the training machine."""

    texts: dict[str, str]
    changed: list[str]


def load_heldout(stdlib: str | Path | None = None, paths: Iterable[str] | None = None) -> HeldOut:
    """Reads the held-out files and compares each with the SHA-256 in heldout.json.

    Args:
        stdlib: a ``lib/pythonX.Y`` folder; that of the running Python when None.
        paths: some of the files; all of heldout.json when None.

    Other Python versions have other texts: their perplexity is a sound number, but not one to
    compare with the recorded one. One WARNING says so.

    Raises:
        FluteError: a file is missing, as in Python builds without a source library.
    """
    lib = Path(stdlib or sysconfig.get_paths()["stdlib"])
    record = json.loads((HERE / "heldout.json").read_text(encoding="utf-8"))
    paths = list(record["files"] if paths is None else paths)
    missing = [path for path in paths if not (lib / path).is_file()]
    if missing:
        raise FluteError(
            "held-out text missing", where=str(lib / missing[0]),
            why=f"{len(missing)} of {len(paths)} files are not in this standard library",
            fix=f"pass the lib folder of a Python {record['python']} with its .py files",
        )  # fmt: skip
    texts = dict(zip(paths, read_texts(lib / path for path in paths), strict=True))
    changed = [path for path in paths if _sha256(lib / path) != record["files"][path]]
    if changed:
        logger.warning(
            "%d of %d held-out files differ from those of Python %s (first: %s); "
            "perplexity is not comparable with the recorded one",
            len(changed), len(paths), record["python"], changed[0],
        )  # fmt: skip
    return HeldOut(texts, changed)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def evaluate_heldout(model, tokenizer, texts: dict[str, str], batch_size: int = 4) -> dict:
    """Perplexity of each file and, weighted by tokens, of all: ``{"ppl", "tokens", "files"}``."""
    files, nll, tokens, protocol = {}, 0.0, 0, ""
    for path, text in texts.items():
        result = perplexity(model, tokenizer, [text], batch_size=batch_size)
        files[path] = {"ppl": round(result.ppl, 4), "tokens": result.tokens}
        nll, tokens = nll + result.nll * result.tokens, tokens + result.tokens
        protocol = result.protocol.rsplit(",", 1)[0]
    return {
        "ppl": round(math.exp(nll / tokens), 4), "tokens": tokens, "protocol": protocol,
        "files": files,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=HERE / "model")
    parser.add_argument("--stdlib", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(levelname)s %(message)s")
    heldout = load_heldout(arguments.stdlib)
    model, tokenizer = load_model(
        arguments.folder, getattr(torch, arguments.dtype), arguments.device
    )
    result = evaluate_heldout(model, tokenizer, heldout.texts)
    for path, file in result["files"].items():
        print(f"{path:40} {file['tokens']:7} tokens  perplexity {file['ppl']:.3f}")
    print(f"{'all':40} {result['tokens']:7} tokens  perplexity {result['ppl']:.4f}")
    print(result["protocol"])


if __name__ == "__main__":
    main()
