"""Which kernel runs with how many rows: total, legal, pure, for any layer and device. No GPU."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flute_vllm import tuning
from flute_vllm.errors import FluteError
from flute_vllm.tuning import sm90

AMPERE = tuning.Device("a100", 108, 166912, 80)
ADA = tuning.Device("l40s", 142, 101376, 89)
# Newer generations: with a library built for them, and with PTX of 8.9 as setup.py has it.
BLACKWELL = tuning.Device("b200", 148, 232448, 100)
BLACKWELL_PTX = tuning.Device("b200", 148, 232448, 89)
GEFORCE_PTX = tuning.Device("rtx5090", 170, 101376, 89)
DEVICES = (tuning.H200, AMPERE, ADA, BLACKWELL, BLACKWELL_PTX, GEFORCE_PTX)
layers = st.tuples(
    st.integers(1, 70000),
    st.integers(1, 1000).map(lambda units: 32 * units),
    st.sampled_from((2, 3, 4)),
    st.sampled_from((32, 64, 128, 256, -1)),
)


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
@given(layer=layers)
@settings(max_examples=25, deadline=None)
def test_every_number_of_rows_has_a_legal_launch(device, layer):
    n, k, bits, group_size = layer
    found = tuning.entries(n, k, bits, group_size, (n,), device, environment={})
    limits = [entry.largest_m for entry in found]
    assert limits[-1] == 0
    assert limits[:-1] == sorted(set(limits[:-1]))
    for entry in found:
        m = entry.largest_m or 20000
        if entry.kernel == tuning.DECODE:
            problem = tuning.Problem(n, k, m, bits, group_size)
            assert tuning.launch(problem, tuning.Config(*entry.config), device)
        elif entry.kernel == tuning.PLANES:
            assert (m, bits, device.capability) == (1, 2, 90)
            problem = tuning.planes.Problem(n, k, m, bits, group_size)
            assert tuning.planes.launch(problem, tuning.Config(*entry.config), device)
        elif entry.kernel == tuning.SM90:
            assert device.capability == 90
            problem = sm90.Problem(n, k, m, bits, group_size)
            assert sm90.launch(problem, sm90.Config(*entry.config), device)
        elif entry.kernel == tuning.TILE:
            problem = tuning.tile.Problem(n, k, m, bits, group_size)
            assert tuning.tile.launch(problem, tuning.tile.Config(*entry.config), device)


def test_plan_is_the_entries_as_numbers():
    found = tuning.entries(4096, 4096, 4, 128, (4096,), tuning.H200, overlap=1)
    plan = tuning.plan(4096, 4096, 4, 128, (4096,), tuning.H200, overlap=1)
    assert len(plan) == tuning.ENTRY_NUMBERS * len(found)
    for i, entry in enumerate(found):
        numbers = plan[i * tuning.ENTRY_NUMBERS : (i + 1) * tuning.ENTRY_NUMBERS]
        assert numbers[:2] == [entry.largest_m, entry.kernel]
        assert tuple(numbers[2 : 2 + len(entry.config)]) == entry.config
    parts = tuning.by_rows(plan)
    for m in (*range(1, 600), 767, 768, 769, 1024, 1025, 4096, 8192, 8193, 10**6):
        assert tuning.single(parts, m) == [0, *tuning.entry_of(found, m).numbers[1:]]
    assert tuning.entry_of(found, 1).kernel == tuning.DECODE
    assert tuning.entry_of(found, 33).largest_m == 48
    assert tuning.entry_of(found, 10**6).largest_m == 0


@pytest.mark.parametrize(
    ("bits", "group_size", "pair", "device", "taken"),
    [
        (2, 128, False, tuning.H200, True), (2, -1, False, tuning.H200, True),
        (3, 128, False, tuning.H200, False), (2, 64, False, tuning.H200, False),
        (2, 128, True, tuning.H200, False), (2, 128, False, AMPERE, False),
    ],
)  # fmt: skip
def test_bit_planes_serve_one_row_at_two_bits(bits, group_size, pair, device, taken):
    layer = (4096, 4096, bits, group_size, (4096,), device)
    found = tuning.entries(*layer, pair=pair, overlap=1, environment={})
    assert (found[0].kernel == tuning.PLANES) == taken
    assert tuning.entry_of(found, 2).kernel == tuning.DECODE
    if taken:
        assert found[0].largest_m == 1
        assert found[0].config[-1] == 1
    wish = {tuning.ENVIRONMENT: "2,1,1"}
    assert tuning.entries(*layer, pair=pair, environment=wish)[0].kernel == tuning.DECODE


@pytest.mark.parametrize("layer", [(4096, 4096, 2, 128), (4096, 4096, 4, 64)])
def test_an_empty_environment_variable_is_unset(layer):
    """It left one row at 2 bits, and 9 to 32 rows, to the decode kernel."""
    plans = [
        tuning.entries(*layer, (4096,), tuning.H200, overlap=1, environment=environment)
        for environment in ({}, {tuning.ENVIRONMENT: ""})
    ]
    assert plans[0] == plans[1]


def test_other_groups_and_pairs_take_their_own_measured_launch_else_the_common_one(monkeypatch):
    rows = {"4096,4096,64,4": [tuning.SM90, 64, 4, 4, 4, 1, 1, 2]}
    module = sys.modules["flute_vllm.tuning.plan"]  # the package's name is the function's
    monkeypatch.setattr(module, "measured", lambda name, section: {"sm90": rows}.get(section, {}))

    def why(group, pair=False, bits=4):
        layer = (4096, 4096, bits, group, (4096,), tuning.H200)
        return tuning.entry_of(tuning.entries(*layer, pair=pair, environment={}), 64).why

    common = "measured: configs/tuning/h200.json, entry 4096,4096,64,4"
    kinds = [(64, False), (32, False), (128, True), (64, True)]
    assert {why(*kind, bits) for kind in kinds for bits in (2, 3, 4)} == {common}
    for group, pair in kinds:
        ending = f",{group}" + ",pair" * pair
        rows[f"4096,4096,64,4{ending}"] = rows["4096,4096,64,4"]
        assert {why(group, pair, bits) for bits in (3, 4)} == {common + ending}
    assert {why(group) for group in (128, 256, -1)} == {common}
    rows["4096,4096,64,3"] = rows["4096,4096,64,4"]  # rather the bits than the groups
    assert why(64, bits=3).endswith("entry 4096,4096,64,3")


def test_bit_planes_are_left_where_x_is_too_long():
    """Eight blocks have room for planes of some 238,000 columns."""
    problem = tuning.planes.Problem(16, 320000, 1, 2, -1)
    assert tuning.planes.select(problem, tuning.H200) is None
    found = tuning.entries(16, 320000, 2, -1, (16,), tuning.H200, environment={})
    assert found[0].kernel == tuning.DECODE


def test_measured_entries_are_legal():
    for key, numbers in tuning.measured("h200", "planes").items():
        n, k = map(int, key.split(","))
        problem = tuning.planes.Problem(n, k, 1, 2, 128)
        assert tuning.planes.launch(problem, tuning.Config(*numbers), tuning.H200), key
    for key, numbers in tuning.measured("h200", "sm90").items():
        n, k, m, bits, group = (*map(int, key.removesuffix(",pair").split(",")), 128)[:5]
        if numbers[0] == tuning.SM90:
            problem = sm90.Problem(n, k, m, bits, group, pair=key.endswith("pair"))
            config = sm90.Config(*numbers[1:])
            assert sm90.complete(problem, config, tuning.H200), key


@pytest.mark.parametrize("columns", [8, *sm90.COLUMNS, *sm90.PREFILL_COLUMNS, 320])
def test_only_compiled_warpgroups_are_legal(columns):
    problem = sm90.Problem(4096, 4096, 256, 4, 128)
    compiled = {16: {4, 8}, 32: {4, 8}, 64: {4}, 128: {4}, 192: {2}, 256: {2}}
    for warpgroups in range(-1, 17):
        tiles, groups = (8, 2) if columns >= 192 else (4, 4)
        config = sm90.Config(columns, warpgroups, tiles, groups)
        full = sm90.complete(problem, config, tuning.H200)
        assert (full is not None) == (warpgroups in compiled.get(columns, ())), warpgroups
        numbers = (columns, warpgroups, tiles, groups, 1, 1, 3)
        legal = sm90.launch(problem, sm90.Config(*numbers), tuning.H200)
        assert (legal is not None) == (full is not None), warpgroups


def test_shared_memory_of_four_and_eight_warpgroups():
    """By hand: a block's table ends at 130,048 bytes; x of each k group and the rings of the warps
    that do not fit below the table follow."""
    problem = sm90.Problem(4096, 4096, 16, 4, 128)
    record = 16 * 128 // 2 + 32
    four = sm90.launch(problem, sm90.Config(16, 4, 4, 1, 1, 2, 4), tuning.H200)
    barriers = 16 * 16 * 8 + 4 * 8 * 16
    low = (64512 - barriers) // (2 * 2 * record)
    assert four.shared_bytes == 130048 + 4 * 4 * 16 * 256 + (16 - low) * 2 * 2 * record
    eight = sm90.launch(problem, sm90.Config(16, 8, 4, 1, 1, 2, 2), tuning.H200)
    low = (64512 - 2 * barriers) // (2 * record)
    assert eight.shared_bytes == 130048 + 8 * 2 * 16 * 256 + (32 - low) * 2 * record
    assert sm90.launch(problem, sm90.Config(16, 4, 4, 8, 1, 2, 2), tuning.H200) is None
    assert sm90.launch(problem, sm90.Config(16, 8, 4, 8, 1, 2, 2), tuning.H200)


@given(
    layer=layers,
    m=st.integers(1, 5000),
    numbers=st.tuples(
        st.sampled_from((16, 32, 64, 128, 192, 256)),
        st.sampled_from((0, 1, 2, 4, 8)),
        *(st.integers(-1, 40) for _ in range(6)),
    ),
)
@settings(max_examples=200, deadline=None)
def test_any_numbers_make_a_launch_or_none(layer, m, numbers):
    problem, config = sm90.Problem(layer[0], layer[1], m, *layer[2:]), sm90.Config(*numbers)
    found = sm90.launch(problem, config, tuning.H200)
    assert found is None or found.shared_bytes <= tuning.H200.shared_bytes
    full = sm90.complete(problem, config, tuning.H200)
    assert full is None or sm90.launch(problem, full, tuning.H200)


@pytest.mark.parametrize("m", [16, 32])
def test_candidates_hold_four_and_eight_warpgroups(m):
    for n, k in ((6144, 4096), (2560, 8192), (57344, 8192), (512, 512)):
        problem = sm90.Problem(n, k, m, 4, 128)
        found = set(sm90.candidates(problem, tuning.H200))
        assert {config.warpgroups for config in found} == {4, 8}
        assert len(found) <= 150
        for config in found:  # none of which half have nothing to do
            assert config.warpgroups == 4 or 2 * math.ceil(config.row_tiles / 4) > config.row_groups


def test_few_row_tiles_take_four_warpgroups_and_many_take_eight():
    for m in (16, 32):
        for n, k in ((6144, 4096), (4096, 4096), (2560, 8192), (8192, 2048)):
            assert sm90.select(sm90.Problem(n, k, m, 4, 128), tuning.H200).warpgroups == 4
        for n, k in ((57344, 8192), (28672, 4096), (10240, 8192)):
            assert sm90.select(sm90.Problem(n, k, m, 4, 128), tuning.H200).warpgroups == 8


@pytest.mark.parametrize("m", [129, 256, 512, 1000, 4096])
def test_last_round_is_shared_only_where_each_tile_finds_a_cluster(m):
    problem = sm90.Problem(4096, 4096, m, 4, 128)
    config = sm90.complete(problem, sm90.Config(256, 2, 8, 2, 2), tuning.H200)
    launch = sm90.launch(problem, config, tuning.H200)
    tiles = 32 * math.ceil(m / 256)
    left = tiles % 132
    assert launch.cluster == (2 if 0 < left <= 66 else 1)
    assert launch.blocks == (132 if tiles >= 132 else tiles * launch.cluster)


def test_spread_launches_fill_the_device_and_name_their_workspace():
    problem = sm90.Problem(10240, 8192, 256, 4, 128)
    config = sm90.complete(problem, sm90.Config(256, 2, 8, 2, sm90.SPREAD), tuning.H200)
    launch = sm90.launch(problem, config, tuning.H200)
    assert (launch.blocks, launch.cluster) == (132, 1)
    assert launch.workspace_bytes == 132 * 128 * 256 * 4  # 17 MB, fp32 sums of a block's tile
    assert sm90.launch(problem, sm90.Config(128, 4, 8, 4, sm90.SPREAD, 2, 2), tuning.H200) is None
    # Blocks with the same rows of w stay together: 8 tiles of x side by side, 16 times 8 blocks.
    for m, blocks in ((512, 132), (1280, 130), (1792, 126), (2048, 128), (2300, 132)):
        wide = sm90.Problem(10240, 8192, m, 4, 128)
        assert sm90.launch(wide, config, tuning.H200).blocks == blocks
    # 80 tiles leave multiprocessors idle, 132 do not.
    for n, worth in ((10240, True), (132 * 128, False)):
        found = set(sm90.candidates(sm90.Problem(n, 8192, 256, 4, 128), tuning.H200))
        assert worth == any(c.columns == 256 and c.splits == sm90.SPREAD for c in found)


def test_the_plan_says_what_memory_a_call_takes():
    shape = (10240, 8192, 256, 4, 128, (10240,), False)
    spread = tuning.Entry(256, tuning.SM90, (256, 2, 8, 2, sm90.SPREAD, 2, 5, 1))
    assert tuning.workspace_bytes(spread, shape, tuning.H200) == 132 * 128 * 256 * 4
    dense = tuning.Entry(0, tuning.DENSE)
    assert tuning.workspace_bytes(dense, shape, tuning.H200) == 2 * 10240 * 8192
    for entry in tuning.entries(10240, 8192, 4, 128, (10240,), tuning.H200, environment={}):
        m = entry.largest_m or 10000
        used = tuning.workspace_bytes(entry, (10240, 8192, m, *shape[3:]), tuning.H200)
        assert 0 <= used <= 256 << 20
        assert entry.kernel != tuning.DECODE or used == 0
    ampere = replace(tuning.H200, name="a100", capability=80, multiprocessors=108)
    entry = tuning.Entry(100, tuning.TILE, (128, 3, 3, 3))
    assert tuning.workspace_bytes(entry, (512, 8192, 100, *shape[3:]), ampere) == 3 * 100 * 512 * 4


def test_pair_tables_never_get_the_prefill_kernel():
    found = tuning.entries(4096, 4096, 4, 128, (4096,), tuning.H200, pair=True, environment={})
    hopper = [e for e in found if e.kernel == tuning.SM90]
    assert hopper
    assert not any(sm90.Config(*e.config).prefill for e in hopper)
    scalar = tuning.entries(4096, 4096, 4, 128, (4096,), tuning.H200, environment={})
    assert any(e.kernel == tuning.SM90 and sm90.Config(*e.config).prefill for e in scalar)
    problem = sm90.Problem(4096, 4096, 512, 4, 128, pair=True)
    assert sm90.complete(problem, sm90.Config(256, 2, 8, 2), tuning.H200) is None


def test_blocks_cover_all_rows():
    problem = sm90.Problem(5000, 4096, 100, 4, 128, (3000, 1000, 1000))
    config = sm90.complete(problem, sm90.Config(128, 4, 12), tuning.H200)
    launch = sm90.launch(problem, config, tuning.H200)
    assert launch.blocks == sum(math.ceil(rows / 192) for rows in problem.parts)


def test_what_the_kernels_do_not_take_is_refused():
    with pytest.raises(FluteError, match="no Hopper launch"):
        sm90.Problem(16, 33, 1, 4, 32)
    assert (
        sm90.launch(sm90.Problem(16, 32, 1, 4, 32), sm90.Config(16, 4, 4, 1, 1, 1, 2), AMPERE)
        is None
    )
    small = tuning.Device("small", 10, 49152, 90)
    with pytest.raises(FluteError, match="shared memory"):
        sm90.select(sm90.Problem(4096, 4096, 64, 4, 128), small)
