"""Steps that learn the table: weighted Lloyd iterations, for scalar tables and for pair tables.

The objective is ``sum w (W - s t[code])^2`` over the weights of the whole (fused) matrix, with w
the importance of a column. Scales, codes and table are improved in turn (Lloyd 1982, as k-means).
"""

from __future__ import annotations

import torch

from flute_vllm.quantize.codebooks import gaussian_lloyd, normal_float
from flute_vllm.quantize.rounding import search
from flute_vllm.quantize.scales import (
    NEARBY,
    SHRINK_FACTORS,
    Quantizer,
    absmax_scales,
    best_scales,
    searched_scales,
)
from flute_vllm.quantize.state import State, Statistics, sum_by_index

SAMPLED_WEIGHTS = 1 << 18  # enough for the 16 values of a table
SAMPLED_FOR_PAIRS = 1 << 19  # up to 256 pairs


def learn_table(
    weight: torch.Tensor, statistics: Statistics, state: State, rounds: int = 10
) -> State:
    """Learns a scalar table from two starts, NormalFloat and the Gaussian Lloyd-Max quantizer.

    Lloyd finds local optima: which start leads to the better one differs from layer to layer.
    The better table of the two is kept, normalised to largest magnitude 1 and rounded to the
    scale dtype; then scales and codes are searched anew with it. Does nothing when the user
    fixed the table.

    Args:
        weight: floating [N, K].
        statistics: importance of the columns, if it has any.
        state: table_kind "scalar".
        rounds: of scales, codes, table.
    """
    if state.is_table_fixed:
        return search(weight, statistics, state)
    groups, importance = sample_groups(weight, statistics, state.group(weight.shape[1]))
    results = []
    for start in (normal_float(state.spec.bits).values, gaussian_lloyd(state.spec.bits)):
        learnt = _improve(groups, importance, start.to(weight.device), state.spec.bits, rounds)
        table = _stored(learnt, state)
        results.append((_lost(groups, importance, Quantizer(table, state.spec.bits)), table))
    best = min(results, key=lambda result: result[0])[1]
    return search(weight, statistics, state.with_changes(table=best))


def learn_pairs(
    weight: torch.Tensor, statistics: Statistics, state: State, rounds: int = 12
) -> State:
    """Turns a scalar table into a learned table of pairs (README, "Weights"; HIGGS p = 2).

    K-means in the plane from two starts: all pairs of the scalar values, and pairs of weights of
    the matrix. The first means the same weights as before, so nothing is lost, but it is a
    stationary point of k-means on independent weights (.10518 to .10512 at 2 bits on Gaussian
    ones); the second finds tables that are no grid. Does nothing when the user fixed the table.
    """
    if state.is_table_fixed:
        return state
    bits = state.spec.bits
    group = state.group(weight.shape[1])
    groups, importance = sample_groups(weight, statistics, group, SAMPLED_FOR_PAIRS)
    grid = state.table if state.table.dim() == 2 else torch.cartesian_prod(*[state.table] * 2)
    results = []
    for start in (grid, _pairs_of(groups, importance, state.quantizer(), 4**bits)):
        table = _stored(_improve(groups, importance, start, bits, rounds), state)
        results.append((_lost(groups, importance, Quantizer(table, bits)), table))
    best = min(results, key=lambda result: result[0])[1]
    spec = state.spec.with_changes(table_kind="pair")
    return search(weight, statistics, state.with_changes(spec=spec, table=best))


def as_pairs(state: State) -> State:
    """The same weights with a pair table: all pairs of the values of the scalar one."""
    spec = state.spec.with_changes(table_kind="pair")
    return state.with_changes(spec=spec, table=torch.cartesian_prod(state.table, state.table))


