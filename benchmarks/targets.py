"""What the GPU kernels must reach, checked on the rows of a result file; pure functions.

    python benchmarks/targets.py benchmarks/results/h200/kernels.json

Targets hold for 4 bits, group 128, scalar tables, bf16 on an H200, against peers of the same run.
The time of a row is that of launches as the plugin makes them, where it was measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

AHEAD = 1.15  # of the best peer, up to AHEAD_ROWS rows of x
AHEAD_ROWS = 16
NOISE = 1.02
DENSE_SLACK = 1.03  # over cuBLAS, from DENSE_ROWS rows on
DENSE_ROWS = 512
FLOOR_ROWS = 8
# Sum over the four linear layers of a decoder block, in microseconds: family -> m -> limit.
BLOCK_US = {
    "8b": {1: 40.0, 64: 80.0, 128: 108.0, 256: 176.0},
    "70b": {1: 118.0, 64: 235.0, 128: 335.0, 256: 590.0},
}
BLOCK_LAYERS = {"qkv", "o", "gate_up", "down"}


@dataclass(frozen=True)
class Verdict:
    """One target of one row or block. ``passed`` is None where nothing was measured to judge it."""

    row: str
    target: str
    us: float | None
    limit: float | None
    note: str = ""

    @property
    def passed(self) -> bool | None:
        if self.us is None or self.limit is None:
            return None
        return self.us <= self.limit


def is_judged(row: dict) -> bool:
    shape = (row["bits"], row["group_size"], row["lut"], row["dtype"])
    return shape == (4, 128, "scalar", "bfloat16")


def time_of(row: dict) -> float | None:
    """Microseconds as the plugin runs the kernel."""
    times = (row.get(field) for field in ("us_plugin", "us_overlap", "us"))
    return next((us for us in times if us is not None), None)


def best_peer(row: dict) -> tuple[str, float] | None:
    times = {name: us for name, us in row.get("peers", {}).items() if us is not None}
    return min(times.items(), key=lambda item: item[1]) if times else None


def judge_row(row: dict) -> Iterator[Verdict]:
    """The targets that concern one row, in order; none for m between those of the list."""
    name, us, m = f"{row['family']} {row['layer']} M={row['m']}", time_of(row), row["m"]
    best = best_peer(row)
    note = "" if best is None else f"best peer {best[0]} {best[1]:.1f}"
    missing = row.get("missing", "no peer was measured")
    peer_us = None if best is None else best[1]

    def against(target: str, reference: float | None, factor: float, note: str) -> Verdict:
        limit = None if reference is None else reference * factor
        return Verdict(name, target, us, limit, note or missing)

    if m <= AHEAD_ROWS:
        yield against(f"{AHEAD}x ahead of the best peer", peer_us, 1 / AHEAD, note)
    elif m == 32:
        yield against("not slower than the best peer", peer_us, 1.0, note)
    elif m in (64, 128, 256):
        yield against("not slower than the best peer (2 % noise)", peer_us, NOISE, note)
    elif m >= DENSE_ROWS:
        cublas = row.get("peers", {}).get("cublas")
        dense = "" if cublas is None else f"cublas {cublas:.1f}"
        yield against("at most 3 % slower than cuBLAS", cublas, DENSE_SLACK, dense)
    if m <= FLOOR_ROWS:
        floor = row.get("floor_us")
        limit = None if floor is None else floor / 0.88 + 2.5
        yield Verdict(name, "floor / 0.88 + 2.5", us, limit, row.get("missing", ""))


def judge_blocks(rows: Iterable[dict]) -> Iterator[Verdict]:
    times: dict[tuple[str, int], dict[str, float | None]] = defaultdict(dict)
    for row in rows:
        times[row["family"], row["m"]][row["layer"]] = time_of(row)
    for family, limits in BLOCK_US.items():
        for m, limit in limits.items():
            layers = times.get((family, m), {})
            if not layers:
                continue
            absent = sorted(layer for layer in BLOCK_LAYERS if layers.get(layer) is None)
            total = None if absent else sum(layers[layer] for layer in BLOCK_LAYERS)
            note = f"not measured: {', '.join(absent)}" if absent else ""
            yield Verdict(f"{family} block M={m}", "sum of its layers", total, limit, note)


def judge(rows: Iterable[dict]) -> list[Verdict]:
    judged = [row for row in rows if is_judged(row)]
    verdicts = [verdict for row in judged for verdict in judge_row(row)]
    return verdicts + list(judge_blocks(judged))


def report(rows: Iterable[dict]) -> tuple[str, bool]:
    """The text of all verdicts, and whether every one of them passed."""
    verdicts = judge(rows)
    words = {True: "pass", False: "FAIL", None: "?"}
    lines = []
    for verdict in verdicts:
        us = "-" if verdict.us is None else f"{verdict.us:.1f}"
        limit = "-" if verdict.limit is None else f"{verdict.limit:.1f}"
        lines.append(
            f"{words[verdict.passed]:5}{verdict.row:26}{us:>8} <= {limit:>7}  {verdict.target}"
            + (f"; {verdict.note}" if verdict.note else "")
        )
    counts = [sum(v.passed is outcome for v in verdicts) for outcome in words]
    lines.append("{} passed, {} failed, {} not judged".format(*counts))
    return "\n".join(lines), bool(verdicts) and counts[0] == len(verdicts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("results", type=Path, nargs="+")
    rows = [
        row for path in parser.parse_args().results for row in json.loads(path.read_text())["rows"]
    ]
    text, passed = report(rows)
    print(text)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
