"""Which tile size T a FLUTE-packed weight has: metadata first, statistics as the last resort.

A wrong T permutes rows inside blocks of 256 (4 bits) or 512 (2 bits) rows relative to their
scales: plausible numbers, useless model. So a guess is accepted only with a clear margin.
Sections named here are those of the format notes.
"""

from __future__ import annotations

import re

import torch

from flute_vllm.importers.flute_layout import DEFAULT_TILE, TILE_SIZES, decode, tile_rows

# Section 4: ids of the kernel templates whose TileP is 64; all others have 32.
NUM_TEMPLATES = {2: 36, 3: 36, 4: 144}
_WIDE_TEMPLATES = {
    2: (range(4), range(12, 16), range(24, 28)),
    4: (range(16), range(48, 64), range(96, 112)),
}
# Packers before this version knew T = 32 only.
FIRST_TUNED_VERSION = (0, 4)

# Correlations measured on Gaussian weights: -0.77 to -0.88 for the right T, -0.08 to -0.22 for the
# wrong one (section 4). Half of the distance must separate the two, on the right side.
MARGIN = 0.3
STRONGEST_ACCEPTED = -0.4
FEWEST_GROUPS = 256
SAMPLE_WEIGHTS = 1 << 22


def tile_of_template(bits: int, template_id: int) -> int:
    """T that the packer used under a kernel template; 3-bit packing ignores the template."""
    wide = any(template_id in ids for ids in _WIDE_TEMPLATES.get(bits, ()))
    return 64 if wide else 32


def predates_tuning(version: str | None) -> bool:
    """Whether a ``version`` of flute_config.json is below 0.4, whose packers always used T = 32."""
    match = re.match(r"\s*v?(\d+)\.(\d+)", version or "")
    return match is not None and (int(match[1]), int(match[2])) < FIRST_TUNED_VERSION


def pinned_tile(bits: int, out_features: int) -> int | None:
    """T where bits and N leave only one possibility (section 4, conclusion 2), else None."""
    fitting = [t for t in TILE_SIZES if out_features % tile_rows(bits, t) == 0]
    return DEFAULT_TILE if bits == 3 or fitting == [DEFAULT_TILE] else None


def tile_correlations(
    weight: torch.Tensor, scales: torch.Tensor, table: torch.Tensor, bits: int
) -> dict[int, float] | None:
    """Correlation of log scale with log mean |table value| over the groups of each row, by T.

    A group with a large scale had an outlier, so its other weights use small table values: the
    correlation is clearly negative when codes and scales belong to the same rows (section 4,
    conclusion 4).

    Args:
        weight: int16 [P, K] that both tile sizes could have produced.
        scales: [N, G].
        table: [2**bits].

    Returns:
        None when there is nothing to correlate: one group a row, or too few usable groups.
    """
    groups = scales.shape[1]
    if groups < 2:
        return None
    # A prefix of whole tiles is a packed matrix of its own: what it says holds for the rest.
    block = tile_rows(bits, max(TILE_SIZES))
    rows = max(block, SAMPLE_WEIGHTS // weight.shape[1] // block * block)
    weight, scales = weight[: rows * bits // 16], scales[:rows]
    size = table.float().abs()
    found = {}
    for tile_p in TILE_SIZES:
        values = size[decode(weight, bits, tile_p).to(torch.int32)]
        mean = values.unflatten(1, (groups, -1)).mean(-1)
        usable = ((scales != 0) & (mean > 0)).all(1)
        if int(usable.sum()) * groups < FEWEST_GROUPS:
            return None
        found[tile_p] = _row_correlation(scales[usable].float().abs().log(), mean[usable].log())
    return found


def guess_tile(correlations: dict[int, float] | None) -> int | None:
    """The T that the correlations clearly favour, else None."""
    if correlations is None:
        return None
    best, other = sorted(correlations, key=correlations.__getitem__)
    clear = correlations[other] - correlations[best] >= MARGIN
    return best if clear and correlations[best] <= STRONGEST_ACCEPTED else None


def _row_correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    """Pearson correlation pooled over rows, each row centred on its own mean; 0 for constants."""
    x = (x - x.mean(1, keepdim=True)).double()
    y = (y - y.mean(1, keepdim=True)).double()
    norm = (x.square().sum() * y.square().sum()).sqrt()
    return float((x * y).sum() / norm) if float(norm) > 0 else 0.0
