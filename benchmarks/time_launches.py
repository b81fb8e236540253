"""Times launches that the heuristics choose among, of many layers, and says how good the choice is.

    python benchmarks/time_launches.py LIBRARY [--rows "4:1,8 2:16"] [--candidates 24]
        [--budget-s 120] [--out launches.json]
    python benchmarks/time_launches.py --report benchmarks/results/h200/launches.json

Of each layer, number of rows and kernel, the most promising launches by the heuristic, the choice
of a device without a tuning file and that of this device's file are timed, as the plugin launches.
``--report`` needs no GPU: it asks today's heuristic and looks up what its choice took, so that its
constants can be fitted without one.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from bench_kernels import SHAPES, head_commit
from compare_formats import UNKNOWN, Format
from kernel_library import Library, device, in_rotation

from flute_vllm import tuning
from flute_vllm.format import LayerSpec
from flute_vllm.tools import tune
from flute_vllm.tools.layers import LinearLayer
from flute_vllm.tools.timing import Budget, CallGraph

# Six of Qwen2.5-7B's and Gemma-2-9B's layers; configs/tuning/h200.json knew none when launches.json
# was made.
OTHERS = (
    *((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)),
    *((8192, 3584), (3584, 14336)),
)
ROWS = {  # of x, by bits; one row at 2 bits is another kernel's
    4: (1, 2, 8, 16, 32, 64, 128, 256, 512, 1024, 2048),
    3: (1, 2, 8, 16, 32, 64, 128, 256),
    2: (1, 2, 8, 16, 32, 64, 128, 256),
}
CANDIDATES = {8: 60, 256: 40, 2048: 12}  # launches to time up to so many rows
REPLAYS = 2
GROUP_SIZE = 128


@dataclass(frozen=True)
class Choice:
    """What was timed for one layer and number of rows: launches as kernel and config."""

    n: int
    k: int
    m: int
    bits: int
    table: tuple[int, ...]  # the launch of the device's file then, or the heuristic's without one
    us: dict[tuple[int, ...], float]

    @classmethod
    def read(cls, row: dict) -> Choice:
        us = {tuple(launch): us for us, *launch in row["us"]}
        return cls(row["n"], row["k"], row["m"], row["bits"], tuple(row["table"]), us)

    def heuristic_us(self, gpu: tuning.Device) -> float | None:
        """Of the launch that ``gpu`` without a file is given; None where it was not timed."""
        return self.us.get(chosen(self.n, self.k, self.m, self.bits, replace(gpu, name=UNKNOWN)))

    def behind(self, gpu: tuning.Device) -> tuple[float, float] | None:
        """The heuristic's time over the file's, and over the best's."""
        us = self.heuristic_us(gpu)
        return us and (us / self.us[self.table], us / min(self.us.values()))


@functools.cache
def plan(n: int, k: int, bits: int, gpu: tuning.Device) -> list[tuning.Entry]:
    return Format(f"{bits}:{GROUP_SIZE}").plan(n, k, gpu)


def chosen(n: int, k: int, m: int, bits: int, gpu: tuning.Device) -> tuple[int, ...]:
    entry = tuning.entry_of(plan(n, k, bits, gpu), m)
    return entry.kernel, *entry.config


def time_layer(
    library: Library, n: int, k: int, bits: int, ms: tuple[int, ...], gpu: tuning.Device, most: int
) -> Iterator[dict]:
    layer = LinearLayer(f"{n}x{k}", (n,), k, LayerSpec(bits, GROUP_SIZE))
    copies = in_rotation(library.random_layer(n, k, bits, GROUP_SIZE, torch.bfloat16))
    for m in ms:
        x = torch.randn(m, k, device="cuda").bfloat16()
        y = x.new_empty(m, n)
        limit = min(most, next(number for last, number in CANDIDATES.items() if m <= last))
        entries = [e for e in tune.candidates(layer, m, gpu, limit) if e.kernel != tuning.DENSE]
        launches = [(entry.kernel, *entry.config) for entry in entries]
        table = chosen(n, k, m, bits, gpu)
        launches += [chosen(n, k, m, bits, replace(gpu, name=UNKNOWN)), table]
        times = []
        for kernel, *config in dict.fromkeys(launches):
            entry = tuning.Entry(m, kernel, tuple(config))
            calls = [functools.partial(library.run, copy, entry, x, y) for copy in copies]
            times.append([round(CallGraph(calls).median_us(REPLAYS), 2), kernel, *config])
        yield {"n": n, "k": k, "m": m, "bits": bits, "table": table, "us": sorted(times)}


def report(rows: list[dict], gpu: tuning.Device) -> Iterator[str]:
    worst: dict[tuple[int, int], tuple[float, str]] = {}
    for choice in map(Choice.read, rows):
        behind, key = choice.behind(gpu), (choice.bits, choice.m)
        where = f"{choice.n}x{choice.k}"
        if behind is None:
            yield f"W{choice.bits} M={choice.m} {where}: today's choice was not timed"
        else:
            worst[key] = max(worst.get(key, (0.0, "")), (behind[0], where))
    for (bits, m), (ratio, where) in sorted(worst.items()):
        yield f"W{bits} M={m:<5} at most {ratio:.3f} of the file's launch ({where})"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("library", nargs="?")
    parser.add_argument("--report", type=Path)
    parser.add_argument("--rows", default="", help="BITS:M,M,.. BITS:..; default: all of ROWS")
    most = max(CANDIDATES.values())
    parser.add_argument("--candidates", type=int, default=most, help="launches to time at most")
    parser.add_argument("--budget-s", type=float, default=0, help="then layers are left out")
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path, default=Path("launches.json"))
    arguments = parser.parse_args()
    if not arguments.library and not arguments.report:
        parser.error("give a library, or --report and a file")
    wanted = (text.partition(":") for text in arguments.rows.split())
    arguments.rows = {int(b): tuple(map(int, ms.split(","))) for b, _, ms in wanted} or ROWS
    return arguments


def main() -> int:
    arguments = parse()
    if arguments.report:
        rows = json.loads(arguments.report.read_text())["rows"]
        print("\n".join(report(rows, tuning.H200)))
        return 0
    library, gpu, budget = Library(arguments.library), device(), Budget(arguments.budget_s)
    shapes = [nk for family in SHAPES.values() for nk in family.values()]
    result = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "commit": arguments.commit or head_commit(), "command": "python " + " ".join(sys.argv),
        "columns": "us, kernel (tuning/plan.py), its config", "left_out": [], "rows": [],
    }  # fmt: skip
    for n, k in [*shapes, *OTHERS]:
        for bits, ms in arguments.rows.items():
            if budget.is_over():
                result["left_out"].append([n, k, bits])
            else:
                result["rows"] += time_layer(library, n, k, bits, ms, gpu, arguments.candidates)
        arguments.out.write_text(json.dumps(result, separators=(",", ":")) + "\n")
        print(f"{budget.spent():5.0f}s {n}x{k}", flush=True)
    print("\n".join(report(result["rows"], gpu)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
