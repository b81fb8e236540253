"""Selection of decode launches: total, legal, pure. Needs no GPU."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path

import pytest

from flute_vllm import tuning
from flute_vllm.errors import FluteError
from flute_vllm.tuning import sm90
from flute_vllm.tuning.device import table_name

AMPERE = tuning.Device("a100", 108, 166912, 80)
ADA = tuning.Device("l40", 142, 101376, 89)
ROWS = (1, 16, 17, 100, 2560, 4096, 6144, 28672, 57344, 128256)
COLUMNS = (32, 160, 2048, 4096, 14336, 28672)


@pytest.mark.parametrize("device", [tuning.H200, AMPERE, ADA], ids=lambda device: device.name)
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_every_problem_gets_a_legal_launch(device, bits):
    seen = set()
    for n, k, m, group in itertools.product(ROWS, COLUMNS, range(1, 33), (32, -1)):
        problem = tuning.Problem(n, k, m, bits, group)
        config = tuning.select(problem, device, environment={})
        launch = tuning.launch(problem, config, device)
        assert launch is not None, (problem, config)
        assert launch.shared_bytes <= device.shared_bytes
        assert launch.blocks % launch.cluster == 0
        seen.add(config.warps)
    assert seen == ({8, 16} if device is tuning.H200 else {16})


def test_parts_never_share_a_block():
    problem = tuning.Problem(100, 256, 1, 4, 128, (37, 63))
    config = tuning.complete(problem, tuning.Config(8), tuning.H200)
    assert tuning.launch(problem, config, tuning.H200).blocks == 2


def test_choice_depends_on_nothing_but_its_arguments():
    problem = tuning.Problem(28672, 4096, 8, 4, 128)
    first = tuning.select(problem, tuning.H200, environment={})
    assert all(tuning.select(problem, tuning.H200, environment={}) == first for _ in range(3))


def test_environment_wins_where_it_is_legal():
    problem = tuning.Problem(4096, 4096, 8, 4, 128)
    chosen = tuning.select(problem, tuning.H200, environment={tuning.ENVIRONMENT: "4,2,2,3"})
    assert chosen == tuning.Config(4, 2, 2, 3)
    passed_over = tuning.select(problem, tuning.H200, environment={tuning.ENVIRONMENT: "999"})
    assert passed_over == tuning.select(problem, tuning.H200, environment={})


def test_shared_memory_of_small_blocks():
    """By hand, as plan_small of decode_launch.cuh: 1280 bytes before a table of 64 KiB; half of a
    multiprocessor's 228 KiB less the system's share is 115,712."""
    # A request: two records of 1056 bytes, and room to begin anywhere in a line: 18 lines.
    one = tuning.Problem(4096, 4096, 1, 4, 128)
    for slots, expected in ((2, 66816 + 16 * 2304), (3, 66816 + 21 * 2304)):
        config = tuning.Config(2, 1, 1, slots, tuning.SMALL_WARPS)
        assert tuning.launch(one, config, tuning.H200).shared_bytes == expected
    assert tuning.launch(one, tuning.Config(2, 1, 1, 4, 8), tuning.H200) is None
    two_bits = tuning.Problem(4096, 4096, 1, 2, 128)  # 1088 bytes a request: 10 lines
    config = tuning.Config(2, 1, 1, 5, 8)
    assert tuning.launch(two_bits, config, tuning.H200).shared_bytes == 66816 + 38 * 1280


def test_fewer_bits_do_not_ask_for_more_at_once():
    for warps, slots in ((8, 3), (16, 2)):
        for bits in (4, 3, 2):
            problem = tuning.Problem(4096, 4096, 1, bits, 128)
            config = tuning.complete(problem, tuning.Config(2, warps=warps), tuning.H200)
            assert config.slots == slots


def test_a_cluster_has_room_for_its_sums():
    """60 row tiles by 8 rows of x are 7,680 sums: of 30 turns of 256 threads, 15 for each block."""
    problem = tuning.Problem(4096, 4096, 8, 4, 128)
    alone, pair = (
        tuning.launch(problem, tuning.Config(60, 8, splits, 1, 8), tuning.H200) for splits in (1, 2)
    )
    assert pair.shared_bytes - alone.shared_bytes == 16 + 15 * 256 * 4


@pytest.mark.parametrize(
    ("m", "device", "config"),
    [
        (9, tuning.H200, tuning.Config(2, 1, 1, 2, 8)),  # for up to 8 rows of x
        (1, AMPERE, tuning.Config(2, 1, 1, 2, 8)),  # no launch begins early there
        (1, ADA, tuning.Config(2, 1, 1, 2, 8)),
        (1, tuning.H200, tuning.Config(16, 16, 1, 2, 8)),  # more groups than warps
        (1, tuning.H200, tuning.Config(2, 1, 1, 2, 12)),
    ],
)
def test_launches_of_small_blocks_that_are_refused(m, device, config):
    problem = tuning.Problem(4096, 4096, m, 4, 128)
    assert tuning.launch(problem, config, device) is None


def test_a_wish_from_before_warps_is_told_what_changed():
    problem = tuning.Problem(4096, 4096, 8, 4, 128)
    with pytest.raises(FluteError, match="fifth number is warps"):
        tuning.select(problem, tuning.H200, environment={tuning.ENVIRONMENT: "4,2,1,3,1"})


def test_measured_entries_are_legal():
    for key, numbers in tuning.measured("h200", "decode").items():
        n, k, width, bits, group = (*map(int, key.removesuffix(",pair").split(",")), 128)[:5]
        problem = tuning.Problem(n, k, width, bits, group, pair=key.endswith("pair"))
        assert tuning.complete(problem, tuning.Config(*numbers), tuning.H200) is not None, key


def test_problem_outside_the_kernel_is_refused():
    with pytest.raises(FluteError, match="m must be 1..32"):
        tuning.Problem(16, 32, 33, 4, 32)
    with pytest.raises(dataclasses.FrozenInstanceError):
        tuning.H200.name = "x"


def test_kernels_divide_exactly_by_the_tiles_of_a_block():
    """``divide`` of ring.cuh, for all row tiles of a block and all rows of x of each of them."""
    header = (Path(__file__).parents[1] / "kernels" / "cuda" / "ring.cuh").read_text()
    shift = int(re.search(r"kInverseShift = (\d+);", header)[1])
    dividends = range(tuning.MAX_ROWS * 128)
    for tiles in range(1, 129):
        inverse = -(-(1 << shift) // tiles)
        assert inverse * dividends[-1] < 1 << 32
        assert all(i * inverse >> shift == i // tiles for i in dividends)


def test_few_rows_take_their_own_measured_launch_else_that_of_more(monkeypatch):
    """A file without launches for two rows still serves them, and 4 bits serve the others."""
    rows = {"4096,4096,2,4": [1, 1], "4096,4096,8,4": [2, 1], "4096,4096,8,3": [3, 1]}
    monkeypatch.setattr(tuning.decode, "measured", lambda device, section: rows)

    def chosen(m, bits=4):
        problem = tuning.Problem(4096, 4096, m, bits, 128)
        return tuning.select(problem, tuning.H200, environment={}).row_tiles

    assert [chosen(m) for m in (1, 2, 3, 8)] == [1, 1, 2, 2]
    assert [chosen(m, 3) for m in (1, 8)] == [3, 3]
    assert [chosen(m, 2) for m in (1, 8)] == [1, 2]
    rows["4096,4096,2,4"] = [1, 1, 3]  # no number of blocks that can split k: not legal
    assert [chosen(m) for m in (1, 8)] == [2, 2]
    del rows["4096,4096,2,4"]
    assert [chosen(m) for m in (1, 8)] == [2, 2]


@pytest.mark.parametrize(("group", "pair"), [(64, False), (32, False), (128, True), (64, True)])
def test_groups_and_tables_take_their_own_measured_launch_else_the_common_one(
    group, pair, monkeypatch
):
    """A file of groups of 128 and single values, as the one in the package, serves all of them."""
    rows = {"4096,4096,2,4": [1, 1], "4096,4096,8,4": [2, 1]}
    monkeypatch.setattr(tuning.decode, "measured", lambda device, section: rows)

    def chosen(m, *record):
        problem = tuning.Problem(4096, 4096, m, 4, *(record or (group, (), pair)))
        return tuning.select(problem, tuning.H200, environment={}).row_tiles

    assert [chosen(m) for m in (1, 8)] == [1, 2]
    rows[f"4096,4096,8,4,{group}" + ",pair" * pair] = [3, 1]
    assert [chosen(m) for m in (1, 8)] == [1, 3]
    assert [chosen(8, *other) for other in ((128,), (256,), (-1,))] == [2, 2, 2]


@pytest.mark.parametrize(
    ("gpu", "multiprocessors", "file"),
    [
        ("NVIDIA H200", 132, "h200"),
        ("NVIDIA H200 NVL", 132, "h200"),
        ("NVIDIA GH200 480GB", 132, "NVIDIA GH200 480GB"),
        ("NVIDIA H200 MIG 1g.18gb", 16, "NVIDIA H200 MIG 1g.18gb"),
    ],
)
def test_measured_launches_are_of_the_whole_gpu_only(gpu, multiprocessors, file):
    assert table_name(gpu, multiprocessors) == file


def test_more_blocks_of_rows_than_cuda_takes_are_refused():
    problem = sm90.Problem(64 * 65536, 256, 16, 4, 128)
    small, large = (sm90.Config(16, 4, tiles, 4, overlap=0) for tiles in (1, 8))
    assert sm90.launch(problem, small, tuning.H200) is None
    assert sm90.launch(problem, sm90.complete(problem, large, tuning.H200), tuning.H200)
