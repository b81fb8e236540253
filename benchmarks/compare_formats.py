"""Formats of a weight side by side, and the heuristic's launches beside the measured ones.

    python benchmarks/compare_formats.py LIBRARY [--formats 4:128,4:64,4:128:pair,4:128:heuristic]
        [--families 8b,70b] [--ms 1,8,32] [--budget-s 60] [--out kernels_formats.json]

``bits:group_size``, then any of ``pair``, ``fp16`` and ``heuristic``, the launch that a device
without a file in configs/tuning/ is given. The first format is what the others are compared with.
Microseconds as the plugin launches (overlap, some weights of the next copy asked for ahead), cold
weights. All formats of a layer are measured in turn, in several rounds with a CUDA graph of each
one's own, and the median counts: neither a warmer GPU nor a graph that happens to be slow decides.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from bench_kernels import SHAPES, head_commit
from kernel_library import Layer, Library, device, in_rotation

from flute_vllm import tuning
from flute_vllm.tools.timing import Budget, CallGraph, roofline

ROUNDS, REPLAYS = 5, 3
FORMATS = (
    "4:128,3:128,2:128,4:64,4:32,4:128:fp16,4:128:pair,"
    "4:128:heuristic,3:128:heuristic,2:128:heuristic"
)
UNKNOWN = "unknown"  # no file in configs/tuning/
FORMAT_WORDS = {
    "pair": "tables of pairs", "fp16": "float16", "heuristic": "the heuristic's launches",
}  # fmt: skip
TABLE_FAMILIES, TABLE_ROWS = ("8b", "70b"), (1, 8, 32, 128)


@dataclass(frozen=True)
class Format:
    """What a layer's weight is stored as, and who chooses its launches."""

    name: str

    @property
    def numbers(self) -> tuple[int, int]:
        """bits and group_size"""
        bits, group_size, *_ = self.name.split(":")
        return int(bits), int(group_size)

    def has(self, word: str) -> bool:
        return word in self.name.split(":")[2:]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.has("fp16") else torch.bfloat16

    @property
    def stored(self) -> Format:
        """The same, whoever chooses."""
        return Format(self.name.replace(":heuristic", ""))

    def layers(self, library: Library, n: int, k: int) -> list[Layer]:
        """In rotation: kernel_library.in_rotation."""
        pair = self.has("pair")
        return in_rotation(library.random_layer(n, k, *self.numbers, self.dtype, pair=pair))

    def plan(self, n: int, k: int, gpu: tuning.Device) -> list[tuning.Entry]:
        if self.has("heuristic"):
            gpu = replace(gpu, name=UNKNOWN)
        pair = self.has("pair")
        return tuning.entries(n, k, *self.numbers, (n,), gpu, pair=pair, overlap=1, environment={})

    def launch(self, n: int, k: int, m: int, gpu: tuning.Device) -> tuning.Entry:
        return tuning.entry_of(self.plan(n, k, gpu), m)


def compare(library: Library, arguments: argparse.Namespace, budget: Budget) -> Iterator[dict]:
    """A row for each layer and number of rows of x; those after the budget have no times."""
    gpu = device()
    for family, name in [(f, name) for f in arguments.families for name in SHAPES[f]]:
        n, k = SHAPES[family][name]
        stored = set() if budget.is_over() else {f.stored for f in arguments.formats}
        copies = {form: form.layers(library, n, k) for form in stored}
        for m in arguments.ms:
            row = {"family": family, "layer": name, "n": n, "k": k, "m": m}
            if budget.is_over() or not copies:
                yield row | {"missing": budget.reason()}
                continue
            launches = {form: form.launch(n, k, m, gpu) for form in arguments.formats}
            yield row | {
                "us": times(library, launches, copies, torch.randn(m, k, device="cuda")),
                "launch": {
                    form.name: [tuning.KERNEL_NAMES[entry.kernel], *entry.config]
                    for form, entry in launches.items()
                },
            }
        copies = {}
        torch.cuda.empty_cache()


