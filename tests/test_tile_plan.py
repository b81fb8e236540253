"""Selection of tile launches: total, legal, pure. Needs no GPU."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from flute_vllm import tuning
from flute_vllm.errors import FluteError
from flute_vllm.tuning import tile as tile_plan

AMPERE = tuning.Device("a100", 108, 166912, 80)
GEFORCE = tuning.Device("rtx3090", 82, 101376, 86)
ADA = tuning.Device("l40", 142, 101376, 89)
DEVICES = [tuning.H200, AMPERE, GEFORCE, ADA]
ROWS = (1, 16, 100, 2560, 4096, 28672, 128256)
COLUMNS = (32, 160, 2048, 14336)
COUNTS = (1, 33, 64, 65, 129, 257, 1000, 1024, 1025, 100_000)


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_every_problem_gets_a_legal_launch(device, bits):
    for n, k, m, group in itertools.product(ROWS, COLUMNS, COUNTS, (32, 64, -1)):
        problem = tile_plan.Problem(n, k, m, bits, group)
        config = tile_plan.select(problem, device)
        launch = tile_plan.launch(problem, config, device)
        assert launch is not None, (problem, config)
        assert launch.shared_bytes <= device.shared_bytes
        assert launch.workspace_bytes <= tile_plan.MAX_WORKSPACE


def test_small_devices_keep_two_tiles_of_weights_and_two_steps_of_x_under_way():
    for bits, group, m in itertools.product((4, 3, 2), (32, 128), (64, 128)):
        config = tile_plan.select(tile_plan.Problem(4096, 4096, m, bits, group), ADA)
        assert config.record_slots >= 2
        assert config.x_slots >= 2


def test_launches_that_the_kernel_refuses_are_not_legal():
    problem = tile_plan.Problem(4096, 4096, 128, 4, 128)
    good = tile_plan.Config(128, 2, 3, 2)
    assert tile_plan.launch(problem, good, tuning.H200) is not None
    for change in (
        {"tokens": 32},
        {"splits": 0},
        {"splits": 33},  # more than tiles of k
        {"x_slots": 1},
        {"x_slots": 6},
        {"x_slots": 4},  # records would be requested after the x that needs them
        {"record_slots": 9},
    ):
        config = dataclasses.replace(good, **change)
        assert tile_plan.launch(problem, config, tuning.H200) is None, change
    full = dataclasses.replace(good, x_slots=5, record_slots=3)
    assert tile_plan.launch(problem, full, AMPERE) is not None
    assert tile_plan.launch(problem, full, ADA) is None


def test_choice_is_the_same_within_a_bucket():
    for low, high in itertools.pairwise((1, *tile_plan.BUCKETS)):
        chosen = {
            tile_plan.select(tile_plan.Problem(4096, 4096, m, 4, 128), AMPERE)
            for m in (low + 1, (low + high) // 2 + 1, high)
        }
        assert len(chosen) == 1


def test_narrow_layers_split_k_and_wide_ones_do_not():
    narrow = tile_plan.select(tile_plan.Problem(2560, 8192, 64, 4, 128), AMPERE)
    assert narrow.splits > 1
    wide = tile_plan.select(tile_plan.Problem(57344, 8192, 1024, 4, 128), AMPERE)
    assert wide.splits == 1


def test_parts_begin_new_blocks():
    assert tile_plan.Problem(100, 256, 1, 4, 128, (37, 63)).row_blocks == 2


def test_a_device_without_room_is_an_error():
    small = tuning.Device("small", 10, 49152, 75)
    with pytest.raises(FluteError, match="shared memory"):
        tile_plan.select(tile_plan.Problem(4096, 4096, 64, 4, 128), small)


def test_sizes_outside_the_format_are_refused():
    with pytest.raises(FluteError, match="no tile launch"):
        tile_plan.Problem(16, 33, 1, 4, 32)
