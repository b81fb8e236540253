"""Builds of the kernels side by side: does a change keep the results, and what does it gain?

    python benchmarks/compare_builds.py ./base.so ./new.so [--bits 4,3] [--families 8b,70b]
        [--ms 1,16,128] [--launches table|decode] [--out trials.json]

Each library repacks the same random weights its own way, so the internal layout may differ. With
``--launches table`` all run the launch that the tuning table has, and their results are compared
bit by bit; with ``decode`` each runs launches of the decode kernel that the heuristic thinks good,
and its fastest counts. Microseconds as the plugin launches (overlap, some weights of the next copy
asked for ahead), cold weights, the median of rounds that go from library to library.

A library of some kernels is enough. ``-DFLUTE_FEW_SHAPES`` builds those of bf16 and groups of 128
alone, in seconds.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from bench_kernels import SHAPES
from compare_formats import Format
from kernel_library import Layer, Library, device, in_rotation, relative_error

from flute_vllm import tuning
from flute_vllm.tools.timing import CallGraph
from flute_vllm.tools.tune import decode_candidates

GROUP_SIZE, ROUNDS, REPLAYS = 128, 3, 3
WRONG = 0.01  # relative error in bf16; a right product has a quarter of that


@dataclass
class Call:
    """One library's launch of one product. It keeps what its graph uses."""

    library: Library
    entry: tuning.Entry
    copies: list[Layer]
    x: torch.Tensor
    y: torch.Tensor
    graph: CallGraph | None = None

    def run(self, layer: Layer | None = None) -> torch.Tensor:
        layer = layer or self.copies[0]
        return self.library.run(layer, self.entry, self.x, self.y)

    def result(self) -> torch.Tensor:
        self.y.fill_(float("nan"))
        return self.run().clone()

    def us(self) -> float:
        if self.graph is None:
            self.graph = CallGraph([functools.partial(self.run, copy) for copy in self.copies])
        return self.graph.median_us(REPLAYS)


def launches(n: int, k: int, m: int, bits: int, gpu: tuning.Device, limit: int) -> list:
    """Entries to time: the table's, or ``limit`` of the decode kernel's."""
    if limit:
        return decode_candidates(tuning.Problem(n, k, m, bits, GROUP_SIZE), gpu, limit)
    return [Format(f"{bits}:{GROUP_SIZE}").launch(n, k, m, gpu)]


def fastest(calls: list[Call]) -> Call:
    """Of launches of one library; those that it refuses or has no kernel for are passed over."""
    timed = []
    for call in calls:
        try:
            call.run()
        except RuntimeError:
            continue
        timed.append((call.us(), len(timed), call))
    if not timed:
        raise RuntimeError("the library accepts none of the launches")
    return min(timed)[2]


def compare(libraries: dict[str, Library], arguments: argparse.Namespace) -> Iterator[dict]:
    """A row for each layer, width and number of rows."""
    gpu = device()
    limit = arguments.candidates if arguments.launches == "decode" else 0
    layers = [(f, name) for f in arguments.families.split(",") for name in SHAPES[f]]
    for bits, (family, name) in product(map(int, arguments.bits.split(",")), layers):
        n, k = SHAPES[family][name]
        copies = {
            key: in_rotation(library.random_layer(n, k, bits, GROUP_SIZE, torch.bfloat16))
            for key, library in libraries.items()
        }
        dense = next(iter(copies.values()))[0].dense()
        for m in map(int, arguments.ms.split(",")):
            x = torch.randn(m, k, device="cuda").bfloat16()
            exact, entries = (x @ dense.t()).double(), launches(n, k, m, bits, gpu, limit)
            best = {}
            for key, library in libraries.items():
                y = [x.new_empty(m, n) for _ in entries]
                calls = zip(entries, y, strict=True)
                best[key] = fastest([Call(library, e, copies[key], x, t) for e, t in calls])
            results = {key: call.result() for key, call in best.items()}
            first = next(iter(results.values()))
            rounds = [{key: call.us() for key, call in best.items()} for _ in range(ROUNDS)]
            yield {
                "family": family, "layer": name, "bits": bits, "m": m,
                "kernel": tuning.KERNEL_NAMES[next(iter(best.values())).entry.kernel],
                "config": {key: list(call.entry.config) for key, call in best.items()},
                "us": {key: round(statistics.median(us[key] for us in rounds), 2) for key in best},
                "right": all(relative_error(y, exact) < WRONG for y in results.values()),
                "same_bits": all(torch.equal(first, y) for y in results.values()),
            }  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("libraries", nargs="+", help="shared objects; a path has a slash")
    parser.add_argument("--bits", default="4")
    parser.add_argument("--families", default="8b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--ms", default="1,8,16,32,64,128", help="rows of x")
    parser.add_argument("--launches", choices=("table", "decode"), default="table")
    parser.add_argument("--candidates", type=int, default=12, help="of the decode kernel")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    libraries = {Path(path).stem: Library(path) for path in arguments.libraries}
    rows = []
    for row in compare(libraries, arguments):
        rows.append(row)
        times = " ".join(f"{key} {us:.2f}" for key, us in row["us"].items())
        doubt = "" if row["right"] else " WRONG"
        doubt += "" if row["same_bits"] or arguments.launches == "decode" else " other bits"
        print(f"w{row['bits']} {row['family']} {row['layer']} m={row['m']}: {times}{doubt}")
        if arguments.out:
            record = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
            arguments.out.write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")
    return 0 if all(row["right"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
