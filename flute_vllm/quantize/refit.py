"""Steps that fit the real numbers to given codes, in closed form: scales and table.

Both minimise ``tr(D H D^T)``, ``D = W - W'``, in which W' is linear in the scales and linear in
the table (LNQ, arXiv 2505.07004, section 3).
"""

from __future__ import annotations

import torch

from flute_vllm.quantize.feedback import damped
from flute_vllm.quantize.scales import round_scales
from flute_vllm.quantize.state import State, Statistics, sum_by_index

ROWS_FOR_TABLE = 512  # of all rows; 16 values are sure enough from 512 rows of any width
SYSTEM_VALUES = 1 << 26  # of the batched systems of refit_scales: 256 MiB


def refit_scales(
    weight: torch.Tensor, statistics: Statistics, state: State, damping: float = 0.001
) -> State:
    """Least-squares scales of each row for its codes: a system of one equation for each group.

    With B the table values of row n, ``sum_h s_h (B_g H_gh B_h^T) = (w H)_g B_g^T`` for each g.

    Args:
        weight: floating [N, K].
        statistics: needs a Hessian.
        state: with codes; its scales are replaced.
        damping: as in :func:`flute_vllm.quantize.feedback.error_feedback`.

    Raises:
        FluteError: a scale beyond the range of the scale dtype.
    """
    rows, columns = weight.shape
    group = state.group(columns)
    count = columns // group
    hessian = damped(statistics.hessian, damping)
    quantizer = state.quantizer()
    scales = torch.empty_like(state.scales)
    step = max(1, min(rows, SYSTEM_VALUES // max(count * count, columns)))
    ridge = torch.eye(count, device=weight.device)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        values = quantizer.values(state.codes[part])
        wanted = weight[part].float() @ hessian
        right = (wanted * values).view(-1, count, group).sum(2)
        system = torch.empty(values.shape[0], count, count, device=weight.device)
        for at in range(count):
            span = slice(at * group, (at + 1) * group)
            product = (values[:, span] @ hessian[span]) * values
            system[:, at] = product.view(-1, count, group).sum(2)
        mean = system.diagonal(dim1=1, dim2=2).mean(1)
        # Groups whose values are all zero have an empty equation: the ridge answers with zero.
        system += torch.where(mean > 0, mean * 1e-6, 1.0)[:, None, None] * ridge
        found = torch.linalg.solve(system, right[..., None])[..., 0]
        scales[part] = round_scales(found, scales.dtype, state.where)
    return state.with_changes(scales=scales)


def refit_table(
    weight: torch.Tensor, statistics: Statistics, state: State, damping: float = 0.001
) -> State:
    """Least-squares table of the whole matrix for its codes and scales; scalar tables only.

    With E_a the scales where the code is a, else zero: ``sum_c t_c tr(E_a H E_c^T) = tr(E_a H
    W^T)`` for each a. Does nothing when the user fixed the table, or with a pair table.
    """
    if state.is_table_fixed or state.table.dim() == 2:
        return state
    rows, columns = weight.shape
    chosen = torch.arange(0, rows, max(1, rows // ROWS_FOR_TABLE), device=weight.device)
    hessian = damped(statistics.hessian, damping)
    codes = state.codes[chosen]
    scales = state.scales[chosen].float().repeat_interleave(state.group(columns), 1)
    wanted = weight[chosen].float() @ hessian
    size = state.table.numel()
    system = torch.empty(size, size, dtype=torch.float64, device=weight.device)
    right = torch.empty(size, dtype=torch.float64, device=weight.device)
    flat = codes.reshape(-1).long()
    for value in range(size):
        marked = torch.where(codes == value, scales, 0.0)
        right[value] = (marked * wanted).sum(dtype=torch.float64)
        spread = ((marked @ hessian) * scales).reshape(-1)
        system[value] = sum_by_index(spread, flat, size)
    # Codes that no weight uses keep their value.
    unused = system.diagonal() <= 0
    system.diagonal().add_(system.diagonal().mean() * 1e-9)
    table = torch.linalg.solve(system, right)
    table = torch.where(unused, state.table.double(), table).float()
    stored = round_scales(table, state.spec.torch_scale_dtype, f"{state.where}: table")
    return state.with_changes(table=stored.float())
