"""Shrinks upstream-packed test vectors: ``python make_flute_vectors.py SOURCE flute_vectors``.

A source file holds ``weight``, ``scales``, ``tables``, ``tables2`` as upstream FLUTE's packer made
them, and the expected ``indices`` uint8 [N, K] and ``dequant`` [N, K]. The copy keeps the four
inputs and replaces the two big expectations by SHA-256 sums in the file's metadata:
``indices_sha256`` over the uint8 bytes, ``dequant_sha256`` over the values in the scales' dtype.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

KEPT = ("weight", "scales", "tables", "tables2")


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def shrink(source: Path, target: Path) -> None:
    with safe_open(source, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in (*KEPT, "indices", "dequant")}
    metadata["indices_sha256"] = sha256(tensors["indices"])
    metadata["dequant_sha256"] = sha256(tensors["dequant"].to(tensors["scales"].dtype))
    save_file({name: tensors[name] for name in KEPT}, target, metadata=metadata)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:3])
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.safetensors")):
        shrink(path, target / path.name)
