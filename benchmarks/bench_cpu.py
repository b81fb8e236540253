"""Speed of ``flute::gemm`` on this CPU against torch's dense linear layer, in one process.

Weights rotate through several copies (more than 300 MB of dense bf16), so that none stays in a
cache; ours and the dense layer alternate, and medians are compared. ``--check`` fails when a
requirement of the table REQUIREMENTS is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from generators import make_x, random_weight  # noqa: E402

from flute_vllm import ops  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "cpu" / "linear.json"
K, N = 4096, 14336
COPIES = 3  # 3 * 117 MB of dense bf16
# (isa, bits, M): least speed-up over the dense layer, at both group sizes.
REQUIREMENTS = {
    ("avx512_bf16", 4, 1): 2.2,
    ("avx512_bf16", 3, 1): 2.5,
    ("avx512_bf16", 4, 8): 1.5,
    ("avx512_bf16", 3, 8): 1.5,
    ("avx512_bf16", 4, 128): 0.8,
    ("avx512_bf16", 3, 128): 0.8,
    ("avx2", 4, 1): 1.2,
    ("avx2", 3, 1): 1.2,
}


def seconds(call: Callable[[], torch.Tensor]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(dense: list, problems: list, x: torch.Tensor, repeats: int) -> tuple[float, float]:
    """Median seconds of ours and of the dense layer, alternating and rotating the copies."""
    ours, theirs = [], []
    for i in range(repeats + 1):
        weight, problem = dense[i % len(dense)], problems[i % len(problems)]
        ours.append(seconds(lambda p=problem: torch.ops.flute.gemm(x, *p.weight)))
        theirs.append(seconds(lambda w=weight: torch.nn.functional.linear(x, w)))
    return statistics.median(ours[1:]), statistics.median(theirs[1:])  # the first one warms up


def run(args: argparse.Namespace) -> list[dict]:
    dtype = torch.bfloat16
    dense = [make_x(N, K, dtype=dtype, seed=i) * 0.02 for i in range(COPIES)]
    # Codes are a quarter of the dense weight and smaller, hence twice the copies.
    rows = []
    for bits, group in product(args.bits, args.groups):
        problems = [random_weight(N, K, bits, group, dtype, seed) for seed in range(2 * COPIES)]
        for isa, m in product(args.isas, args.batch):
            ops.cpu_isa(isa)
            x = make_x(m, K, dtype=dtype)
            slow = m > 16 or isa in ("portable", "avx2")
            ours, theirs = measure(dense, problems, x, args.repeats // 2 if slow else args.repeats)
            rows.append(
                {
                    "n": N,
                    "k": K,
                    "m": m,
                    "bits": bits,
                    "group_size": group,
                    "dtype": "bfloat16",
                    "isa": isa,
                    "us": round(ours * 1e6, 1),
                    "dense_us": round(theirs * 1e6, 1),
                    "speedup": round(theirs / ours, 3),
                }
            )
            print(f"{isa} {bits} bits g{group} M={m}: {rows[-1]['speedup']}x", file=sys.stderr)
    ops.cpu_isa("auto")
    return rows


def show(rows: list[dict], batch: list[int]) -> None:
    table = Table(title=f"speed-up over dense bf16 (microseconds), N={N} K={K}")
    for column in ("isa", "bits", "group", *(f"M={m}" for m in batch)):
        table.add_column(column, justify="right")
    cells: dict = {}
    for row in rows:
        key = (row["isa"], row["bits"], row["group_size"])
        cells.setdefault(key, []).append(f"{row['speedup']:.2f} ({row['us']:.0f})")
    for (isa, bits, group), values in cells.items():
        table.add_row(isa, str(bits), str(group), *values)
    Console(width=160).print(table)


def missed(rows: list[dict]) -> list[str]:
    found = []
    for row in rows:
        least = REQUIREMENTS.get((row["isa"], row["bits"], row["m"]))
        if least is not None and row["speedup"] < least:
            found.append(
                f"{row['isa']} {row['bits']} bits group {row['group_size']} M={row['m']}: "
                f"{row['speedup']} times dense, required {least}"
            )
    return found


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


def save(rows: list[dict], path: Path) -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    record = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "command": "python benchmarks/bench_cpu.py " + " ".join(sys.argv[1:]),
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--groups", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--isas", nargs="+", default=None, help="default: all but portable")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="only what --check needs")
    parser.add_argument("--check", action="store_true", help="exit 1 when a requirement is missed")
    parser.add_argument("--output", type=Path, default=None, help=f"default: {RESULTS.name}")
    args = parser.parse_args()
    if args.quick:
        args.bits, args.batch = [3, 4], [1, 8, 128]
    if args.isas is None:
        args.isas = [isa for isa in ops.cpu_isas() if isa != "portable"]
    return args


def main() -> int:
    args = parse()
    if not ops.load():
        print("flute: no compiled kernels to measure; fix: build them", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    rows = run(args)
    show(rows, args.batch)
    if args.output is not None or not args.quick:
        save(rows, args.output or RESULTS)
    problems = missed(rows) if args.check else []
    for line in problems:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