def times(
    library: Library,
    launches: dict[Format, tuning.Entry],
    copies: dict[Format, list[Layer]],
    x: torch.Tensor,
) -> dict[str, float]:
    """Microseconds of a launch of each format. A launch that is another's is measured once."""
    timed = {(form.stored, entry.kernel, entry.config): form for form, entry in launches.items()}
    found: dict[Format, list[float]] = {form: [] for form in timed.values()}
    order = list(found)
    for turn in range(ROUNDS * len(order)):
        # Rounds begin at different formats, as far as there are enough: what comes after heavy
        # launches finds a slower clock.
        number, place = divmod(turn, len(order))
        form = order[(place + number * len(order) // ROUNDS) % len(order)]
        layers, cast = copies[form.stored], x.to(form.dtype)
        y = cast.new_empty(len(x), layers[0].matrix.n)
        calls = [functools.partial(library.run, c, launches[form], cast, y) for c in layers]
        found[form].append(CallGraph(calls).median_us(REPLAYS))
    return {
        form.name: statistics.median(found[timed[form.stored, entry.kernel, entry.config]])
        for form, entry in launches.items()
    }


def report(rows: list[dict]) -> Iterator[str]:
    """Of each format the smallest, median and largest ratio to the first one's time."""
    rows = [row for row in rows if "us" in row]
    if not rows:
        return
    base, *others = rows[0]["us"]
    for m, form in product(sorted({row["m"] for row in rows}), others):
        ratios = {
            f"{row['family']} {row['layer']}": row["us"][form] / row["us"][base]
            for row in rows
            if row["m"] == m
        }
        least, most = min(ratios, key=ratios.get), max(ratios, key=ratios.get)
        yield (
            f"M={m:<5}{form:18} {statistics.median(ratios.values()):.3f} of {base}: "
            f"{ratios[least]:.3f} ({least}) to {ratios[most]:.3f} ({most})"
        )


def table(rows: list[dict], ms: tuple[int, ...] = TABLE_ROWS) -> list[str]:
    """For the README: the sum of a decoder block's linear layers in each format."""
    blocks: dict[tuple[str, int], list[dict]] = {}
    for row in rows:
        if row["family"] in TABLE_FAMILIES and row["m"] in ms and "us" in row:
            blocks.setdefault((row["family"], row["m"]), []).append(row["us"])
    columns = [(family, m) for family in TABLE_FAMILIES for m in ms]
    names = {family: f"{family.upper()}, M=" for family in TABLE_FAMILIES}
    head = [f"{names[family]}{m}" for family, m in columns]
    lines = [f"| bits, group_size | {' | '.join(head)} |", "|---" * (len(columns) + 1) + "|"]
    for name in blocks[columns[0]][0]:
        sums = [sum(us[name] for us in blocks[column]) for column in columns]
        words = name.split(":")
        label = ", ".join([*words[:2], *(FORMAT_WORDS[word] for word in words[2:])])
        lines.append(f"| {label} | {' | '.join(f'{us:.1f}' for us in sums)} |")
    return lines


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("library")
    parser.add_argument("--families", default="8b,70b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--ms", default="1,2,4,8,16,32", help="rows of x")
    parser.add_argument("--budget-s", type=float, default=0, help="then rows are left out; 0: none")
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path, default=Path("kernels_formats.json"))
    arguments = parser.parse_args()
    arguments.ms = [int(m) for m in arguments.ms.split(",")]
    arguments.families = arguments.families.split(",")
    arguments.formats = [Format(name) for name in arguments.formats.split(",")]
    words = {word for form in arguments.formats for word in form.name.split(":")[2:]}
    if unknown := words - FORMAT_WORDS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(FORMAT_WORDS)}")
    return arguments


def main() -> int:
    arguments = parse()
    budget, library = Budget(arguments.budget_s), Library(arguments.library)
    result = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "commit": arguments.commit or head_commit(), "command": "python " + " ".join(sys.argv),
        "roofline": roofline(), "rounds": ROUNDS, "rows": [],
    }  # fmt: skip
    for row in compare(library, arguments, budget):
        result["rows"].append(row)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        us = " ".join(f"{name} {time:.2f}" for name, time in row.get("us", {}).items())
        print(f"{budget.spent():5.0f}s {row['family']} {row['layer']} m={row['m']}: {us}")
    print("\n".join(report(result["rows"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
