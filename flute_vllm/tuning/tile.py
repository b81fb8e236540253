"""How a tile launch is cut: problem -> config -> launch, pure functions of sizes and device.

The kernel (``kernels/cuda/tile.cuh``) computes ``y[M, N] = x[M, K] w[N, K]^T`` for many rows of x
with instructions that every GPU from sm_80 on has. A config says how many rows of x a block takes
(beside 128 rows of w), over how many blocks k is split, and how much of x and w is on its way to
shared memory. The choice depends on M only through its bucket: one plan serves all calls.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from flute_vllm.errors import FluteError
from flute_vllm.tuning.device import TILE_K, TILE_ROWS, Device
from flute_vllm.tuning.problem import ProblemBase

ROWS = 128  # of w, in a block
TOKENS = (64, 128)  # rows of x in a block
BUCKETS = (64, 128, 192, 256, 384, 512, 768, 1024)  # largest M of each; one more for all above
MAX_X_SLOTS, MAX_RECORD_SLOTS = 5, 8
TABLE_BYTES = 256 * 128
X_SLOT_BYTES = 16384
SUM_BYTES = 128 * (128 + 4) * 4
MAX_SPLITS = 16
MAX_WORKSPACE = 32 << 20
# Slots of x and records, the most that is of use first. All but the first of either hide latency.
SLOTS = {64: ((3, 4), (3, 3), (2, 3), (2, 2)), 128: ((5, 3), (4, 3), (3, 2), (2, 2))}


class Problem(ProblemBase):
    KERNEL = "tile"

    @property
    def row_blocks(self) -> int:
        return sum(math.ceil(rows / ROWS) for rows in (self.parts or (self.n,)))


@dataclass(frozen=True)
class Config:
    """``FluteTileConfig``, field by field."""

    tokens: int
    splits: int = 1
    x_slots: int = 2
    record_slots: int = 2

    @property
    def numbers(self) -> tuple[int, ...]:
        return (self.tokens, self.splits, self.x_slots, self.record_slots)


@dataclass(frozen=True)
class Launch:
    """The launch that the C++ side makes of a config; here to be checked without a GPU."""

    blocks: int
    shared_bytes: int
    workspace_bytes: int


def shared_bytes(problem: Problem, config: Config) -> int:
    """As tile_shared_bytes in tile_launch.cuh."""
    records = ROWS // TILE_ROWS * problem.record_bytes
    total = TABLE_BYTES + config.x_slots * X_SLOT_BYTES + config.record_slots * records
    return max(total, SUM_BYTES)


def launch(problem: Problem, config: Config, device: Device) -> Launch | None:
    """The launch of a config, or None where it is not legal. As launch_tile in tile_launch.cuh."""
    steps = 2 if config.tokens == 128 else 1  # of x in a k tile
    if (
        config.tokens not in TOKENS
        or not 1 <= config.splits <= min(problem.k_tiles, 65535)
        or not 2 <= config.x_slots <= MAX_X_SLOTS
        or not 1 <= config.record_slots <= MAX_RECORD_SLOTS
        or config.x_slots - 1 > (config.record_slots - 1) * steps
        or shared_bytes(problem, config) > device.shared_bytes
    ):
        return None
    blocks = problem.row_blocks * math.ceil(problem.m / config.tokens)
    if blocks >= 2**31:
        return None
    workspace = config.splits * problem.m * problem.n * 4 if config.splits > 1 else 0
    return Launch(blocks * config.splits, shared_bytes(problem, config), workspace)


def candidates(problem: Problem, device: Device) -> Iterator[Config]:
    """Legal configs, with as many slots as fit."""
    for tokens in TOKENS:
        slots = (
            pair
            for pair in SLOTS[tokens]
            if launch(problem, Config(tokens, 1, *pair), device) is not None
        )
        best = next(slots, None)
        if best is None:
            continue
        for splits in range(1, min(problem.k_tiles, MAX_SPLITS) + 1):
            config = Config(tokens, splits, *best)
            if splits == 1 or splits * problem.m * problem.n * 4 <= MAX_WORKSPACE:
                yield config


def clocks(problem: Problem, config: Config, device: Device) -> float:
    """What a launch takes by count of its work: for choosing among configs, not for predicting.

    None of the constants is measured yet. A block multiplies at the rate of mma.sync; its start
    and end (table, first copies, sums) are counted as three k tiles of 128 x 128, the second pass
    as a small kernel that moves all shares once in each direction.
    """
    rate = 1024 if device.wide_table else 512  # products a clock and multiprocessor
    k_tile = ROWS * TILE_K * config.tokens / rate
    edge = 3 * ROWS * TILE_K * 128 / 1024
    blocks = problem.row_blocks * math.ceil(problem.m / config.tokens) * config.splits
    waves = math.ceil(blocks / device.multiprocessors)
    total = waves * (math.ceil(problem.k_tiles / config.splits) * k_tile + edge)
    if config.splits > 1:
        moved = 2 * config.splits * problem.m * problem.n * 4
        total += 3000 + moved / (device.multiprocessors * 32)
    return total


def bucket(m: int) -> int | None:
    """The largest M that gets the same config as m; None above the last bucket."""
    return next((limit for limit in BUCKETS if m <= limit), None)


def select(problem: Problem, device: Device) -> Config:
    """The config of a problem, the same for all M of a bucket.

    Above the last bucket k is never split, so that the workspace of a plan has a bound.
    """
    limit = bucket(problem.m)
    stand_in = Problem(
        problem.n, problem.k, limit or BUCKETS[-1] + 1, problem.bits, problem.group_size,
        problem.parts,
    )  # fmt: skip
    legal = list(candidates(stand_in, device))
    if limit is None:
        legal = [config for config in legal if config.splits == 1 and config.tokens == 128]
    if not legal:
        raise FluteError(
            f"no tile launch fits {device.name}",
            where="tuning.tile.select",
            why=f"{device.shared_bytes} bytes of shared memory are too few",
            fix="use the dequantizing path",
        )
    return min(legal, key=lambda config: clocks(stand_in, config, device))