def _pairs_of(
    groups: torch.Tensor, importance: torch.Tensor | None, quantizer: Quantizer, count: int
) -> torch.Tensor:
    """float32 [count, 2]: pairs of weights over their scale, evenly spread over the groups."""
    scales = searched_scales(groups, quantizer, importance)
    used = scales.abs() > 0
    ratio = torch.where(used, 1 / torch.where(used, scales, 1.0), 0.0)[:, None] * groups
    pairs = ratio.reshape(-1, 2)
    stride = max(1, len(pairs) // count) | 1
    chosen = torch.arange(count, device=pairs.device) * stride % len(pairs)
    # A few are far out; the scales are made for values up to the table's largest.
    return pairs[chosen].clamp(-1.2 * quantizer.largest, 1.2 * quantizer.largest)


def sample_groups(
    weight: torch.Tensor, statistics: Statistics, group: int, weights: int = SAMPLED_WEIGHTS
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Evenly spread groups of a matrix, float32 [R, g], and the importance of their columns."""
    rows, columns = weight.shape
    grouped = weight.reshape(-1, group)
    wanted = max(1, weights // group)
    if len(grouped) > wanted:
        # An odd stride visits every column group: their number is mostly a power of two.
        stride = len(grouped) // wanted | 1
        chosen = torch.arange(0, len(grouped), stride, device=weight.device)
    else:
        chosen = torch.arange(len(grouped), device=weight.device)
    importance = statistics.importance
    if importance is not None:
        importance = importance.view(-1, group)[chosen % (columns // group)]
    return grouped[chosen].float(), importance


def _improve(
    groups: torch.Tensor,
    importance: torch.Tensor | None,
    table: torch.Tensor,
    bits: int,
    rounds: int,
) -> torch.Tensor:
    """Rounds of scales for the table, codes for both, then the table of least squares.

    The best scale of either sign is followed: a scale that only follows the table keeps its sign,
    and the table then never becomes as asymmetric as it should.
    """
    start = absmax_scales(groups, Quantizer(table, bits))
    followed = [
        best_scales(groups, Quantizer(table, bits), candidates, start, importance)
        for candidates in (
            [start * f for f in SHRINK_FACTORS],
            [-start * f for f in SHRINK_FACTORS],
        )
    ]
    for _ in range(rounds):
        quantizer = Quantizer(table, bits)
        followed = [
            best_scales(groups, quantizer, [s * f for f in NEARBY], s, importance) for s in followed
        ]
        scales = best_scales(groups, quantizer, followed, followed[0], importance)
        codes = quantizer.codes(groups, scales)
        weighted = scales[:, None].expand_as(groups)
        if importance is not None:
            weighted = weighted * importance
        table = _centroids(groups * weighted, weighted * scales[:, None], codes, quantizer)
        # The scales absorb the magnitude: tables of one range are easier to compare.
        largest = table.abs().max()
        table = table / largest
        followed = [s * largest for s in followed]
    return table


def _centroids(
    products: torch.Tensor, norms: torch.Tensor, codes: torch.Tensor, quantizer: Quantizer
) -> torch.Tensor:
    """Table values ``sum(w s W) / sum(w s^2)`` over the weights that use them."""
    table = quantizer.table
    index = codes.long()
    if quantizer.is_pair:
        entry = (index[:, 0::2] << quantizer.bits | index[:, 1::2]).reshape(-1)
        index = torch.stack((2 * entry, 2 * entry + 1), 1)
    flat = index.reshape(-1)
    above = sum_by_index(products.reshape(-1), flat, table.numel())
    below = sum_by_index(norms.reshape(-1), flat, table.numel())
    values = torch.where(below > 0, above / below.clamp_min(1e-300), table.reshape(-1).double())
    return values.float().view(table.shape)


def _stored(table: torch.Tensor, state: State) -> torch.Tensor:
    """Ascending (scalars), and rounded to what is stored."""
    ordered = table if table.dim() == 2 else table.sort().values
    return ordered.to(state.spec.torch_scale_dtype).float()


def _lost(groups: torch.Tensor, importance: torch.Tensor | None, quantizer: Quantizer) -> float:
    scales = searched_scales(groups, quantizer, importance)
    off = quantizer.values(quantizer.codes(groups, scales)) * scales[:, None] - groups
    weighted = off if importance is None else off * importance
    return float(torch.linalg.vecdot(off, weighted).sum(dtype=torch.float64))
