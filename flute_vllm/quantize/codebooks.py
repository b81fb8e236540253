"""Tables of values: those shipped in ``configs/codebooks`` (NormalFloat, integer, FP) and files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import NormalDist

import torch

from flute_vllm.checkpoint import read_json
from flute_vllm.errors import FluteError
from flute_vllm.format import BITS, TABLE_KINDS
from flute_vllm.resources import data_path

TABLE_NAMES = ("nf", "int", "fp")  # kinds in configs/codebooks, one file for each width


@dataclass(frozen=True)
class Codebook:
    """A named table. ``values`` is float32 [2**bits], or [2**(2 * bits), 2] for pairs.

    A table that the user chose ``is_fixed``: no recipe replaces it by a learned one.
    """

    name: str
    bits: int
    table_kind: str
    values: torch.Tensor
    is_fixed: bool = False


def normal_float(bits: int) -> Codebook:
    """The NormalFloat table of 2, 3 or 4 bits, from its JSON file."""
    return named_codebook("nf", bits)


def named_codebook(name: str, bits: int) -> Codebook:
    """The shipped table of a kind ("nf", "int", "fp") at a width. Raises FluteError."""
    found = [width for width in BITS if _shipped(name, width)]
    if bits not in found:
        raise FluteError(
            f"no {name} table of {bits} bits",
            where=f"--table {name}",
            why=f"there are {name} tables of {', '.join(map(str, found)) or 'no'} bits",
            fix="choose other --bits or another --table",
        )
    return read_codebook(data_path("configs", "codebooks", f"{name}{bits}.json"))


def _shipped(name: str, bits: int) -> bool:
    return (data_path("configs", "codebooks") / f"{name}{bits}.json").exists()


@cache
def gaussian_lloyd(bits: int) -> torch.Tensor:
    """float32 [2**bits]: the Lloyd-Max quantizer of the standard normal distribution.

    Ascending, largest magnitude 1. Each value is the mean of its cell, ``(phi(a) - phi(b)) /
    (Phi(b) - Phi(a))`` for a cell (a, b); iterated until it stands still (Max 1960).
    """
    count = 2**bits
    values = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    for _ in range(500):
        inner = (values[1:] + values[:-1]) / 2
        ends = torch.tensor([math.inf], dtype=torch.float64)
        edges = torch.cat([-ends, inner, ends])
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        mass = torch.special.ndtr(edges).diff()
        values = -density.diff() / mass
    return (values / values.abs().max()).float()


def load_codebook(name: str) -> torch.Tensor:
    """Values of a shipped table by its name, such as "nf4": float32, ascending."""
    return read_codebook(data_path("configs", "codebooks", f"{name}.json")).values


def normal_float_construction(bits: int) -> list[float]:
    """NormalFloat values in double precision, ascending, largest magnitude 1.

    QLoRA (arXiv 2305.14314) section 3, with the offset that its NF4 table uses at every width:
    quantiles of the standard normal distribution, equally spaced in probability on each side of
    zero, one more level on the positive side, cut at the tail probability delta.
    """
    quantile = NormalDist().inv_cdf
    tail = 0.5 * (1 / 32 + 1 / 30)
    half = 2 ** (bits - 1)
    span = 0.5 - tail
    negatives = [-quantile(1 - tail - span * i / (half - 1)) for i in range(half)]
    positives = [quantile(0.5 + span * i / half) for i in range(1, half + 1)]
    values = negatives + positives
    largest = max(map(abs, values))
    return [value / largest for value in values]


def read_codebook(path: str | Path) -> Codebook:
    """Reads ``{"bits": b, "table_kind": "scalar" | "pair", "values": [...]}``.

    Other keys (name, provenance) are free. A pair table lists [first, second] for each index
    ``code[2i] * 2**bits + code[2i + 1]``. Values may be in any order and of any magnitude, as
    the scale absorbs it. Raises FluteError for a wrong shape or a value that is not finite.
    """
    path = Path(path)
    document = read_json(path)
    bits, kind = document.get("bits"), document.get("table_kind", "scalar")
    if isinstance(bits, bool) or bits not in BITS:
        raise _bad(path, f"bits is {bits!r}, not one of {', '.join(map(str, BITS))}")
    if kind not in TABLE_KINDS:
        raise _bad(path, f"table_kind is {kind!r}, not one of {', '.join(TABLE_KINDS)}")
    try:
        values = torch.tensor(document.get("values"), dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _bad(path, f"values is not a rectangular list of numbers: {error}") from error
    shape = (2**bits,) if kind == "scalar" else (2 ** (2 * bits), 2)
    if tuple(values.shape) != shape:
        raise _bad(path, f"values has shape {list(values.shape)}, {bits} bits need {list(shape)}")
    if not bool(values.isfinite().all()):
        raise _bad(path, "values holds NaN or infinity")
    largest = float(values.abs().max())
    if not math.isfinite(1 / largest if largest else math.inf):
        raise _bad(path, f"the largest magnitude is {largest}, so it can represent nothing")
    return Codebook(str(document.get("name", path.stem)), bits, kind, values)


def _bad(path: Path, why: str) -> FluteError:
    return FluteError(
        "unusable table file",
        where=str(path),
        why=why,
        fix='write {"bits": 4, "table_kind": "scalar", "values": [16 numbers]}, as in '
        "configs/codebooks/nf4.json",
    )
