"""How a decode launch is cut: problem -> config -> launch, pure functions of what is known at load.

The kernel (``kernels/cuda/decode.cuh``) computes ``y[M, N] = x[M, K] w[N, K]^T`` for M <= 32. A
config says how many 16-row tiles a block takes, how its warps divide them, and over how many blocks
of a cluster k is split. A block has 16 warps, or 8 where two blocks are to fit a multiprocessor.
Nothing here looks at a tensor or a clock, so the choice is the same before, during and after CUDA
graph capture.

Order of precedence: the environment variable ``FLUTE_DECODE_CONFIG``, a measured entry of
``configs/tuning/<device>.json``, the heuristic.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from flute_vllm.errors import FluteError
from flute_vllm.tuning.device import SHARED_RESERVED, TILE_K, TILE_ROWS, Device, measured
from flute_vllm.tuning.problem import ProblemBase
from flute_vllm.tuning.shared_memory import (
    CLUSTER_BARRIER_BYTES,
    cluster_room,
    slot_stride,
    whole_lines,
)

logger = logging.getLogger(__name__)

WARPS, SMALL_WARPS = 16, 8
BLOCK_WARPS = (WARPS, SMALL_WARPS)
MAX_ROWS = 32  # of x
MAX_SLOTS = 16
BUCKETS = (8, 16, 32)  # largest M of each compiled width
LAUNCH_ROWS = (2, *BUCKETS)  # largest M of each launch: where M is 1, others are often best
FEW_LAUNCH_ROWS = LAUNCH_ROWS[:2]  # of those that run on Hopper whatever was measured
# Of a warp, by warps of a block: more gains nothing at 3 and 2 bits either; four requests of 16
# warps took up to 19 % longer than two (results/h200/launches.json).
K_TILES_AHEAD = {WARPS: 4, SMALL_WARPS: 6}
X_ROW_BYTES = 2 * TILE_K + 16
BARRIER_BYTES = (MAX_SLOTS + 1) * 8  # of a warp
SMALL_TABLE_AT = -(SHARED_RESERVED + SMALL_WARPS * BARRIER_BYTES) // 256 * -256 - SHARED_RESERVED
ENVIRONMENT = "FLUTE_DECODE_CONFIG"


class Problem(ProblemBase):
    KERNEL, MOST_ROWS = "decode", MAX_ROWS

    @property
    def width(self) -> int:
        return next(bucket for bucket in BUCKETS if self.m <= bucket)

    @property
    def most_rows(self) -> int:
        """The largest M that the launch of this one serves."""
        return next(most for most in LAUNCH_ROWS if self.m <= most)

    @property
    def keys(self) -> list[str]:
        """Of measured launches, the most fitting first. What is best depends little on the bit
        width: those for 4 bits serve the others."""
        return self.keys_up_to(self.most_rows, self.width)

    @property
    def depth(self) -> int:
        """k tiles of one request."""
        return 2 if self.width == 8 else 1

    @property
    def slot_stride(self) -> int:
        """Shared memory for one."""
        return slot_stride(self.depth * self.record_bytes, self.record_bytes)


@dataclass(frozen=True)
class Config:
    row_tiles: int
    row_warps: int = 1
    splits: int = 1
    slots: int = 0  # 0: chosen here, in `complete`
    warps: int = WARPS
    overlap: int = 0  # see FluteDecodeConfig

    @property
    def numbers(self) -> tuple[int, ...]:
        return (
            *(self.row_tiles, self.row_warps, self.splits),
            *(self.slots, self.warps, self.overlap),
        )

    @property
    def rows_each(self) -> int:
        return math.ceil(self.row_tiles / self.row_warps)

    @property
    def k_warps(self) -> int:
        return self.warps // self.row_warps


@dataclass(frozen=True)
class Launch:
    """The launch that the C++ side makes of a config; here to be checked without a GPU."""

    blocks: int
    shared_bytes: int
    cluster: int


def max_rows_each(width: int) -> int:
    """Row tiles that one warp can accumulate in registers."""
    return {8: 8, 16: 4, 32: 2}[width]


def table_bytes(device: Device) -> int:
    return 256 * (256 if device.wide_table else 128)


def room_bytes(problem: Problem, config: Config, ranks: int) -> int:
    """For the sums of a cluster's other blocks."""
    if ranks == 1:
        return 0
    sums = problem.m * config.row_tiles * TILE_ROWS
    return CLUSTER_BARRIER_BYTES + cluster_room(sums, config.warps * 32, 4, ranks)


