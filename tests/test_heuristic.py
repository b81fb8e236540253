"""How good the launches are that a device without a tuning file is given, by times that an H200
took (benchmarks/results/h200/launches.json); and what compares formats. No GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import compare_formats  # noqa: E402
import time_launches  # noqa: E402

from flute_vllm import tuning  # noqa: E402

# Over the launch in the device's file, or the heuristic before where it had none; over the best.
MOST_BEHIND, MOST_BEHIND_BEST = 1.10, 1.17
TIMED = json.loads((ROOT / "benchmarks/results/h200/launches.json").read_text())
ROWS = TIMED["rows"]
CHOICES = [time_launches.Choice.read(row) for row in ROWS + TIMED["again"]]


def test_every_layer_and_number_of_rows_was_timed():
    kinds = {(choice.bits, choice.m) for choice in CHOICES}
    assert kinds == {(bits, m) for bits, rows in time_launches.ROWS.items() for m in rows}
    assert len({(choice.n, choice.k) for choice in CHOICES}) == 18


@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: f"{c.n}x{c.k}-{c.m}-W{c.bits}")
def test_the_heuristic_is_close_to_the_file(choice):
    behind = choice.behind(tuning.H200)
    assert behind is not None, "its launch was not timed: run benchmarks/time_launches.py"
    assert behind[0] <= MOST_BEHIND
    assert behind[1] <= MOST_BEHIND_BEST


def test_a_report_names_what_was_not_timed():
    row = dict(ROWS[0], us=[])
    assert "today's choice was not timed" in next(time_launches.report([row], tuning.H200))


def test_formats_say_what_is_stored_and_who_chooses():
    form = compare_formats.Format("3:64:pair:heuristic")
    assert form.numbers == (3, 64)
    assert form.has("pair")
    assert form.stored.name == "3:64:pair"
    assert compare_formats.Format("4:128:fp16").dtype == torch.float16
    assert form.dtype == torch.bfloat16


@pytest.mark.parametrize("m", [1, 8, 32])
def test_a_heuristic_format_looks_into_no_file(m, monkeypatch):
    def launch(name: str) -> tuning.Entry:
        return compare_formats.Format(name).launch(6144, 4096, m, tuning.H200)

    expected = launch("4:128:heuristic")
    assert launch("4:128").config != expected.config  # the file knows another
    for module in ("decode", "plan"):
        name = f"flute_vllm.tuning.{module}"
        monkeypatch.setattr(sys.modules[name], "measured", lambda *_: {})
    assert launch("4:128").config == expected.config


def test_a_launch_of_two_formats_is_timed_once(monkeypatch):
    timed = []

    class FakeGraph:
        def __init__(self, calls):
            timed.append(calls[0].args[1].config)
            self.us = float(len(timed))

        def median_us(self, replays):
            return self.us

    monkeypatch.setattr(compare_formats, "CallGraph", FakeGraph)
    monkeypatch.setattr(compare_formats, "ROUNDS", 3)
    base, same, other = map(compare_formats.Format, ("4:128", "4:128:heuristic", "4:64"))
    entry, another = tuning.Entry(1, tuning.DECODE, (4,)), tuning.Entry(1, tuning.DECODE, (8,))
    layers = [SimpleNamespace(matrix=SimpleNamespace(n=16))]
    us = compare_formats.times(
        SimpleNamespace(run=len), {base: entry, same: entry, other: another},
        {base: layers, other: layers}, torch.zeros(1, 32),
    )  # fmt: skip
    assert timed == [(4,), (8,), (4,), (8,), (8,), (4,)]  # the last round begins elsewhere
    assert us == {"4:128": 3.0, "4:128:heuristic": 3.0, "4:64": 4.0}  # medians of 1, 3, 6; 2, 4, 5


def test_a_report_gives_the_smallest_and_the_largest_ratio():
    rows = [
        {"family": "8b", "layer": "o", "m": 1, "us": {"4:128": 2.0, "3:128": 1.0}},
        {"family": "70b", "layer": "o", "m": 1, "us": {"4:128": 2.0, "3:128": 1.5}},
        {"family": "70b", "layer": "qkv", "m": 1, "missing": "time"},
    ]
    (line,) = compare_formats.report(rows)
    assert "0.500 (8b o) to 0.750 (70b o)" in line
