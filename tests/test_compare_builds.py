"""What compare_builds.py times, and what it passes over; no GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import compare_builds  # noqa: E402

from flute_vllm import tuning  # noqa: E402


class FakeLibrary:
    """Refuses launches whose first number is odd."""

    def run(self, layer, entry, x, y):
        if entry.config[0] % 2:
            raise RuntimeError("configuration")
        return y.copy_(x + layer)


class FakeGraph:
    def __init__(self, functions):
        for function in functions:
            function()
        self.us = functions[0].func.__self__.entry.config[0]

    def median_us(self, replays):
        return float(self.us)


def call(number: int) -> compare_builds.Call:
    entry = tuning.Entry(1, tuning.DECODE, (number, 1, 1, 2, 16, 1))
    return compare_builds.Call(FakeLibrary(), entry, [1.0, 2.0], torch.ones(2), torch.empty(2))


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(compare_builds, "CallGraph", FakeGraph)


def test_the_fastest_accepted_launch_counts():
    best = compare_builds.fastest([call(8), call(3), call(4), call(6)])
    assert best.entry.config[0] == 4
    assert best.result().tolist() == [2.0, 2.0]  # of the first copy


def test_a_library_without_the_kernel_is_an_error():
    with pytest.raises(RuntimeError, match="none of the launches"):
        compare_builds.fastest([call(1), call(3)])


@pytest.mark.parametrize("m", [1, 8])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_launches_of_the_decode_kernel_are_legal(m, bits):
    entries = compare_builds.launches(6144, 4096, m, bits, tuning.H200, 6)
    assert len(entries) == 6
    problem = tuning.Problem(6144, 4096, m, bits, compare_builds.GROUP_SIZE)
    for entry in entries:
        assert tuning.launch(problem, tuning.Config(*entry.config), tuning.H200) is not None


@pytest.mark.parametrize("m", [1, 16, 64, 512])
def test_the_launch_of_the_table_is_the_only_one(m):
    (entry,) = compare_builds.launches(6144, 4096, m, 4, tuning.H200, 0)
    assert entry.config[-1] == 1  # overlaps, as the plugin's
