"""The tune tool without a GPU: which launches it would time, and how it decides."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from flute_vllm import tuning
from flute_vllm.cli import app
from flute_vllm.format import LayerSpec
from flute_vllm.tools import tune
from flute_vllm.tools.layers import LinearLayer
from flute_vllm.tuning import DECODE, DENSE, PLANES, SM90, Entry, sm90

LAYER = LinearLayer("o_proj", (4096,), 4096, LayerSpec(4, 128))
TWO_BITS = LinearLayer("o_proj", (4096,), 4096, LayerSpec(2, 128))
PAIRS = LinearLayer("o_proj", (4096,), 4096, LayerSpec(2, 128, table_kind="pair"))


@pytest.mark.parametrize("m", [16, 64, 256, 4096])
def test_candidates_are_legal_and_always_the_same(m):
    found = tune.candidates(LAYER, m, tuning.H200, 50)
    assert found == tune.candidates(LAYER, m, tuning.H200, 50)
    assert len(found) == len(set(found))
    kernels = {entry.kernel for entry in found}
    assert (DECODE in kernels) == (m <= tuning.MAX_ROWS)
    assert (DENSE in kernels) == (m >= tune.DENSE_ROWS)
    warpgroups = {sm90.Config(*entry.config).warpgroups for entry in found if entry.kernel == SM90}
    assert warpgroups >= ({4, 8} if m == 16 else {4} if m <= 128 else {2})
    problem = sm90.Problem(4096, 4096, m, 4, 128)
    for entry in found:
        if entry.kernel == SM90:
            assert sm90.launch(problem, sm90.Config(*entry.config), tuning.H200)


def test_few_rows_have_launches_of_the_decode_kernel_only():
    found = tune.candidates(LAYER, tune.FEW_ROWS, tuning.H200, 50)
    assert len(found) == len(set(found)) > 10
    for entry in found:
        config = tuning.Config(*entry.config)
        assert (entry.kernel, config.overlap) == (DECODE, 1)
        assert tuning.launch(tuning.Problem(4096, 4096, 8, 4, 128), config, tuning.H200)


def test_an_entry_has_a_place_that_plans_read(tmp_path):
    few = [tune.place_of(LAYER, m, tuning.H200) for m in (1, 2, 3, 8)]
    assert few == [("decode", f"4096,4096,{rows},4") for rows in (2, 2, 8, 8)]
    assert tune.place_of(LAYER, 16, tuning.H200) == ("sm90", "4096,4096,16,4")
    table = json.loads((tuning.CONFIG_FOLDER / "h200.json").read_text())
    for m in (1, 8, 16, 64, 1024):
        section, key = tune.place_of(LAYER, m, tuning.H200)
        assert key in table[section]


def test_a_launch_of_few_rows_is_timed_with_the_fewest_and_the_most_that_it_serves():
    served = [tune.served(LAYER, m, tuning.H200) for m in (2, 8, 16, 64)]
    assert served == [{1, 2}, {3, 8}, {16}, {64}]
    assert tune.served(TWO_BITS, 2, tuning.H200) == {2}  # one row has a kernel of its own
    assert tune.buckets(LAYER, (1, 4, 32), tuning.H200) == [2, 8, 32]
    assert tune.buckets(TWO_BITS, (1, 2, 8), tuning.H200) == [1, 2, 8]


def test_one_row_at_two_bits_has_a_place_and_launches_of_its_own():
    assert tune.place_of(TWO_BITS, 1, tuning.H200) == ("planes", "4096,4096")
    assert tune.place_of(TWO_BITS, 8, tuning.H200) == ("decode", "4096,4096,8,2")
    found = tune.candidates(TWO_BITS, 1, tuning.H200, 50)
    assert len(found) == len(set(found)) > 10
    problem = tuning.planes.Problem(4096, 4096, 1, 2, 128)
    for entry in found:
        config = tuning.Config(*entry.config)
        assert (entry.kernel, config.overlap) == (PLANES, 1)
        assert tuning.planes.launch(problem, config, tuning.H200)
    assert {e.kernel for e in tune.candidates(TWO_BITS, 8, tuning.H200, 50)} == {DECODE}
    current = tune.current_launch(TWO_BITS, 1, tuning.H200)
    assert current.kernel == PLANES


@pytest.mark.parametrize("m", [1, 8, 32, 256, 4096])
def test_pair_tables_get_launches_that_take_them(m):
    """The kernel of bit planes and the prefill kernel stop a call that has pairs."""
    assert not tune.takes_one_row(PAIRS, tuning.H200)
    assert tune.buckets(PAIRS, (1, 2, 8), tuning.H200) == [2, 8]
    assert tune.served(PAIRS, 2, tuning.H200) == {1, 2}
    found = tune.candidates(PAIRS, m, tuning.H200, 50)
    for entry in [*found, tune.current_launch(PAIRS, m, tuning.H200)]:
        assert entry.kernel in (DECODE, SM90, DENSE)
        if entry.kernel == SM90:
            config = sm90.Config(*entry.config)
            assert sm90.launch(sm90.Problem(*PAIRS.sizes(m)), config, tuning.H200)


@pytest.mark.parametrize(
    ("group_size", "kind", "ending"),
    [
        (32, "scalar", ",32"), (64, "scalar", ",64"), (128, "scalar", ""), (256, "scalar", ""),
        (-1, "scalar", ""), (64, "pair", ",64,pair"), (128, "pair", ",128,pair"),
        (-1, "pair", ",128,pair"),
    ],
)  # fmt: skip
def test_kinds_of_records_have_places_of_their_own(group_size, kind, ending):
    spec = LayerSpec(3, group_size, table_kind=kind)
    layer = LinearLayer("o_proj", (4096,), 2048, spec)
    for m, place in ((1, "4096,2048,2,3"), (8, "4096,2048,8,3"), (64, "4096,2048,64,3")):
        section, key = tune.place_of(layer, m, tuning.H200)
        assert (section, key) == ("decode" if m <= 8 else "sm90", place + ending)
        if m <= tuning.MAX_ROWS:  # where a plan looks first
            assert tuning.Problem(*layer.sizes(m)).keys[0] == key


def tuned_by(layer, rows, gpu, device, limit):
    """In place of ``tune_layer``: a winner for each bucket, without a GPU."""
    for m in rows:
        yield tune.Tuned(*tune.place_of(layer, m, gpu), (SM90, 16, 4, 4, 4), 1.0, 1)


def test_a_file_for_groups_of_128_leaves_those_of_64_to_be_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "tune_layer", tuned_by)
    monkeypatch.setattr(tuning, "device_of", lambda _: tuning.H200)
    monkeypatch.setattr(tune.torch.cuda, "current_device", lambda: 0)
    path = tmp_path / "h200.json"

    def run(group_size: int) -> tuple[int, list[str]]:
        said: list[str] = []
        layer = LinearLayer("o_proj", (4096,), 4096, LayerSpec(4, group_size))
        return tune.tune([layer], path, rows=(1, 16, 64), show=said.append), said

    assert run(128)[0] == 3
    before = json.loads(path.read_text())
    added, said = run(64)
    assert added == len(said) == 3  # nothing kept, nothing said of it
    after = json.loads(path.read_text())
    assert set(after["sm90"]) - set(before["sm90"]) == {"4096,4096,16,4,64", "4096,4096,64,4,64"}
    assert after["sm90"].items() >= before["sm90"].items()
    for group_size, measured_with in ((64, "groups of 64"), (256, "groups of 128 and longer")):
        added, (said,) = run(group_size)
        assert added == 0
        assert said == (
            f"o_proj, 4096 x 4096, 4 bits: kept from {path} up to 2, 16, 64 rows, measured with "
            + measured_with
        )


def test_a_dense_weight_that_takes_too_much_memory_is_no_candidate():
    big = LinearLayer("gate_up_proj", (57344,), 8192, LayerSpec(4, 128))
    found = tune.candidates(big, 4096, tuning.H200, 10)
    assert all(entry.kernel == SM90 for entry in found)


def test_the_fastest_wins_and_the_decode_kernel_only_clearly():
    a, b, c = Entry(16, SM90, (1,)), Entry(16, SM90, (2,)), Entry(16, DECODE, (3,))
    times = {a: 9.0, b: 8.0, c: 7.9}
    assert tune.best_of([a, b, c], lambda entry, _: times[entry]) == (b, 8.0)
    times[c] = 7.0
    assert tune.best_of([a, b, c], lambda entry, _: times[entry]) == (c, 7.0)


class FakeGraph:
    made = 0

    def __init__(self, calls):
        FakeGraph.made += 1
        self.calls = calls

    def median_us(self, replays):
        return self.calls[0] + (0.5 if replays == tune.QUICK else 0.0)

    def busy_us(self, milliseconds):
        return self.calls[0] * 2


def test_a_careful_time_is_the_mean_of_two_states_of_the_gpu(monkeypatch):
    """Graphs of the entries that are timed carefully are made once and kept."""
    monkeypatch.setattr(tune, "CallGraph", FakeGraph)
    FakeGraph.made, entry = 0, Entry(128, SM90, (10,))
    timer = tune.EntryTimer(lambda numbers: [[numbers[2]], [numbers[2] + 2]], busy=True)
    assert timer(entry, False) == 11.5
    assert timer(entry, True) == timer(entry, True) == (11 + 22) / 2
    assert FakeGraph.made == 4
    assert tune.EntryTimer(lambda numbers: [[numbers[2]]], busy=False)(entry, True) == 10


@pytest.mark.parametrize("m", [tune.FEW_ROWS, 16, 128, 512])
def test_the_launch_that_runs_now_is_that_of_the_plan(m):
    plan = tuning.entries(LAYER.n, LAYER.k, 4, 128, LAYER.parts, tuning.H200, overlap=1)
    entry = tuning.entry_of(plan, m)
    current = tune.current_launch(LAYER, m, tuning.H200)
    assert (current.kernel, current.config) == (entry.kernel, entry.config)
    # Equal to the candidate that is the same launch, where there is one.
    every = tune.candidates(LAYER, m, tuning.H200, 10_000)
    same = [e for e in every if (e.kernel, e.config) == (entry.kernel, entry.config)]
    assert same in ([], [current])


def test_the_launch_that_runs_now_stays_unless_another_is_clearly_faster():
    now, slow, fast = (Entry(16, SM90, (i,)) for i in range(3))
    quick = {now: 9.0, slow: 2.0, fast: 1.0}  # by this alone it would be no finalist
    careful = {now: 10.0, slow: 10.5, fast: 9.9}

    def time_us(entry, is_careful):
        return careful[entry] if is_careful else quick[entry]

    def best():
        return tune.best_of([slow, fast, now], time_us, finalists=2, passes=3, current=now)

    assert best() == (now, 10.0)
    careful[fast] = 9.7
    assert best() == (fast, 9.7)


def test_a_decode_launch_that_runs_now_stays_too():
    now, other = Entry(16, DECODE, (1,)), Entry(16, SM90, (2,))
    times = {now: 9.9, other: 10.0}

    def best():
        return tune.best_of([other, now], lambda entry, _: times[entry], current=now)

    assert best() == (now, 9.9)
    times[other] = 9.5
    assert best() == (other, 9.5)


def test_of_several_passes_the_first_does_not_count_and_only_finalists_are_timed_carefully():
    a, b, c = (Entry(128, SM90, (i,)) for i in range(3))
    careful = {a: iter((5.0, 9.0, 9.0)), b: iter((6.0, 8.0, 8.5))}
    quick = {a: 1.0, b: 2.0, c: 3.0}

    def time_us(entry, is_careful):
        return next(careful[entry]) if is_careful else quick[entry]

    assert tune.best_of([a, b, c], time_us, finalists=2, passes=3) == (b, 8.25)


def test_the_file_is_replaced_whole(tmp_path):
    path = tmp_path / "gpu.json"
    tune.write(path, {"sm90": {"1,2,3,4": [2]}})
    assert json.loads(path.read_text()) == {"sm90": {"1,2,3,4": [2]}}
    assert list(tmp_path.iterdir()) == [path]


def test_without_a_gpu_the_command_says_so(tmp_path):
    result = CliRunner().invoke(app, ["tune", str(tmp_path)])
    assert result.exit_code == 1
    assert "no CUDA device" in (result.output + str(result.exception))
