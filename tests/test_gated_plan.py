"""Which launches of a plan apply a gated activation themselves, and how the op is told."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from flute_vllm import tuning
from flute_vllm.tuning import DECODE, DENSE, H200, PLANES, SM90, TILE

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

HALVES = [(28672, 4096), (57344, 8192), (28672, 8192), (14336, 8192), (80, 1024), (34, 160)]


def problem_of(n: int, k: int, m: int, parts: tuple[int, ...]) -> tuple:
    return (n, k, m, 4, 128 if k % 128 == 0 else 32, parts, False)


def plan_of(n: int, k: int, parts: tuple[int, ...], device: tuning.Device = H200) -> list:
    _, _, _, bits, group_size, _, _ = problem_of(n, k, 1, parts)
    return tuning.entries(n, k, bits, group_size, parts, device, overlap=1, environment={})


@pytest.mark.parametrize(("n", "k"), HALVES)
def test_halves_are_gated_by_launches_that_can(n, k):
    parts = (n // 2, n // 2)
    plan = plan_of(n, k, parts)
    # Few rows: wherever no k is split, as then clusters of four and more would be needed.
    assert plan[0].gates == (tuning.Config(*plan[0].config).splits == 1)
    for entry in plan:
        if entry.gates:
            m = entry.largest_m or 1 << 20
            assert tuning.can_gate(entry, problem_of(n, k, m, parts), H200)
            # A cluster of the two halves, no larger: the GPU runs few large ones at once.
            launch = tuning.launch if entry.kernel == DECODE else tuning.sm90.launch
            kind = tuning.Problem if entry.kernel == DECODE else tuning.sm90.Problem
            config = tuning.Config if entry.kernel == DECODE else tuning.sm90.Config
            wanted = (kind(*problem_of(n, k, m, parts)), config(*entry.config), H200)
            assert launch(*wanted, gated=True).cluster == 2


@pytest.mark.parametrize("parts", [(4096,), (2048, 1024, 1024), (1024, 3072), (1024,) * 4])
def test_other_matrices_are_not_gated(parts):
    assert not any(entry.gates for entry in plan_of(4096, 4096, parts))


@pytest.mark.parametrize("capability", [80, 86, 89])
def test_older_gpus_have_no_clusters(capability):
    device = replace(H200, name="other", capability=capability)
    assert not any(entry.gates for entry in plan_of(28672, 4096, (14336, 14336), device))


def test_numbers_tell_the_op():
    plan = plan_of(28672, 4096, (14336, 14336))
    numbers = [entry.numbers for entry in plan]
    assert {n[1] // tuning.GATES for n in numbers} == {0, 1}
    for entry, found in zip(plan, numbers, strict=True):
        assert len(found) == tuning.ENTRY_NUMBERS
        assert (found[1] % tuning.GATES, found[1] >= tuning.GATES) == (entry.kernel, entry.gates)
    assert max(DENSE, DECODE, SM90, TILE, PLANES) < tuning.GATES


def test_bit_planes_gate_where_they_split_no_k():
    parts = (14336, 14336)
    plan = tuning.entries(28672, 4096, 2, 128, parts, H200, overlap=1, environment={})
    assert plan[0].kernel == PLANES
    assert plan[0].gates == (tuning.Config(*plan[0].config).splits == 1)
    for half, k in ((14336, 4096), (28672, 8192), (7168, 8192), (8960, 5120)):
        halves = tuning.entries(2 * half, k, 2, 128, (half, half), H200, environment={})
        assert halves[0].kernel == PLANES
        assert halves[0].gates
    problem = (28672, 4096, 1, 2, 128, parts, False)
    assert tuning.can_gate(tuning.Entry(1, PLANES, (14, 16, 4, 2, 32, 1)), problem, H200)
    assert not tuning.can_gate(tuning.Entry(1, PLANES, (14, 16, 8, 2, 32, 1)), problem, H200)


def test_what_a_gated_launch_needs():
    parts = (1024, 1024)
    problem = problem_of(2048, 4096, 32, parts)

    def can(kernel: int, *config: int) -> bool:
        return tuning.can_gate(tuning.Entry(32, kernel, config), problem, H200)

    assert can(SM90, 32, 4, 16, 4, 1, 2, 4, 0)
    assert can(SM90, 32, 4, 16, 4, 4, 2, 4, 0)
    assert not can(SM90, 32, 4, 16, 4, 8, 2, 4, 0)  # sixteen blocks in a cluster
    assert not can(SM90, 32, 4, 20, 4, 1, 2, 4, 0)  # sums of a second round take the first's place
    assert not can(SM90, 256, 2, 8, 2, 1, 2, 5, 0)  # prefill writes tile after tile
    assert can(DECODE, 2, 2, 1, 3, 16, 0)
    assert not can(DECODE, 2, 2, 8, 3, 16, 0)
    assert not can(DENSE)
    assert not can(TILE, 64, 1, 3, 3)


def test_random_launches_that_can_gate_are_legal_without():
    gpu_check = pytest.importorskip("gpu_check")
    rng, seen = random.Random(0), set()
    problem = problem_of(2048, 4096, 24, (1024, 1024))
    for _ in range(300):
        entry = gpu_check.random_entry(problem, H200, rng)
        if tuning.can_gate(entry, problem, H200):
            seen.add(entry.kernel)
    assert seen == {DECODE, SM90}
