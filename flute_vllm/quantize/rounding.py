"""Steps that need no data: scales by absmax or by search, codes by rounding to nearest.

Both have the signature of every step, ``f(weight, statistics, state) -> state``, and work on
blocks of rows, so that a matrix of any size needs little memory beside itself.
"""

from __future__ import annotations

import torch

from flute_vllm.quantize.scales import Quantizer, absmax_scales, round_scales, searched_scales
from flute_vllm.quantize.state import State, Statistics, row_blocks


def absmax(weight: torch.Tensor, statistics: Statistics, state: State) -> State:
    """The largest weight of a group on the largest value of the table, as FLUTE and bitsandbytes.

    Args:
        weight: floating [N, K].
        statistics: unused.
        state: its table is used as it is.

    Raises:
        FluteError: a scale beyond the range of the scale dtype.
    """
    return _round_to_nearest(weight, state, None, is_searched=False)


def search(weight: torch.Tensor, statistics: Statistics, state: State) -> State:
    """Scales of least squared error, each column weighted by its mean square if that is known.

    Scales are rounded before codes are chosen, so each code is the nearest to what a kernel reads.
    No group is worse than with :func:`absmax`. Raises FluteError like it.
    """
    return _round_to_nearest(weight, state, statistics.importance, is_searched=True)


def _round_to_nearest(
    weight: torch.Tensor, state: State, importance: torch.Tensor | None, is_searched: bool
) -> State:
    rows, columns = weight.shape
    group = state.group(columns)
    quantizer = state.quantizer()
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(
        rows, columns // group, dtype=state.spec.torch_scale_dtype, device=weight.device
    )
    for block in row_blocks(weight):
        grouped = weight[block].float().reshape(-1, group)
        column_weights = None
        if importance is not None:
            column_weights = importance.expand(block.stop - block.start, -1).reshape(-1, group)
        chosen, stored = _round_groups(grouped, quantizer, state, column_weights, is_searched)
        codes[block] = chosen.view(-1, columns)
        scales[block] = stored.view(-1, columns // group)
    return state.with_changes(codes=codes, scales=scales)


def _round_groups(
    grouped: torch.Tensor,
    quantizer: Quantizer,
    state: State,
    importance: torch.Tensor | None,
    is_searched: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 codes [R, g] and stored scales [R] of float32 groups [R, g]."""
    dtype, where = state.spec.torch_scale_dtype, state.where
    plain = round_scales(absmax_scales(grouped, quantizer), dtype, where)
    plain_codes = quantizer.codes(grouped, plain.float())
    if not is_searched:
        return plain_codes, plain
    stored = round_scales(searched_scales(grouped, quantizer, importance), dtype, where)
    codes = quantizer.codes(grouped, stored.float())
    # Rounding and the approximate lookup may cost a group its gain: keep the better.
    worse = _squared_error(grouped, codes, stored, quantizer, importance) > _squared_error(
        grouped, plain_codes, plain, quantizer, importance
    )
    return torch.where(worse[:, None], plain_codes, codes), torch.where(worse, plain, stored)


def _squared_error(
    weights: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    quantizer: Quantizer,
    importance: torch.Tensor | None,
) -> torch.Tensor:
    """float32 [R]: squared error of each group after the format's rounding of table * scale."""
    dense = (quantizer.values(codes) * scales.float()[:, None]).to(scales.dtype).float()
    difference = dense.sub_(weights)
    weighted = difference if importance is None else difference * importance
    return torch.linalg.vecdot(difference, weighted)
