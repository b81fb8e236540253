"""The driver of compute-sanitizer, with a stand-in for the tool; which launches it is given."""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import sanitize  # noqa: E402
import sanitize_case  # noqa: E402
import sanitize_cases  # noqa: E402

from flute_vllm import tuning  # noqa: E402

# Reports one hazard for 3 bits, leaves its output unwritten for pairs, is clean otherwise.
STAND_IN = """#!/usr/bin/env bash
case "$*" in
  *--help*) echo "  --num-cuda-barriers arg (=0)"; exit 0;;
  *--version*) echo "Stand-in"; echo "Version 1.2"; exit 0;;
esac
echo "$@" >> "{log}"
case "$*" in
  *'"bits": 3'*) echo "========= Error: Race reported between Write access at flute"
      echo "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"; exit 86;;
  *'"pair": true'*) echo "========= ERROR SUMMARY: 0 errors"; exit 3;;
esac
echo "========= ERROR SUMMARY: 0 errors"
"""


@pytest.fixture
def runner(tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(STAND_IN.format(log=tmp_path / "log"))
    tool.chmod(0o755)
    return sanitize.Runner("libflute.so", str(tool), 3, time.monotonic() + 60)


def case(**fields) -> sanitize.Case:
    base = {"kind": "decode", "n": 333, "k": 1056, "bits": 4, "group_size": 32}
    return sanitize.Case(**(base | {"config": (1, 4, 4, 2, 16, 0)} | fields))


CASES = list(sanitize_cases.cases())
NO_LAUNCH = ("dequantize", "activate", "norm")  # of several to choose from
BLOCKS = {
    "decode": set(sanitize_cases.DECODE_CUTS),
    "sm90": {(16, 8), (16, 4), (32, 8), (32, 4), (64, 4), (128, 4)},
    "prefill": {(192,), (256,)},
    "tile": {(64,), (128,)},
}


def block(found: sanitize.Case) -> tuple[int, ...]:
    """What names a compiled kernel, beside the format of the weights."""
    if found.kind == "decode":
        config = tuning.Config(*found.config)
        return next(
            (m, warps, rows)
            for m, warps, rows in sanitize_cases.DECODE_CUTS
            if found.m <= m and config.warps == warps and config.rows_each <= rows
        )
    return found.config[: 2 if found.kind == "sm90" else 1]


@pytest.mark.parametrize("kernel", BLOCKS)
def test_cases_reach_every_kernel(kernel):
    found = [c for c in CASES if c.kind == kernel]
    pairs = {False} if kernel == "prefill" else {False, True}
    groups = (32, 64, 128, 256, -1)
    assert {block(c) for c in found} == BLOCKS[kernel]
    assert {(c.bits, c.group_size) for c in found} == set(itertools.product((2, 3, 4), groups))
    for names in (("float16", "bfloat16"), pairs):
        of = (lambda c: c.dtype) if "float16" in names else (lambda c: c.pair)
        assert {(block(c), of(c)) for c in found} == set(itertools.product(BLOCKS[kernel], names))
        assert {(c.bits, of(c)) for c in found} == set(itertools.product((2, 3, 4), names))
    scale_words = {(block(c), c.bits, min(c.group_size % 1000, 128)) for c in found}
    assert len(scale_words) == len(BLOCKS[kernel]) * 9  # groups of a k tile: 4, 2, 1
    assert {sum(c.parts) or c.n for c in found} == {c.n for c in found}
    assert {(37, 63), (40, 16, 44), ()} <= {c.parts for c in found}
    assert any(c.n % 16 for c in found)
    assert any(c.m % 8 for c in found)
    assert {c.launches for c in found} >= {1, 2, 3}


def test_cases_cut_launches_in_every_way():
    def column(kind: str, at: int) -> set[int]:
        return {c.config[at] for c in CASES if c.kind == kind}

    assert column("decode", 2) == {1, 2, 4, 8}
    assert column("sm90", 4) == {1, 2, 4, 8}
    assert column("sm90", 3) == {1, 2, 4, 8}
    assert column("prefill", 4) == {0, 1, 2}
    assert column("tile", 1) >= {1, 2, 3, 9}
    assert {c.ahead for c in CASES if c.kind in ("decode", "sm90")} == {0, 4096, 1 << 20}
    asking = ("decode", "planes", "sm90")
    assert not any(c.ahead for c in CASES if c.kind not in asking)
    assert column("planes", 2) == {1, 2, 4, 8}
    assert column("planes", 3) == {1, 2}
    whole, shared = (
        set(),
        set(),
    )  # clusters of the last round of prefill blocks, after others or not
    for c in (c for c in CASES if c.kind == "prefill"):
        config = tuning.sm90.Config(*c.config)
        problem = tuning.sm90.Problem(c.n, c.k, c.m, c.bits, c.group_size, c.parts)
        rounds, _, cluster = tuning.sm90._prefill_rounds(problem, config, tuning.H200)
        (whole if rounds else shared).add(cluster)
    assert whole == {1, 2}
    assert shared == {1, 2}


def test_every_case_is_a_legal_launch():
    assert len(set(CASES)) == len(CASES)
    assert len(CASES) * len(sanitize.TOOLS) < 930  # of 5 s, 12 at a time: 385 s
    for c in CASES:
        sizes, found = (c.n, c.k, c.m, c.bits, c.group_size, c.parts), None
        assert sanitize_case.Case.parse(c.text()) == c
        if c.kind == "decode":
            found = tuning.launch(tuning.Problem(*sizes), tuning.Config(*c.config), tuning.H200)
        elif c.kind == "planes":
            problem = tuning.planes.Problem(*sizes)
            found = tuning.planes.launch(problem, tuning.Config(*c.config), tuning.H200)
        elif c.kind == "tile":
            problem = tuning.tile.Problem(*sizes)
            found = tuning.tile.launch(problem, tuning.tile.Config(*c.config), tuning.H200)
        elif c.config:
            problem = tuning.sm90.Problem(*sizes, c.pair)
            config = tuning.sm90.Config(*c.config)
            assert config.prefill == (c.kind == "prefill")
            found = tuning.sm90.launch(problem, config, tuning.H200)
        assert found is not None or (c.kind in NO_LAUNCH and not c.config), c


def test_the_first_cases_reach_every_compiled_block():
    first = CASES[:49]
    assert {c.kind for c in first} == set(sanitize_cases.KERNELS)
    for kernel, blocks in BLOCKS.items():
        assert {block(c) for c in first if c.kind == kernel} == blocks
    # What a budget cuts off is a bit of everything but kernels with few cases, which come first.
    few = {"activate", "norm", "planes"}
    planes = [c for c in CASES if c.kind == "planes"]
    assert {c.dtype for c in planes} == {"float16", "bfloat16"}
    assert {(c.bits, c.m, c.pair) for c in planes} == {(2, 1, False)}
    assert {c.group_size for c in planes} == {128, 256, -1}
    assert {c.launches for c in planes} >= {1, 2, 3}
    assert {c.kind for c in CASES[-20:]} == set(sanitize_cases.KERNELS) - few
    assert not few & {c.kind for c in CASES[49:]}
    gated = {(c.kind, c.activation) for c in first if c.activation}
    assert {kind for kind, _ in gated} == {"decode", "planes", "sm90", "activate"}
    assert {activation for _, activation in gated} == {1, 2, 3}


@pytest.mark.parametrize(
    ("kind", "config", "fields", "count"),
    [
        ("decode", (1, 4, 4, 2, 16, 0), {}, 4 * (16 * 17 + 1)),
        ("decode", (7, 1, 1, 3, 8, 0), {}, 8 * 17 + 1),
        ("decode", (7, 1, 2, 3, 8, 1), {"launches": 3, "activation": 1}, 12 * (8 * 17 + 1)),
        ("planes", (3, 4, 2, 2, 32, 1), {"launches": 3}, 6 * (32 * 17 + 1)),
        ("sm90", (16, 8, 4, 4, 1, 1, 8, 0), {}, 8 * (4 * 16 + 2 * 8) + 2),
        ("sm90", (64, 4, 4, 4, 2, 1, 8, 0), {}, 2 * (4 * (4 * 16 + 2 * 8) + 2)),
        ("prefill", (192, 2, 8, 2, 0, 2, 7, 0), {}, 3 * 2 * 8 + 9),
        ("prefill", (192, 2, 8, 2, 2, 2, 7, 0), {}, 2 * (3 * 2 * 8 + 9)),
        ("tile", (64, 1, 3, 4), {}, 0),
        ("dequantize", (), {}, 0),
    ],
)
def test_barriers_are_what_the_headers_set_aside(runner, kind, config, fields, count):
    """In the blocks of a cluster: decode_operands.cuh kBarrierBytes, sm90_gemm.cuh
    sm90_barrier_bytes, sm90_prefill.cuh, cluster_sums.cuh."""
    wanted = case(kind=kind, config=config, **fields)
    assert sanitize_cases.barriers(wanted) == count
    for tool in sanitize.TOOLS:
        command = " ".join(runner.command(tool, wanted, 41000))
        told = f"--num-cuda-barriers {count}" in command
        assert told == (count > 0 and tool in ("racecheck", "synccheck"))
        assert ("--num-cuda-barriers" in command) == told


def last_summary(runner, tools, wanted) -> dict[str, dict]:
    return list(runner.run_all(tools, wanted))[-1]


def test_outcomes_are_counted(runner, tmp_path):
    wanted = [case(), case(bits=3), case(pair=True), case(kind="dequantize", config=())]
    summary = last_summary(runner, ["racecheck"], wanted)["racecheck"]
    assert (summary["cases"], summary["not_run"]) == (4, 0)
    assert summary["cases_of_kernel"] == {"decode": 3, "dequantize": 1}
    assert (summary["errors"], summary["failed_cases"]) == (1, 2)
    texts = [failure["text"] for failure in summary["failures"]]
    assert "Race reported" in texts[0]
    assert "NaN" in texts[1]
    assert "--tool racecheck" in (tmp_path / "log").read_text()


def test_a_case_runs_under_all_tools_before_the_next(runner, tmp_path):
    runner.jobs = 1
    list(runner.run_all(["memcheck", "initcheck"], [case(), case(m=2)]))
    lines = (tmp_path / "log").read_text().splitlines()
    tools = [line.split()[1] for line in lines]
    assert tools == ["memcheck", "initcheck"] * 2
    assert ['"m": 2' in line for line in lines] == [False, False, True, True]


def test_a_launch_that_hangs_is_a_failure_not_left_out(runner, tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n(sleep 60; touch {tmp_path}/survived) & sleep 60\n")
    runner.case_seconds = 0.3
    summary = last_summary(runner, ["memcheck"], [case()])["memcheck"]
    assert (summary["cases"], summary["not_run"], summary["failed_cases"]) == (1, 0, 1)
    assert "no end after" in summary["failures"][0]["text"]


def test_a_machine_that_hides_its_gpu_ends_the_run_at_once(runner, tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho run >> {tmp_path}/log\necho 'Device not supported'; exit 1\n")
    with pytest.raises(sanitize.FluteError, match="Device not supported"):
        list(runner.run_all(["memcheck"], [case(m=m) for m in range(1, 30)]))
    assert len((tmp_path / "log").read_text().splitlines()) <= runner.jobs


def test_time_over_means_not_run(runner):
    runner.deadline = time.monotonic()
    summary = last_summary(runner, ["memcheck"], [case()])["memcheck"]
    assert (summary["cases"], summary["not_run"]) == (0, 1)
    assert summary["not_run_of_kernel"] == {"decode": 1}


@pytest.mark.parametrize(
    ("code", "output"),
    [
        (0, "no summary at all"),
        (0, "========= Results might be incorrect\n========= ERROR SUMMARY: 0 errors"),
        (255, "========= ERROR SUMMARY: 0 errors"),
        (86, "========= Invalid __global__ read\n========= ERROR SUMMARY: 7 errors"),
    ],
)
def test_nothing_doubtful_is_called_clean(code, output):
    assert sanitize.judge(case(), code, output).text


def test_clean_run():
    output = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
    assert sanitize.judge(case(), 0, output) == sanitize.Outcome(case(), 0, "")


def test_main_writes_the_summary(tmp_path, monkeypatch, runner, capsys):
    out = tmp_path / "out.json"
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: runner.sanitizer)
    monkeypatch.setattr(
        sys, "argv",
        ["sanitize.py", "lib.so", "--cases", "5", "--out", str(out), "--tools", "memcheck"],
    )  # fmt: skip
    assert sanitize.main() == 1  # the stand-in fails some
    result = json.loads(out.read_text())
    assert result["version"] == "Version 1.2"
    assert result["tools"]["memcheck"]["cases"] == 5
    assert sum(result["tools"]["memcheck"]["cases_of_kernel"].values()) == 5
