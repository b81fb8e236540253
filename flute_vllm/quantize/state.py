"""What the steps of a recipe work on: a group of matrices, what is known of its input, its codes.

Matrices that vLLM fuses (q, k and v; gate and up) read the same input. They are quantized as one
matrix, their rows stacked, and share one table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from flute_vllm import format
from flute_vllm.format import PER_ROW, LayerSpec, dequantize_codes, pack
from flute_vllm.quantize.scales import Quantizer

# Weights handled at once: bounds temporaries to about 40 MiB, and to 2.5 GiB on a GPU, where
# small blocks would leave it idle.
BLOCK_WEIGHTS = {"cpu": 1 << 20, "cuda": 1 << 26}
ALL_ROWS = slice(None)


@dataclass(frozen=True)
class Statistics:
    """What calibration says of the input x of a matrix; all None without data.

    ``hessian`` and ``heldout`` are float32 [K, K], the means of ``x x^T`` over tokens: steps
    minimise with the first, gates judge with the second, which comes from other texts.
    """

    hessian: torch.Tensor | None = None
    heldout: torch.Tensor | None = None

    @property
    def importance(self) -> torch.Tensor | None:
        """float32 [K]: the mean square of each input feature, 1 on average."""
        if self.hessian is None:
            return None
        diagonal = self.hessian.diagonal().clamp_min(0)
        mean = diagonal.mean()
        # A feature that calibration never saw active must still be stored sensibly.
        return (diagonal / mean).clamp_min(1e-4) if float(mean) > 0 else torch.ones_like(diagonal)


@dataclass(frozen=True)
class State:
    """Codes, scales and table of a matrix between two steps.

    Attributes:
        spec: how it will be stored.
        table: float32 [2**bits] or [2**(2 * bits), 2], each value exact in the scale dtype.
        is_table_fixed: the user chose the table; no step may change it.
        where: name for messages.
        scales: scale dtype [N, K / group_size], None before the first step.
        codes: uint8 [N, K], None before the first step.
    """

    spec: LayerSpec
    table: torch.Tensor
    is_table_fixed: bool
    where: str
    scales: torch.Tensor | None = None
    codes: torch.Tensor | None = None

    def with_changes(self, **changes: object) -> State:
        return replace(self, **changes)

    def group(self, columns: int) -> int:
        """Weights that share a scale."""
        return columns if self.spec.group_size == PER_ROW else self.spec.group_size

    def quantizer(self) -> Quantizer:
        return Quantizer(self.table, self.spec.bits)

    def dense(self, rows: slice = ALL_ROWS) -> torch.Tensor:
        """float32 [rows, K]: the weights that this state means, rounded as the format says."""
        dtype = self.spec.torch_scale_dtype
        table = self.table.to(dtype)
        return dequantize_codes(self.codes[rows], self.scales[rows], table).float()

    def tensors(self, rows: slice) -> dict[str, torch.Tensor]:
        """The three stored tensors of some of the rows; see :mod:`flute_vllm.format`."""
        return {
            "qweight": pack(self.codes[rows], self.spec.bits),
            "scales": self.scales[rows],
            "table": self.table.to(self.spec.torch_scale_dtype),
        }


def row_blocks(weight: torch.Tensor) -> Iterator[slice]:
    """Slices of rows of a matrix [N, K] that hold about ``BLOCK_WEIGHTS`` values each."""
    return format.row_blocks(*weight.shape, BLOCK_WEIGHTS.get(weight.device.type, 1 << 20))


def sum_by_index(values: torch.Tensor, index: torch.Tensor, size: int) -> torch.Tensor:
    """float64 [size]: sums of the values that have each index, in an order that never changes.

    On a GPU index_add_ adds in the order in which threads arrive, and a resumed run must give the
    same bytes; sizes are at most 512, so a pass for each index is cheap there.
    """
    if values.device.type == "cpu":
        sums = torch.zeros(size, dtype=torch.float64)
        return sums.index_add_(0, index, values.double())
    parts = [torch.where(index == place, values, 0.0).sum(dtype=torch.float64)
             for place in range(size)]  # fmt: skip
    return torch.stack(parts)


def relative_error(
    weight: torch.Tensor,
    state: State,
    hessian: torch.Tensor | None = None,
    rows: slice = ALL_ROWS,
    whole: float | None = None,
) -> float:
    """How far the state is off: ``tr(D H D^T) / tr(W H W^T)`` with ``D = W - W'``.

    Without a Hessian H is the identity, so it is the relative squared error of the weights; with
    one it is that of the layer's output, as in GPTQ (arXiv 2210.17323, equation 1).

    Args:
        weight: floating [N, K].
        state: with codes and scales.
        hessian: float32 [K, K] or None.
        rows: part of the matrix to look at, one of several that are fused.
        whole: :func:`energy` of the same weight, Hessian and rows where it is known; with a Hessian
            of [K, K] it takes as long as what is lost.
    """
    total = energy(weight, hessian, rows) if whole is None else whole
    lost = 0.0
    first = rows.indices(weight.shape[0])[0]
    for block in row_blocks(weight[rows]):
        here = slice(first + block.start, first + block.stop)
        dense = weight[here].float()
        off = state.dense(here).sub_(dense)
        lost += _energy(off, hessian)
    return lost / total if total > 0 else 0.0


def energy(
    weight: torch.Tensor, hessian: torch.Tensor | None = None, rows: slice = ALL_ROWS
) -> float:
    """``tr(W H W^T)`` of a floating weight [N, K], or of some of its rows."""
    part = weight[rows]
    return sum(_energy(part[block].float(), hessian) for block in row_blocks(part))


def _energy(matrix: torch.Tensor, hessian: torch.Tensor | None) -> float:
    other = matrix if hessian is None else matrix @ hessian
    return float(torch.linalg.vecdot(matrix, other).sum(dtype=torch.float64))
