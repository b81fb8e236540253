"""The judgement of the quality table: limits, order of the recipes, bits per weight."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from bench_quality import describe, mean_of, worse_than_before  # noqa: E402

GOOD = {"nf": (0.01, 0.014), "fast": (0.008, 0.01), "balanced": (0.005, 0.006),
        "best": (0.004, 0.005)}  # fmt: skip


def rows(bits: int = 4, **changes: dict) -> list[dict]:
    return [
        {"recipe": recipe, "bits": bits, "seed": seed, "bpw": 4.25, "top1": 0.9, "seconds": 1.0,
         "dlog_ppl": d, "kld": kld, **changes.get(recipe, {})}
        for recipe, (d, kld) in GOOD.items()
        for seed in range(1 if recipe == "nf" else 3)
    ]  # fmt: skip


def test_a_good_table_holds(capsys):
    assert describe(rows())
    assert "0.50 ok" in capsys.readouterr().out
    assert mean_of(rows())["best", 4]["seeds"] == 3


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"best": {"dlog_ppl": 0.0051}}, "best is worse than balanced at 4 bits: dlog_ppl"),
     ({"balanced": {"kld": 0.02}}, "balanced is worse than fast at 4 bits: kld"),
     ({"best": {"bpw": 4.26}}, "best at 4 bits takes more bits per weight than nf")],
)  # fmt: skip
def test_what_breaks_the_order_is_told(changes, told, capsys):
    assert not describe(rows(**changes))
    assert told in capsys.readouterr().out
    assert any(told in line for line in worse_than_before(mean_of(rows(**changes))))


def test_a_limit_that_is_not_met_is_told(capsys):
    assert not describe(rows(fast={"dlog_ppl": 0.0095}))
    assert "0.85 NOT MET" in capsys.readouterr().out


def test_the_mean_over_seeds_is_judged():
    table = rows()
    one = next(row for row in table if row["recipe"] == "best")
    one["kld"] = 0.0065  # alone worse than balanced, the mean is not
    assert not worse_than_before(mean_of(table))


def test_the_committed_table_holds():
    """Measured on an H200: every limit, every order, for each width."""
    path = Path(__file__).resolve().parents[1] / "benchmarks/results/h200/quality.json"
    table = json.loads(path.read_text())["rows"]
    assert describe(table)
    seeds = {key: mean["seeds"] for key, mean in mean_of(table).items()}
    assert seeds == {
        (recipe, bits): 1 if recipe == "nf" else 3 for recipe in GOOD for bits in (4, 3, 2)
    }
