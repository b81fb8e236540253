"""Quantizes one matrix with one given table: what tests and other tools need of the steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flute_vllm.checkpoint import Checkpoint
from flute_vllm.errors import FluteError
from flute_vllm.format import LayerSpec
from flute_vllm.quantize.rounding import absmax, search
from flute_vllm.quantize.scales import SCALE_METHODS, round_scales
from flute_vllm.quantize.state import State, Statistics, relative_error, row_blocks


@dataclass(frozen=True)
class QuantizedTensor:
    """The three tensors of a layer (:mod:`flute_vllm.format`) and how far they are off.

    ``error`` is the relative squared error, |W - W'|^2 / |W|^2, of the stored weights W'
    (0 for an all-zero matrix).
    """

    qweight: torch.Tensor
    scales: torch.Tensor
    table: torch.Tensor
    error: float

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"qweight": self.qweight, "scales": self.scales, "table": self.table}


def quantize_tensor(
    weight: torch.Tensor,
    spec: LayerSpec,
    table: torch.Tensor,
    scale: str = "search",
    where: str = "weight",
) -> QuantizedTensor:
    """Quantizes a dense weight by rounding each weight to the nearest value.

    Args:
        weight: floating [N, K], on any device; the work is done there, in float32.
        spec: bits, group size, scale dtype and table kind.
        table: floating, of ``spec.table_shape``, in any order.
        scale: "absmax" (largest weight of a group on the largest table value, as FLUTE's NF) or
            "search" (least squared error; never worse than absmax).
        where: name for messages.

    Returns:
        Tensors on the device of ``weight``, table and scales in the scale dtype.

    Raises:
        FluteError: not a matrix, K unfit for the group size, NaN or infinity in the weight, a
            scale beyond the range of the scale dtype, a table of another shape.
    """
    if scale not in SCALE_METHODS:
        raise FluteError(
            f"unknown scale method {scale!r}",
            where=where,
            why=f"it must be one of {', '.join(SCALE_METHODS)}",
            fix="use 'search'",
        )
    check_weight(weight, spec, where)
    start = start_state(spec, table.to(weight.device), True, where)
    step = search if scale == "search" else absmax
    state = step(weight, Statistics(), start)
    error = relative_error(weight, state)
    return QuantizedTensor(**state.tensors(slice(None)), error=error)


def start_state(spec: LayerSpec, table: torch.Tensor, is_fixed: bool, where: str) -> State:
    """A state without codes, its table rounded to what will be stored. Raises FluteError."""
    if tuple(table.shape) != spec.table_shape:
        raise FluteError(
            "table does not fit the bits",
            where=where,
            why=f"{spec.bits} bits with a {spec.table_kind} table need {list(spec.table_shape)}, "
            f"got {list(table.shape)}",
            fix="pass a table made for these bits",
        )
    stored = round_scales(table.float(), spec.torch_scale_dtype, f"{where}: table").float()
    return State(spec, stored, is_fixed, where)


def check_weight(weight: torch.Tensor, spec: LayerSpec, where: str) -> None:
    """Raises FluteError unless the weight is a finite matrix that the spec can store."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise FluteError(
            "cannot quantize this tensor",
            where=where,
            why=f"expected a floating [N, K] matrix, got {weight.dtype} {list(weight.shape)}",
            fix="leave the module dense with --skip",
        )
    spec.check_in_features(weight.shape[1], where)
    check_finite(weight, where)


def check_finite(weight: torch.Tensor, where: str) -> None:
    """Raises FluteError that names the first NaN or infinity of a matrix or vector."""
    matrix = weight if weight.dim() == 2 else weight.reshape(1, -1)
    for block in row_blocks(matrix):
        if not bool(matrix[block].isfinite().all()):
            raise _not_finite(matrix[block], block.start, where)


def load_group(
    checkpoint: Checkpoint,
    group: tuple[str, ...],
    specs: dict[str, LayerSpec],
    device: torch.device,
) -> torch.Tensor:
    """The matrices of a group, rows stacked, in their own dtype. Raises FluteError for NaN."""
    parts = []
    for module in group:
        weight = checkpoint.load(f"{module}.weight").to(device)
        check_weight(weight, specs[module], f"{module}.weight")
        parts.append(weight)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _not_finite(block: torch.Tensor, first_row: int, where: str) -> FluteError:
    bad = (~block.isfinite()).nonzero()
    row, column = bad[0].tolist()
    return FluteError(
        "the weight is not finite",
        where=where,
        why=f"{len(bad)} NaN or infinite values, the first is {float(block[row, column])} at "
        f"[{first_row + row}, {column}]",
        fix="download the source checkpoint again, or leave the module dense with --skip",
    )
