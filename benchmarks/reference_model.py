"""Trains the reference model of the quality table: 25.7 M parameters, as the bundled one.

    python benchmarks/reference_model.py build/reference        # a GPU, under 6 minutes

The recipe is that of ``examples/stdlib_model/train.py`` with more of everything; the weights are
not committed. The held-out files of ``examples/stdlib_model/heldout.json`` are never trained on.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "stdlib_model")]

import train  # noqa: E402

GEOMETRY = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
SECONDS = 210  # of training; compilation, tokens and the report come on top


def main(folder: Path, *options: str) -> None:
    """Writes ``folder/model`` and ``folder/metrics.json``; options go to train.py."""
    train.GEOMETRY.update(GEOMETRY)
    defaults = ["--epochs", "16", "--seconds", str(SECONDS), "--learning-rate", "0.015"]
    layers = ["--layers", str(GEOMETRY["num_hidden_layers"])]
    sys.argv = ["train.py", "--out", str(folder), *layers, *defaults, *options]
    folder.mkdir(parents=True, exist_ok=True)
    train.main()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
