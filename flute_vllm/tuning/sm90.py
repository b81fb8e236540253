"""How a launch of the Hopper kernels is cut: problem -> config -> launch, pure functions.

Two kernels compute ``y[M, N] = x[M, K] w[N, K]^T`` with wgmma. ``kernels/cuda/sm90_gemm.cuh`` takes
16 to 128 rows of x a block (``columns``), may split k, and needs 9 rows or more to be of use;
``sm90_prefill.cuh`` takes 192 or 256, for tables of single values. One config describes both.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from flute_vllm.errors import FluteError
from flute_vllm.tuning.device import SHARED_RESERVED, TILE_K, TILE_ROWS, Device
from flute_vllm.tuning.problem import ProblemBase
from flute_vllm.tuning.shared_memory import CLUSTER_BARRIER_BYTES, cluster_room

WARPGROUPS = {16: (8, 4), 32: (8, 4), 64: (4,), 128: (4,)}  # of a block, compiled for columns
COLUMNS = tuple(WARPGROUPS)
PREFILL_COLUMNS = (192, 256)
PREFILL_TILES = 8  # 16-row tiles of a block
PREFILL_GROUPS = 2  # warpgroups of a block that multiply
MAX_STAGES, MAX_X_STAGES = 16, 8
MAX_GRID_Y = 65535  # blocks of a launch that lie in rows, by CUDA
TABLE_BYTES = TABLE_OFFSET = 65536
PREFILL_STAGES = 8  # of weights and of x, at most
PREFILL_BARRIER_BYTES = 1024
PREFILL_SIDE = 8  # tiles of x side by side, at most
PREFILL_STAGED_BYTES = 2 * 32 * 144  # sums of a warpgroup on their way out
SPREAD = 0  # splits: k of the tiles that fill no round is divided evenly among all blocks
IN_FLIGHT = 70_000  # bytes of weights; more gains nothing, from 110,000 on it costs bandwidth


class Problem(ProblemBase):
    KERNEL = "Hopper"

    def slot_bytes(self, config: Config) -> int:
        """Of a request of weights."""
        return config.depth * self.record_bytes


@dataclass(frozen=True)
class Config:
    """``FluteSm90Config``, field by field. In the prefill kernel ``splits`` are the blocks that
    share a tile of y in the last round, or SPREAD, ``stages`` the requests of weights,
    ``x_stages`` halves of a k tile of x; ``warpgroups`` are the 2 that multiply, and
    ``row_groups`` 2."""

    columns: int
    warpgroups: int
    row_tiles: int
    row_groups: int = 4
    splits: int = 1
    stages: int = 0  # 0: chosen here, in `complete`
    x_stages: int = 0  # likewise
    overlap: int = 0

    @property
    def prefill(self) -> bool:
        return self.warpgroups == PREFILL_GROUPS and self.columns in PREFILL_COLUMNS

    @property
    def compiled(self) -> bool:
        return self.prefill or self.warpgroups in WARPGROUPS.get(self.columns, ())

    @property
    def depth(self) -> int:
        """k tiles of a request of weights."""
        return 1 if self.warpgroups == 8 else 2

    @property
    def k_groups(self) -> int:
        return self.warpgroups // self.row_groups

    @property
    def barrier_bytes(self) -> int:
        return self.warpgroups * (4 * MAX_STAGES * 8 + MAX_X_STAGES * 16)

    @property
    def numbers(self) -> tuple[int, ...]:
        return (
            self.columns, self.warpgroups, self.row_tiles, self.row_groups, self.splits,
            self.stages, self.x_stages, self.overlap,
        )  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """The launch that the C++ side makes of a config; here to be checked without a GPU."""

    blocks: int
    shared_bytes: int
    cluster: int
    workspace_bytes: int = 0


def _blocks_of_rows(problem: Problem, config: Config) -> int:
    return sum(math.ceil(tiles / config.row_tiles) for tiles in problem.part_tiles)


def _prefill_launch(problem: Problem, config: Config, device: Device) -> Launch | None:
    x_bytes = config.x_stages * config.columns * TILE_K
    rings = 4 * config.stages * problem.slot_bytes(config)
    total = PREFILL_BARRIER_BYTES + x_bytes + PREFILL_GROUPS * (PREFILL_STAGED_BYTES + rings)
    if (
        problem.pair
        or config.row_tiles != PREFILL_TILES
        or config.row_groups != PREFILL_GROUPS
        or config.splits not in (SPREAD, 1, 2)
        or not 1 <= config.stages <= PREFILL_STAGES
        or not 3 <= config.x_stages <= PREFILL_STAGES
        or total > device.shared_bytes
    ):
        return None
    whole, left, cluster = _prefill_rounds(problem, config, device)
    if config.splits == SPREAD:
        sums = PREFILL_GROUPS * 64 * config.columns * 4  # bytes of a block's
        return Launch(_spread_blocks(problem, config, device), total, 1,
                      device.multiprocessors * sums)  # fmt: skip
    blocks = device.blocks_at_once(cluster)
    return Launch(blocks if whole else min(blocks, left * cluster), total, cluster)


def _prefill_rounds(problem: Problem, config: Config, device: Device) -> tuple[int, int, int]:
    """Rounds of all blocks, tiles of y left for the last one, blocks that share one of these."""
    tiles = _blocks_of_rows(problem, config) * math.ceil(problem.m / config.columns)
    if config.splits == SPREAD:
        return *divmod(tiles, _spread_blocks(problem, config, device)), 1
    for cluster in (config.splits, 1):
        whole, left = divmod(tiles, device.blocks_at_once(cluster))
        if cluster > 1 and 0 < left <= device.blocks_at_once(cluster) // cluster:
            break
    return whole, left, cluster


def _spread_blocks(problem: Problem, config: Config, device: Device) -> int:
    """Those with the same rows of w stay together where all bands of tiles are equally wide."""
    x_tiles = math.ceil(problem.m / config.columns)
    side = math.ceil(x_tiles / math.ceil(x_tiles / PREFILL_SIDE))
    members = side if x_tiles % side == 0 and side <= device.multiprocessors else 1
    return device.multiprocessors // members * members


def launch(
    problem: Problem, config: Config, device: Device, *, gated: bool = False
) -> Launch | None:
    """The launch of a config, or None where it is not legal. As sm90_launch.cuh. ``gated``: it ends
    with the activation."""
    if device.capability != 90 or (gated and config.prefill):
        return None
    if config.prefill:
        return _prefill_launch(problem, config, device)
    if (
        not config.compiled
        or not problem.fits_cluster(config.splits, gated)
        or config.row_tiles < 1
        or config.row_groups not in (1, 2, 4, 8)
        or config.row_groups > config.warpgroups
        or config.splits not in (1, 2, 4, 8)
        or ((config.row_groups < config.warpgroups or config.splits > 1 or gated)
            and config.row_tiles > 4 * config.row_groups)
        or config.overlap < 0
        or not 1 <= config.stages <= MAX_STAGES
        or not 2 <= config.x_stages <= MAX_X_STAGES
    ):  # fmt: skip
        return None
    region = config.stages * problem.slot_bytes(config)
    before = TABLE_OFFSET - SHARED_RESERVED
    high = before + TABLE_BYTES + config.k_groups * config.x_stages * config.columns * TILE_K * 2
    warps = 4 * config.warpgroups
    low = min(warps, (before - config.barrier_bytes) // region)
    ranks = config.splits * (2 if gated else 1)
    quads = min(config.columns, problem.m) * config.row_tiles * (TILE_ROWS // 4)
    sums = config.barrier_bytes + warps * config.columns * (TILE_ROWS + 4) * 4
    sums += cluster_room(quads, 32 * warps, 16, ranks)
    total = max(high + (warps - low) * region, sums)
    total += CLUSTER_BARRIER_BYTES if ranks > 1 else 0
    if total > device.shared_bytes:
        return None
    rows = _blocks_of_rows(problem, config)
    if (rows // 2 if gated else rows) > MAX_GRID_Y:
        return None
    x_tiles = math.ceil(problem.m / config.columns)
    return Launch(rows * x_tiles * config.splits, total, ranks)


def complete(problem: Problem, config: Config, device: Device) -> Config | None:
    """Fills in ``stages`` and ``x_stages`` where they are 0; None if nothing fits.

    Two requests of weights, up to about 70 KB, as four of fewer bits are up to 10 % slower
    (``results/h200/launches.json``); then as much of x as fits.
    """
    if not config.compiled:
        return None
    if config.prefill:
        wanted = (config.stages,) if config.stages else (2, 3, 1)
        x_wanted = (config.x_stages,) if config.x_stages else (8, 7, 6, 5, 4, 3)
    else:
        most = IN_FLIGHT // (4 * config.warpgroups * problem.slot_bytes(config))
        wanted = (config.stages,) if config.stages else tuple(range(min(most, 2) or 1, 0, -1))
        x_wanted = (config.x_stages,) if config.x_stages else (8, 6, 4, 3, 2)
    for stages in wanted:
        for x_stages in x_wanted:
            full = replace(config, stages=stages, x_stages=x_stages)
            if launch(problem, full, device) is not None:
                return full
    return None


def candidates(problem: Problem, device: Device) -> Iterator[Config]:
    """Configs worth a look, incomplete: blocks that fill the device a whole number of times."""
    tiles = sum(problem.part_tiles)
    if problem.m > 128:
        for columns, splits in itertools.product(PREFILL_COLUMNS, (SPREAD, 1, 2)):
            config = Config(columns, PREFILL_GROUPS, PREFILL_TILES, PREFILL_GROUPS, splits)
            _, left, cluster = _prefill_rounds(problem, config, device)
            if (left > 0) if splits == SPREAD else splits in (1, cluster):
                yield config
    fitting = [c for c in COLUMNS if c < 2 * problem.m] or [COLUMNS[0]]
    for columns in fitting[-2:]:
        x_tiles = math.ceil(problem.m / columns)
        for splits in (1, 2, 4, 8):
            if splits > problem.k_tiles:
                continue
            for waves in (1, 2, 3, 4):
                exact = math.ceil(
                    tiles * splits * x_tiles / (max(1, device.blocks_at_once(splits)) * waves)
                )
                for row_tiles in {exact, 4 * math.ceil(exact / 4)}:
                    for warpgroups, row_groups in _groups(columns, row_tiles):
                        config = Config(columns, warpgroups, row_tiles, row_groups, splits)
                        whole = config.k_groups == 1 and splits == 1
                        if whole or row_tiles <= 4 * row_groups:
                            yield config
        yield Config(columns, 4, 4)  # always legal


def _groups(columns: int, row_tiles: int) -> Iterator[tuple[int, int]]:
    """Warpgroups and row groups worth a look: not eight of which half have no rows, as four do the
    same sooner."""
    for warpgroups, row_groups in itertools.product(WARPGROUPS[columns], (1, 2, 4, 8)):
        idle = warpgroups == 8 and 2 * math.ceil(row_tiles / 4) <= row_groups
        if row_groups <= warpgroups and not idle:
            yield warpgroups, row_groups


def clocks(problem: Problem, config: Config, device: Device) -> float:
    """What a launch takes by count of its work: for choosing among configs, not for predicting.

    The constants are fitted to launches of 18 layers with 16 to 2048 rows of x, timed on an H200
    (``results/h200/launches.json``); ``flute-vllm tune`` measures instead.
    """
    if config.prefill:
        whole, left, cluster = _prefill_rounds(problem, config, device)
        tile = problem.k_tiles * (793 + 4.73 * config.columns)
        if config.splits == SPREAD:
            blocks = _spread_blocks(problem, config, device)
            pieces = blocks / left if left and not whole else 1  # of a tile; one block adds them up
            return (whole + left / blocks) * tile + 27100 + 2810 * max(0.0, pieces - 2)
        return (whole + (left > 0) / cluster) * tile + 5320 + (8230 if cluster > 1 else 0)
    blocks = _blocks_of_rows(problem, config) * math.ceil(problem.m / config.columns)
    waves = math.ceil(blocks * config.splits / device.blocks_at_once(config.splits))
    k_each = math.ceil(problem.k_tiles / config.splits / config.k_groups)
    tiles64 = math.ceil(config.row_tiles / 4)  # of 64 rows
    rounds = math.ceil(tiles64 / config.row_groups)
    tile, alone = _warpgroup_clocks(config)
    busy = tiles64 * config.k_groups * k_each * tile
    alone *= rounds * k_each
    ends = 2780 + 2 * config.columns
    # Blocks of a cluster send their sums; of more than two the GPU runs too few at once to use all
    # multiprocessors.
    if config.splits > 1:
        ends += 1530 if config.splits == 2 else 1810 * math.log2(config.splits)
        ends += 2.06 * config.columns * config.row_tiles
    return waves * (max(busy, alone) + ends)


def _warpgroup_clocks(config: Config) -> tuple[float, float]:
    """Of a 64 x 128 tile where all warpgroups are busy; of a warpgroup's, where few are.

    Eight gain a little where they are busy, but nothing where all of them split k, each with x of
    its own. With four of the eight busy a launch took longer than with only four, which overlap the
    halves of a tile (M = 16 and 32 of twelve layers, results/h200/kernels.json at 9c3138a and
    eafafd3).
    """
    tile, alone = 250 + 3.3 * config.columns, 615 + 7.17 * config.columns
    if config.warpgroups == 8:
        alone = 1190 + 11.1 * config.columns
        if config.row_groups > 1:
            tile = 214 + 3.91 * config.columns
    return tile, alone


def select(problem: Problem, device: Device) -> Config:
    """The best config by count. Raises FluteError where none is legal."""
    legal = {complete(problem, config, device) for config in candidates(problem, device)} - {None}
    if not legal:
        raise FluteError(
            f"no Hopper launch fits {device.name}",
            where="tuning.sm90.select",
            why=f"{device.shared_bytes} bytes of shared memory are too few",
            fix="use the dequantizing path",
        )
    return min(legal, key=lambda config: (clocks(problem, config, device), config.numbers))
