"""Quantizes one matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flute_vllm.errors import FluteError
from flute_vllm.format import LayerSpec, pack
from flute_vllm.quantize.scales import (
    SCALE_METHODS,
    Quantizer,
    absmax_scales,
    round_scales,
    searched_scales,
)

_BLOCK_WEIGHTS = 1 << 20  # weights handled at once: bounds temporaries to about 40 MiB


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
    """Quantizes a dense weight.

    Args:
        weight: floating [N, K], on any device; the work is done there, in float32.
        spec: bits, group size, scale dtype and table kind.
        table: floating, of ``spec.table_shape``, in any order.
        scale: "absmax" (largest weight of a group on the largest table value, as FLUTE's NF) or
            "search" (least squared error; never worse than absmax).
        where: name for messages.

    Returns:
        Tensors on the device of ``weight``, table and scales in the scale dtype. Scales and
        table are rounded before codes are chosen, so each code is the nearest one to what the
        kernel will read.

    Raises:
        FluteError: not a matrix, K unfit for the group size, NaN or infinity in the weight, a
            scale beyond the range of the scale dtype, a table of another shape.
    """
    _check(weight, spec, table, scale, where)
    rows, columns = weight.shape
    group = columns if spec.group_size == -1 else spec.group_size
    dtype = spec.torch_scale_dtype
    stored_table = round_scales(table.to(weight.device, torch.float32), dtype, f"{where}: table")
    quantizer = Quantizer(stored_table, spec.bits)
    find = searched_scales if scale == "search" else absmax_scales

    groups_per_row = columns // group
    qweight = torch.empty(
        rows, spec.words_per_row(columns), dtype=torch.int32, device=weight.device
    )
    scales = torch.empty(rows, groups_per_row, dtype=dtype, device=weight.device)
    lost = total = 0.0
    step = max(1, _BLOCK_WEIGHTS // columns)
    for first in range(0, rows, step):
        block = weight[first : first + step].float()
        if not bool(block.isfinite().all()):
            raise _not_finite(block, first, where)
        grouped = block.reshape(-1, group)
        stored = round_scales(find(grouped, quantizer), dtype, where)
        codes = quantizer.codes(grouped, stored.float())
        missed = _squared_error(grouped, codes, stored, quantizer)
        if scale == "search":
            # Rounding and the approximate lookup may cost a group its gain: keep the better.
            plain = round_scales(absmax_scales(grouped, quantizer), dtype, where)
            plain_codes = quantizer.codes(grouped, plain.float())
            plain_missed = _squared_error(grouped, plain_codes, plain, quantizer)
            worse = missed > plain_missed
            stored = torch.where(worse, plain, stored)
            codes = torch.where(worse[:, None], plain_codes, codes)
            missed = torch.minimum(missed, plain_missed)
        lost += float(missed.sum(dtype=torch.float64))
        total += float(grouped.square().sum(dtype=torch.float64))
        qweight[first : first + step] = pack(codes.view(block.shape), spec.bits)
        scales[first : first + step] = stored.view(-1, groups_per_row)
    return QuantizedTensor(qweight, scales, stored_table, lost / total if total else 0.0)


def _squared_error(
    weights: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, quantizer: Quantizer
) -> torch.Tensor:
    """float32 [R]: squared error of each group after the format's rounding of table * scale."""
    dense = (quantizer.values(codes) * scales.float()[:, None]).to(scales.dtype).float()
    difference = dense.sub_(weights)
    return torch.linalg.vecdot(difference, difference)


def _check(
    weight: torch.Tensor, spec: LayerSpec, table: torch.Tensor, scale: str, where: str
) -> None:
    if scale not in SCALE_METHODS:
        raise FluteError(
            f"unknown scale method {scale!r}",
            where=where,
            why=f"it must be one of {', '.join(SCALE_METHODS)}",
            fix="use --scale search",
        )
    if weight.dim() != 2 or not weight.is_floating_point():
        raise FluteError(
            "cannot quantize this tensor",
            where=where,
            why=f"expected a floating [N, K] matrix, got {weight.dtype} {list(weight.shape)}",
            fix="leave the module dense with --skip",
        )
    if tuple(table.shape) != spec.table_shape:
        raise FluteError(
            "table does not fit the bits",
            where=where,
            why=f"{spec.bits} bits with a {spec.table_kind} table need {list(spec.table_shape)}, "
            f"got {list(table.shape)}",
            fix="pass a table made for these bits",
        )
    spec.check_in_features(weight.shape[1], where)


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
