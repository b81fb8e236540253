"""Codes for given scales, and scales for given weights: absmax and searched.

A group is a run of weights of one row that share a scale. Everything here works on a block of
groups, float32 [R, g], small enough that its temporaries fit in cache and memory; the caller
(:mod:`flute_vllm.quantize.tensor`) cuts a matrix into such blocks.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from flute_vllm.errors import FluteError

SCALE_METHODS = ("search", "absmax")
# Fractions of the absmax scale that the search tries. NF tables at 4 bits and groups of 64 are
# best near 0.9, at 2 bits near 0.5 (a fixed table spends its two ends on rare values).
SHRINK_FACTORS = (0.45, 0.58, 0.70, 0.79, 0.87, 0.94, 1.0)
NEARBY = (0.94, 0.97, 1.0, 1.03, 1.06)  # around the best of them, for a second look
SMALLEST_SCALE = 1e-30  # below, inverses overflow float32: such a group keeps its absmax scale
_BINS = 4096  # resolution of the approximate lookup that scores candidates


class Quantizer:
    """Nearest-value lookup in one table.

    Args:
        table: float32 [2**bits] or [2**(2 * bits), 2], any order. Round it to the dtype that is
            stored before passing it, so that codes are nearest to what the kernel reads.
        bits: 2, 3 or 4.
    """

    def __init__(self, table: torch.Tensor, bits: int) -> None:
        self.table = table.float()
        self.bits = bits
        self.largest = float(self.table.abs().max())
        self.is_pair = table.dim() == 2
        self.is_symmetric = not self.is_pair and _is_symmetric(self.table)
        if self.is_pair:
            self._half_norms = self.table.square().sum(1) / 2
            self._zero_code = int(self._half_norms.argmin())
            return
        self._zero_code = int(self.table.abs().argmin())
        ascending, self._order = self.table.sort(stable=True)
        self._boundaries = (ascending[1:] + ascending[:-1]) / 2
        self._order = self._order.to(torch.uint8)
        centres = (torch.arange(_BINS, device=table.device) + 0.5) * (2 / _BINS) - 1
        binned = torch.bucketize(centres * (self.largest * 1.01), self._boundaries)
        self._approximate = ascending[binned]

    def codes(self, weights: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """uint8 [R, g]: the codes whose table value is nearest to ``weights / scales``.

        Args:
            weights: float32 [R, g].
            scales: float32 [R], already rounded to the stored dtype. Where a scale is zero every
                code means zero; the code of the table's smallest value is used.
        """
        inverse = torch.where(scales == 0, 0.0, 1 / scales)
        ratio = weights * inverse[:, None] if self.is_pair else weights / _nonzero(scales)[:, None]
        codes = self._nearest_pair(ratio) if self.is_pair else self._nearest(ratio)
        if bool((scales == 0).any()):
            codes[scales == 0] = self._zero_codes(codes.shape[1])
        return codes

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """float32 [R, g]: table values of uint8 codes [R, g]."""
        if not self.is_pair:
            return self.table.index_select(0, codes.reshape(-1).int()).view(codes.shape)
        index = codes[:, 0::2].int() * 2**self.bits + codes[:, 1::2].int()
        return self.table.index_select(0, index.reshape(-1)).view(codes.shape)

    def approximate_values(self, weights: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        """Like ``values(codes(...))`` up to 1/2048 of the table's range; for scoring only.

        A lookup by rounding costs a fifth of the exact binary search.
        """
        if self.is_pair:
            return self.values(self._nearest_pair(weights * inverse[:, None]))
        half = _BINS / 2
        index = weights * (inverse * (half / (self.largest * 1.01)))[:, None]
        index = index.add_(half).clamp_(0, _BINS - 1).to(torch.int32)
        return self._approximate.index_select(0, index.view(-1)).view(weights.shape)

    def _nearest(self, ratio: torch.Tensor) -> torch.Tensor:
        index = torch.bucketize(ratio, self._boundaries, out_int32=True)
        return self._order.index_select(0, index.view(-1)).view(ratio.shape)

    def _nearest_pair(self, ratio: torch.Tensor) -> torch.Tensor:
        # argmin |x - t|^2 = argmax x.t - |t|^2 / 2
        pairs = ratio.reshape(-1, 2)
        index = torch.cat(
            [
                torch.addmm(-self._half_norms, part, self.table.T).argmax(1)
                for part in pairs.split(1 << 16)
            ]
        )
        codes = torch.stack((index >> self.bits, index & (2**self.bits - 1)), 1)
        return codes.to(torch.uint8).view(ratio.shape)

    def _zero_codes(self, width: int) -> torch.Tensor:
        device = self.table.device
        if not self.is_pair:
            return torch.full((width,), self._zero_code, dtype=torch.uint8, device=device)
        pair = (self._zero_code >> self.bits, self._zero_code & (2**self.bits - 1))
        return torch.tensor(pair, dtype=torch.uint8, device=device).repeat(width // 2)


def absmax_scales(weights: torch.Tensor, quantizer: Quantizer) -> torch.Tensor:
    """float32 [R]: the largest magnitude of each group maps to the table's largest magnitude."""
    return weights.abs().amax(1) / quantizer.largest


