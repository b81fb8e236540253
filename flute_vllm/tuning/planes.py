"""How a launch of the bit-plane kernel is cut (``kernels/cuda/planes.cuh``).

That kernel takes the decode kernel's work for one row of x at 2 bits, with single values in the
table and groups of 128 and longer, on Hopper. Its configs are the decode kernel's, but its blocks
have 32 warps, and no table in shared memory. Order of precedence: a measured entry of
``configs/tuning/<device>.json``, section ``planes``, the heuristic.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

from flute_vllm.tuning.decode import BARRIER_BYTES, MAX_SLOTS, Config, Launch, room_bytes
from flute_vllm.tuning.device import TILE_K, TILE_ROWS, Device, measured
from flute_vllm.tuning.problem import ProblemBase
from flute_vllm.tuning.shared_memory import slot_stride, whole_lines

WARPS = 32
ROW_WARPS = (1, 2, 4, 8, 16, 32)
DEPTH = 4  # k tiles of one request
X_BYTES = 528  # of a k tile, in shared memory
PARTIAL_BYTES = 20 * 4  # sums of a row tile


class Problem(ProblemBase):
    KERNEL, MOST_ROWS = "bit-plane", 1

    @property
    def slot_stride(self) -> int:
        return slot_stride(DEPTH * self.record_bytes, self.record_bytes)


def takes(problem: Problem, device: Device) -> bool:
    """Whether the kernel is made for such a layer and device."""
    whole_tiles = problem.group_size < 0 or problem.group_size >= TILE_K
    return problem.bits == 2 and whole_tiles and not problem.pair and device.capability == 90


def shared_bytes(problem: Problem, config: Config, ranks: int = 1) -> int:
    """As plan_planes in decode_launch.cuh. ``ranks``: blocks of a cluster."""
    size = whole_lines(WARPS * BARRIER_BYTES)
    size += math.ceil(problem.k_tiles / config.splits) * X_BYTES
    size = whole_lines(size + WARPS * config.rows_each * PARTIAL_BYTES)
    return size + WARPS * config.slots * problem.slot_stride + room_bytes(problem, config, ranks)


def launch(
    problem: Problem, config: Config, device: Device, *, gated: bool = False
) -> Launch | None:
    """The launch of a config, or None where it is not legal. ``gated``: it ends with the
    activation."""
    ranks = config.splits * (2 if gated else 1)
    if (
        not takes(problem, device)
        or not 1 <= config.row_tiles <= 128
        or config.warps != WARPS
        or config.row_warps not in ROW_WARPS
        or config.splits not in (1, 2, 4, 8)
        or not problem.fits_cluster(config.splits, gated)
        or not 1 <= config.slots <= MAX_SLOTS
    ):
        return None
    shared = shared_bytes(problem, config, ranks)
    if shared > device.shared_bytes:
        return None
    blocks = sum(math.ceil(tiles / config.row_tiles) for tiles in problem.part_tiles)
    return Launch(blocks * config.splits, shared, ranks)


def complete(problem: Problem, config: Config, device: Device) -> Config | None:
    """Fills in ``slots``: two, or what fits; None if nothing does."""
    for slots in range(config.slots or 2, 0, -1):
        full = replace(config, slots=slots)
        if launch(problem, full, device) is not None:
            return full
    return None


def candidates(problem: Problem, device: Device) -> Iterator[Config]:
    tiles = sum(problem.part_tiles)
    for splits, waves in itertools.product((1, 2, 4), (1, 2, 3)):
        if splits > problem.k_tiles:
            continue
        row_tiles = math.ceil(tiles * splits / (device.blocks_at_once(splits) * waves))
        for row_warps in ROW_WARPS:
            yield Config(row_tiles, row_warps, splits, warps=WARPS)
    for splits in (1, 2, 4, 8):  # the smallest blocks
        yield Config(1, 1, splits, warps=WARPS)


def clocks(problem: Problem, config: Config, device: Device) -> float:
    """Of a launch, as far as its shape decides. The constants are fitted to launches of 18 layers,
    timed on an H200 (``results/h200/launches.json``), when x took twice the instructions."""
    blocks = sum(math.ceil(tiles / config.row_tiles) for tiles in problem.part_tiles)
    waves = math.ceil(blocks * config.splits / device.blocks_at_once(config.splits))
    k_tiles = math.ceil(problem.k_tiles / config.splits)
    # A scheduler's share: tiles, ends of row tiles, planes of 128 columns of x to make.
    busy = (config.row_tiles * (31 * k_tiles + 190 * config.k_warps) + 180 * k_tiles) / 4
    steps = config.rows_each * math.ceil(k_tiles / config.k_warps / DEPTH)
    ends = 930 + 60 * config.row_tiles + {1: 0, 2: 690, 4: 730, 8: 3000}[config.splits]
    if problem.has_two_halves and config.splits > 1:
        ends += 2300  # the activation, which a launch that splits no k may end with
    return waves * (max(busy, 1050 * steps) + ends)


def measured_config(problem: Problem, device: Device) -> Config | None:
    """That of the device's table, where it has a legal one."""
    if any(rows % TILE_ROWS for rows in problem.parts):
        return None
    numbers = measured(device.name, "planes").get(f"{problem.n},{problem.k}")
    return complete(problem, Config(*numbers), device) if numbers else None


def select(problem: Problem, device: Device, *, overlap: int = 0) -> Config | None:
    """The config of a problem; None where the kernel does not take it, or x is too long."""
    if not takes(problem, device):
        return None
    best = measured_config(problem, device)
    if best is None:
        legal = (complete(problem, config, device) for config in candidates(problem, device))
        best = min(
            (config for config in legal if config is not None),
            key=lambda config: clocks(problem, config, device),
            default=None,
        )
    return replace(best, overlap=best.overlap or overlap) if best else None
