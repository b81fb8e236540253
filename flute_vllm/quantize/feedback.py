"""Steps that choose codes against the layer's output error: error feedback and coordinate descent.

Both minimise ``tr(D H D^T)``, ``D = W - W'``, H the Hessian of calibration, for a given table and
scales. Columns are visited in order and one after another, or two by two with a pair table; work
on the columns that follow is delayed and done in blocks, as matrix products.
"""

from __future__ import annotations

import torch

from flute_vllm.errors import FluteError
from flute_vllm.quantize.scales import SMALLEST_SCALE, Quantizer
from flute_vllm.quantize.state import State, Statistics

COLUMN_BLOCK = 128
DAMPING_LIMIT = 1.0  # of the mean diagonal; beyond, the Hessian says nothing any more


def error_feedback(
    weight: torch.Tensor, statistics: Statistics, state: State, damping: float = 0.01
) -> State:
    """GPTQ on any table: each column's rounding error is passed on to the columns after it.

    arXiv 2210.17323, algorithm 1, with fixed scales ("static groups") and the columns in order of
    falling mean square ("act-order"); as scales stay with their columns, nothing is permuted in
    the file. With a pair table two columns are rounded at once, to the pair nearest in the metric
    of their 2 x 2 block.

    Args:
        weight: floating [N, K].
        statistics: needs a Hessian.
        state: its scales and table are kept, its codes replaced.
        damping: added to the diagonal of the Hessian, as a share of its mean.
    """
    rows, columns = weight.shape
    chooser = _Chooser(state, columns)
    width = chooser.width
    order = _order(statistics.hessian, width)
    factor = _inverse_factor(statistics.hessian[order][:, order], damping, state.where)
    left = weight.float()[:, order]
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    places = order.tolist()
    for first in range(0, columns, COLUMN_BLOCK):
        last = min(first + COLUMN_BLOCK, columns)
        passed = torch.empty(rows, last - first, device=weight.device)
        for at in range(first, last, width):
            here = slice(at, at + width)
            metric = torch.linalg.inv(factor[here, here]) if width == 2 else None
            chosen, values = chooser.choose(left[:, here], places[at], metric)
            codes[:, places[at] : places[at] + width] = chosen
            missed = left[:, here] - values
            # Triangular system: with one column a division by the diagonal.
            error = missed @ metric if width == 2 else missed / factor[at, at]
            passed[:, at - first : at - first + width] = error
            # One kernel, not two: on a GPU the host's launches are what this loop waits for.
            left[:, at + width : last].addmm_(error, factor[here, at + width : last], alpha=-1)
        left[:, last:].addmm_(passed, factor[first:last, last:], alpha=-1)
    return state.with_changes(codes=codes)


def descend(
    weight: torch.Tensor,
    statistics: Statistics,
    state: State,
    sweeps: int = 1,
    damping: float = 0.001,
) -> State:
    """Cyclic coordinate descent on the codes: each column takes its best value given all others.

    The objective cannot rise, up to the damping (LNQ in arXiv 2505.07004, CDQuant in arXiv
    2406.17542). Args as in :func:`error_feedback`; ``sweeps`` over all columns.
    """
    rows, columns = weight.shape
    chooser = _Chooser(state, columns)
    width = chooser.width
    hessian = damped(statistics.hessian, damping)
    dense, codes = state.dense(), state.codes.clone()
    target = weight.float()
    for _ in range(sweeps):
        for first in range(0, columns, COLUMN_BLOCK):
            last = min(first + COLUMN_BLOCK, columns)
            slope = (dense - target) @ hessian[:, first:last]  # half the gradient
            for at in range(first, last, width):
                here, local = slice(at, at + width), slice(at - first, at - first + width)
                own = hessian[here, here]
                if width == 2:
                    best = dense[:, here] - slope[:, local] @ torch.linalg.inv(own)
                    metric = torch.linalg.cholesky(own)
                else:
                    best, metric = dense[:, here] - slope[:, local] / own, None
                chosen, values = chooser.choose(best, at, metric)
                step = values - dense[:, here]
                slope.addmm_(step, hessian[here, first:last])
                dense[:, here] = values
                codes[:, here] = chosen
    return state.with_changes(codes=codes)


class _Chooser:
    """Nearest codes of one or two columns, and the weights they mean in the stored precision."""

    def __init__(self, state: State, columns: int) -> None:
        self.width = 2 if state.table.dim() == 2 else 1
        self.dtype = state.spec.torch_scale_dtype
        self.group = state.group(columns)
        self.scales = state.scales.float().T.contiguous()  # [G, N]: a group's scales together
        usable = self.scales.abs() >= SMALLEST_SCALE
        self.inverse = torch.where(usable, 1 / self.scales, 0.0)
        quantizer: Quantizer = state.quantizer()
        self.table, self.bits = quantizer.table, quantizer.bits
        if self.width == 1:
            self.ascending, order = self.table.sort(stable=True)
            self.order = order.to(torch.uint8)
            self.boundaries = (self.ascending[1:] + self.ascending[:-1]) / 2

    def choose(
        self, wanted: torch.Tensor, column: int, metric: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 codes and float32 weights [N, width] nearest to ``wanted`` [N, width].

        ``metric`` A [2, 2] measures the error e of a pair as ``|e A|``.
        """
        group = column // self.group
        ratio = wanted * self.inverse[group][:, None]
        if self.width == 1:
            place = torch.bucketize(ratio[:, 0], self.boundaries)
            codes = self.order[place][:, None]
            values = self.ascending[place][:, None]
        else:
            # argmin |x - t|^2 = argmax x.t - |t|^2 / 2, after the change of metric
            points = self.table @ metric
            index = torch.addmm(-points.square().sum(1) / 2, ratio @ metric, points.T).argmax(1)
            codes = torch.stack((index >> self.bits, index & (2**self.bits - 1)), 1)
            values = self.table[index]
        stored = (values * self.scales[group][:, None]).to(self.dtype).float()
        return codes.to(torch.uint8), stored


def damped(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """The Hessian with ``damping`` times its mean diagonal added to the diagonal."""
    raised = hessian.clone()
    mean = hessian.diagonal().mean()
    raised.diagonal().add_(damping * mean if float(mean) > 0 else 1.0)
    return raised


def _order(hessian: torch.Tensor, width: int) -> torch.Tensor:
    """Columns by falling mean square; those of a pair stay together."""
    strength = hessian.diagonal().view(-1, width).sum(1)
    first = strength.argsort(descending=True, stable=True) * width
    return (first[:, None] + torch.arange(width, device=hessian.device)).view(-1)


def _inverse_factor(hessian: torch.Tensor, damping: float, where: str) -> torch.Tensor:
    """Upper triangular U with ``U^T U = H^-1``: row i says where the error of column i goes."""
    share = damping
    while share <= DAMPING_LIMIT:
        factor, failed = torch.linalg.cholesky_ex(damped(hessian, share))
        if not bool(failed):
            factor = torch.cholesky_inverse(factor)  # the name is reused to free the memory
            upper, failed = torch.linalg.cholesky_ex(factor, upper=True)
            if not bool(failed):
                return upper
        share *= 10
    raise FluteError(
        "calibration gives no usable Hessian",
        where=where,
        why=f"it is not positive definite with {share / 10:.3g} of its mean diagonal added, or "
        f"holds NaN ({int((~hessian.isfinite()).sum())} of {hessian.numel()} values)",
        fix="calibrate with more or other text (--calib), or use --recipe fast",
    )