def searched_scales(
    weights: torch.Tensor, quantizer: Quantizer, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """float32 [R]: scales of small squared error.

    For each candidate ``c = factor * absmax``, the codes nearest to ``w / c`` have values v; the
    best scale for these values is the least-squares one, ``s = <w, v> / <v, v>``, with squared
    error ``|w|^2 - <w, v>^2 / <v, v>``. The candidate of least error wins and its s is refined
    once more. A coarse grid is enough because s moves off it.

    A table that is not symmetric is tried with negative scales too: each group then has its
    largest weight on the side where the table reaches further, which costs no bit.

    Args:
        weights: float32 [R, g].
        quantizer: of the table in its stored precision.
        importance: float32 [R, g], weight of each squared error; all one when None.
    """
    start = absmax_scales(weights, quantizer)
    signs = (1,) if quantizer.is_symmetric else (1, -1)
    candidates = (start * (sign * factor) for sign in signs for factor in SHRINK_FACTORS)
    best = best_scales(weights, quantizer, candidates, start, importance)
    nearby = (best * factor for factor in NEARBY)
    best = best_scales(weights, quantizer, nearby, best, importance)
    return torch.where(start < SMALLEST_SCALE, start, best)


def best_scales(
    weights: torch.Tensor,
    quantizer: Quantizer,
    candidates: Iterable[torch.Tensor],
    default: torch.Tensor,
    importance: torch.Tensor | None = None,
) -> torch.Tensor:
    """float32 [R]: of the scales that the candidates lead to, the ones of least squared error.

    ``default`` is kept where no candidate explains anything (groups of zeros).
    """
    best_gain = torch.full_like(default, -1.0)
    best_scale = default.clone()
    for candidate in candidates:
        scale, gain = _refit(weights, candidate, quantizer, importance)
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale


def _refit(
    weights: torch.Tensor,
    candidate: torch.Tensor,
    quantizer: Quantizer,
    importance: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    inverse = torch.where(candidate.abs() < SMALLEST_SCALE, 0.0, 1 / candidate)
    values = quantizer.approximate_values(weights, inverse)
    weighted = values if importance is None else values * importance
    product = torch.linalg.vecdot(weights, weighted)
    norm = torch.linalg.vecdot(values, weighted)
    scale = torch.where(norm > 0, product / norm, 0.0)
    return scale, scale * product


def round_scales(scales: torch.Tensor, dtype: torch.dtype, where: str) -> torch.Tensor:
    """Scales in the stored dtype. Raises FluteError where fp16 overflows."""
    rounded = scales.to(dtype)
    if not bool(rounded.isfinite().all()):
        largest = float(scales.abs().max())
        name = str(dtype).removeprefix("torch.")
        raise FluteError(
            f"scale does not fit {name}",
            where=where,
            why=f"the largest scale is {largest:.6g}, {name} ends at {torch.finfo(dtype).max:.6g}",
            fix="use --scale-dtype bfloat16",
        )
    return rounded


def _is_symmetric(table: torch.Tensor) -> bool:
    """Whether negating a scalar table gives the same values."""
    ascending = table.sort().values
    return torch.equal(ascending, -ascending.flip(0))


def _nonzero(scales: torch.Tensor) -> torch.Tensor:
    return torch.where(scales == 0, 1.0, scales)