def small_shared_bytes(
    problem: Problem, config: Config, device: Device, ranks: int = 1
) -> int | None:
    """As plan_small in decode_launch.cuh: None where not every warp has room for a request.

    Where not all of them have room for ``slots``, the last ones have one less.
    """
    if device.capability < 90 or not device.wide_table or problem.width > 8:
        return None
    slot = problem.slot_stride
    half = (device.shared_bytes + SHARED_RESERVED) // 2 - SHARED_RESERVED
    whole = SMALL_TABLE_AT + table_bytes(device) + SMALL_WARPS * config.slots * slot
    whole += room_bytes(problem, config, ranks)
    shorter = max(0, math.ceil((whole - half) / slot))
    if shorter >= SMALL_WARPS or config.slots == (shorter > 0):
        return None
    return whole - shorter * slot


def shared_bytes(problem: Problem, config: Config, device: Device, ranks: int = 1) -> int:
    """As plan_shared in decode_launch.cuh. ``ranks``: blocks of a cluster."""
    partial = config.rows_each * problem.width * 20 * 4
    region = max(config.slots * problem.slot_stride, partial)
    before = (0x10000 if device.wide_table else 0x8000) - SHARED_RESERVED
    table = table_bytes(device)
    x = config.k_warps * problem.depth * problem.m * X_ROW_BYTES
    first, high = WARPS * BARRIER_BYTES + X_ROW_BYTES, before + table
    if first + x <= before:
        first += x
    else:
        high += x
    first, high = whole_lines(first), whole_lines(high)
    low = min(WARPS, (before - first) // region)
    return high + (WARPS - low) * region + room_bytes(problem, config, ranks)


def launch(
    problem: Problem, config: Config, device: Device, *, gated: bool = False
) -> Launch | None:
    """The launch of a config, or None where it is not legal. ``gated``: it ends with the
    activation."""
    ranks = config.splits * (2 if gated else 1)
    splits_fit = (
        config.splits in (1, 2, 4, 8)
        and (ranks == 1 or device.capability >= 90)
        and problem.fits_cluster(config.splits, gated)
    )
    least_slots = config.rows_each + 1 if problem.width == 32 else 1
    if (
        config.row_tiles < 1
        or config.row_tiles > 128
        or config.warps not in BLOCK_WARPS
        or config.row_warps not in (1, 2, 4, 8, 16)
        or config.row_warps > config.warps
        or config.rows_each > max_rows_each(problem.width)
        or not splits_fit
        or not least_slots <= config.slots <= MAX_SLOTS
    ):
        return None
    if config.warps == SMALL_WARPS:
        shared = small_shared_bytes(problem, config, device, ranks)
    else:
        shared = shared_bytes(problem, config, device, ranks)
    if shared is None or shared > device.shared_bytes:
        return None
    blocks = sum(math.ceil(tiles / config.row_tiles) for tiles in problem.part_tiles)
    return Launch(blocks * config.splits, shared, ranks)


def complete(problem: Problem, config: Config, device: Device) -> Config | None:
    """Fills in ``slots``: K_TILES_AHEAD, up to 80 KiB in flight a block, or what fits; None if
    nothing does."""
    least = config.rows_each + 1 if problem.width == 32 else 1
    wanted = config.slots or min(
        K_TILES_AHEAD[config.warps] // problem.depth,
        80 * 1024 // (config.warps * problem.depth * problem.record_bytes),
    )
    for slots in range(max(min(wanted, MAX_SLOTS), least), least - 1, -1):
        full = replace(config, slots=slots)
        if launch(problem, full, device) is not None:
            return full
    return None


def blocks_at_once(config: Config, device: Device) -> int:
    return device.blocks_at_once(config.splits) * (2 if config.warps == SMALL_WARPS else 1)


def candidates(problem: Problem, device: Device) -> Iterator[Config]:
    tiles = sum(problem.part_tiles)
    for splits, warps in itertools.product((1, 2, 4), BLOCK_WARPS):
        if splits > min(problem.k_tiles, 4 if device.capability >= 90 else 1):
            continue
        at_once = blocks_at_once(Config(1, 1, splits, warps=warps), device)
        for waves, row_warps in itertools.product((1, 2, 3, 4), (1, 2, 4, 8, 16)):
            row_tiles = math.ceil(tiles * splits / (at_once * waves))
            config = Config(row_tiles, row_warps, splits, warps=warps)
            if row_warps <= warps and config.rows_each <= max_rows_each(problem.width):
                yield config
    # Always legal: the smallest block.
    for row_warps in (1, 2, 4, 8, 16):
        yield Config(1, row_warps, 1)


def clocks(problem: Problem, config: Config, device: Device) -> float:
    """What a launch takes by count of its work: for choosing among configs, not for predicting.

    The constants are fitted to launches of 18 layers with 1, 2 and 8 rows of x, timed on an H200
    (``results/h200/launches.json``). Of 16 and 32 rows none was timed: ``wide`` is an estimate.
    """
    blocks = sum(math.ceil(tiles / config.row_tiles) for tiles in problem.part_tiles)
    waves = math.ceil(blocks * config.splits / blocks_at_once(config, device))
    k_tiles = math.ceil(problem.k_tiles / config.splits)
    # All tiles share a multiprocessor, and each row of warps brings x; a warp waits for its own.
    busy = k_tiles * (12 * config.row_tiles + 22 * config.row_warps)
    wide = {8: 1.0, 16: 1.4, 32: 2.3}[problem.width]
    alone = 280 * wide * config.rows_each * math.ceil(k_tiles / config.k_warps)
    ends = 740.0
    if config.warps == SMALL_WARPS:  # two of them share a multiprocessor, and start sooner
        busy, ends = 2.85 * busy, 530.0
    ends += {1: 0, 2: 500, 4: 1310}.get(config.splits, 3000)
    ends += 12.5 * problem.m * k_tiles + 240 * config.row_tiles * math.sqrt(problem.m)
    return waves * (max(busy, alone) + ends)


def heuristic(problem: Problem, device: Device) -> Config:
    legal = (complete(problem, config, device) for config in candidates(problem, device))
    best = min(
        (config for config in legal if config is not None),
        key=lambda config: clocks(problem, config, device),
        default=None,
    )
    if best is None:
        raise FluteError(
            f"no decode launch fits {device.name}",
            where="tuning.heuristic",
            why=f"{device.shared_bytes} bytes of shared memory are too few",
            fix="use the dequantizing path",
        )
    return best


def _parse_wish(text: str) -> list[int]:
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 6:
        raise FluteError(
            "cannot read a launch configuration",
            where=f"{ENVIRONMENT}={text}",
            why="it must be one to six numbers: row_tiles,row_warps,splits,slots,warps,overlap",
            fix="for example 4,2,1",
        )
    if len(numbers) > 4 and numbers[4] not in BLOCK_WARPS:
        raise FluteError(
            "cannot read a launch configuration",
            where=f"{ENVIRONMENT}={text}",
            why=f"the fifth number is warps of a block, never {numbers[4]}; overlap is the sixth",
            fix=f"write {' or '.join(map(str, BLOCK_WARPS))} there, for example 4,2,1,3,16,1",
        )
    return numbers


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def select(
    problem: Problem,
    device: Device,
    *,
    overlap: int = 0,
    environment: Mapping[str, str] = os.environ,
) -> Config:
    """The config of a problem. A wish that is not legal for it is passed over, with a warning.

    Raises FluteError when the environment variable is not one to six numbers, warps being fifth.
    """
    choices = []
    if text := environment.get(ENVIRONMENT):
        wish = _parse_wish(text)
        choices.append(wish)
        if complete(problem, Config(*wish), device) is None:
            _warn_once(
                f"flute: {ENVIRONMENT}={text} is not a legal launch for {problem}; the measured or "
                "computed choice is used there"
            )
    entries = measured(device.name, "decode")
    if len(problem.part_tiles) == 1 or all(rows % TILE_ROWS == 0 for rows in problem.parts):
        choices += [entries[key] for key in problem.keys if key in entries]
    for numbers in choices:
        config = complete(problem, Config(*numbers), device)
        if config is not None:
            return replace(config, overlap=config.overlap or overlap)
    return replace(heuristic(problem, device), overlap=overlap)
