"""Times the kernels on the layer shapes of LLaMA-3-8B and 70B (also its TP=4 shards).

    python benchmarks/bench_kernels.py LIBRARY [--ms 1,16,256,8192] [--peers cublas,marlin,machete,
        humming,bnb] [--budget-s 480] [--check-targets] [--sweep 20 --tuning h200.json]

Microseconds per call, median over replays of a CUDA graph that holds the calls back to back, with
weights rotating over more than 280 MB so that L2 holds none; peers (``flute_vllm/tools/``)
are timed on the same shapes in the same process. Ours thrice: one launch after another (``us``),
with programmatic dependent launch (``us_overlap``), and as the plugin launches (``us_plugin``),
where each launch also asks L2 for some of the next copy's weights. ``floor`` is bytes / measured
read bandwidth. ``error`` and ``dense_error`` are relative errors of our kernel and of torch.matmul
on the dequantized weight, both against a float64 product with the exact weight. ``--sweep`` tries
several configurations of the decode kernel and writes the best to ``--tuning``.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import targets
import torch
from kernel_library import Layer, Library, device, in_rotation

from flute_vllm import tuning
from flute_vllm.tools import peers as peer_library
from flute_vllm.tools.timing import Budget, copies_for, graph_us, roofline
from flute_vllm.tools.tune import decode_candidates

SHAPES = {
    "8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
    "70b": {
        "qkv": (10240, 8192),
        "o": (8192, 8192),
        "gate_up": (57344, 8192),
        "down": (8192, 28672),
    },
    "70b_tp4": {
        "qkv": (2560, 8192),
        "o": (8192, 2048),
        "gate_up": (14336, 8192),
        "down": (8192, 7168),
    },
}
CHECK_ROWS = 16  # of x in the one check of a peer
WRONG = 0.02  # relative error of 16-bit kernels is below 0.005
COMPILE_S = 300  # for peers that compile, where no budget is given
KEY = ("family", "layer", "m", "bits", "group_size", "lut", "dtype")
ERROR_BLOCK = 8192  # rows of the weight held in float64 at once

FEW_ROWS = (tuning.DECODE, tuning.PLANES)
OVERLAPPING = (*FEW_ROWS, tuning.SM90)


@dataclass
class Ours:
    """Our kernels behind one call; ``entry`` replaces the choice of the plan."""

    library: Library
    gpu: tuning.Device
    entry: tuning.Entry | None = None

    def choice(self, layer: Layer, m: int) -> tuning.Entry:
        """The kernel and launch of m rows."""
        matrix = layer.matrix
        parts = tuple(matrix.part_rows[: matrix.parts])
        return self.entry or _choice(
            matrix.n,
            matrix.k,
            matrix.bits,
            matrix.group_size,
            parts,
            bool(matrix.pair_table),
            self.gpu,
            m,
        )

    def __call__(self, layer: Layer, x: torch.Tensor, y: torch.Tensor, m: int) -> torch.Tensor:
        """y [m, N] = x [m, K] times the weight of the layer."""
        return self.library.run(layer, self.choice(layer, m), x, y)


@functools.cache
def _choice(n, k, bits, group, parts, pair, gpu: tuning.Device, m: int) -> tuning.Entry:
    found = tuning.entries(n, k, bits, group, parts, gpu, pair=pair, environment={})
    return tuning.entry_of(found, m)


@dataclass
class Case:
    """One layer of one format, ready to be timed: copies of ours and of each peer's weight."""

    family: str
    name: str
    layer: Layer
    copies: list[Layer]
    exact: torch.Tensor  # [N, K] float32, products of table and scale without rounding
    dense: torch.Tensor  # [N, K] rounded to the dtype
    peers: dict[str, list[tuple]]  # functions of x, one for each copy
    reasons: dict[str, str]  # why a peer has none


def relative_error(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> float:
    """||y - x weight^T|| / ||x weight^T||, the product in float64; infinite for a NaN in y."""
    wide, wrong, total = x.double(), 0.0, 0.0
    for first in range(0, weight.shape[0], ERROR_BLOCK):
        columns = slice(first, first + ERROR_BLOCK)
        exact = wide @ weight[columns].double().t()
        wrong += float((y[:, columns].double() - exact).square().sum())
        total += float(exact.square().sum())
    error = (wrong / total) ** 0.5
    return error if error == error else float("inf")


def prepare(
    library: Library, family: str, name: str, bits: int, group: int, pair: bool,
    dtype: torch.dtype, others: dict[str, peer_library.Peer], state: dict,
) -> Case:  # fmt: skip
    n, k = SHAPES[family][name]
    layer = library.random_layer(n, k, bits, group, dtype, pair=pair)
    exact, dense = layer.dense(torch.float32), layer.dense()
    copies = in_rotation(layer)
    functions, reasons = {}, {}
    for peer_name, peer in others.items():
        reason = peer.refusal(n, k, bits, group)
        if reason is None:
            try:
                functions[peer_name] = _rotations(peer, dense, bits, group, state)
            except Exception as error:  # noqa: BLE001 - a peer that fails is a result to record
                reason = peer_library.describe(error)
        if reason is not None:
            reasons[peer_name] = reason
    return Case(family, name, layer, copies, exact, dense, functions, reasons)


def _rotations(peer, weight: torch.Tensor, bits: int, group: int, state: dict) -> list:
    """Calls of a peer, one for each copy of its weight; checks its result at first use.

    Raises ValueError where a peer does not compute with its own dequantized weight.
    """
    prepared = peer.prepare(weight, bits, group)
    key = f"{bits} bits g{group} {str(weight.dtype).removeprefix('torch.')}"
    errors = state[peer.name].setdefault("errors", {})
    if key not in errors:
        errors[key] = peer_library.relative_error(prepared, CHECK_ROWS)
    if not errors[key] < WRONG:
        raise ValueError(f"wrong results: relative error {errors[key]:.3g}")
    prepared.dense, count = None, copies_for(prepared.nbytes)
    copies = [tuple(t.clone() for t in prepared.tensors) for _ in range(count - 1)]
    return [functools.partial(_call, prepared.call, t) for t in [prepared.tensors, *copies]]


def _call(call, tensors: tuple, x: torch.Tensor) -> torch.Tensor:
    return call(x, tensors)


def time_ours(ours: Ours, case: Case, x: torch.Tensor, y: torch.Tensor, floor: float, arguments):
    """(microseconds, with overlap, as the plugin launches, entry): the best of a sweep.

    The two in the middle are None for a kernel that has no overlap.
    """
    m = x.shape[0]

    def timed(entry: tuning.Entry, overlap: int, ahead: int = 0) -> float:
        for layer in case.copies:
            layer.next_bytes = ahead
        if entry.kernel in OVERLAPPING:
            entry = replace(entry, config=(*entry.config[:-1], overlap))
        run = replace(ours, entry=entry)
        functions = [functools.partial(run, layer, x, y, m) for layer in case.copies]
        estimate = floor + 3 if entry.kernel in FEW_ROWS else 0.0
        return graph_us(functions, arguments.replays, estimate_us=estimate)

    found = [ours.choice(case.layer, m)]
    if arguments.sweep and found[0].kernel == tuning.DECODE:
        matrix = case.layer.matrix
        problem = tuning.Problem(matrix.n, matrix.k, m, matrix.bits, matrix.group_size)
        found = decode_candidates(problem, ours.gpu, arguments.sweep)
    plain, entry = min(((timed(entry, 0), entry) for entry in found), key=lambda p: p[0])
    if entry.kernel not in OVERLAPPING:
        return plain, None, None, entry
    # The plugin's 1: the next launch starts early. More: it may also fetch weights.
    early = (1, entry.config[3]) if entry.kernel in FEW_ROWS else (1,)
    overlapped = min(timed(entry, overlap) for overlap in early)
    return plain, overlapped, timed(entry, 1, tuning.AHEAD_BYTES), entry


def measure(ours: Ours, case: Case, m: int, read_tbps: float, arguments) -> dict:
    matrix, dtype = case.layer.matrix, case.dense.dtype
    x = torch.randn(m, matrix.k, device="cuda").to(dtype)
    y = torch.full((m, matrix.n), float("nan"), dtype=dtype, device="cuda")
    stored = case.layer.records.numel() * 4
    moved = stored + 2 * m * (matrix.n + matrix.k)
    floor = moved / read_tbps / 1e6
    ours(case.layer, x, y, m)
    row = row_head(case.family, case.name, m, matrix.bits, matrix.group_size, _pair(case), dtype)
    row |= {
        "us": None, "bytes": moved, "error": relative_error(y, x, case.exact),
        "dense_error": relative_error(torch.matmul(x, case.dense.t()), x, case.exact),
    }  # fmt: skip
    us, overlapped, as_plugin, entry = time_ours(ours, case, x, y, floor, arguments)
    times, reasons = {}, dict(case.reasons)
    for name, functions in case.peers.items():
        try:
            times[name] = graph_us([functools.partial(f, x) for f in functions], arguments.replays)
        except Exception as error:  # noqa: BLE001 - recorded as the result of this peer
            reasons[name] = peer_library.describe(error)
            torch.cuda.synchronize()  # ends the run here if the device is lost
    return row | {
        "us": us, "us_overlap": overlapped, "us_plugin": as_plugin, "floor_us": floor,
        "target_us": floor / 0.88 + 2.5,
        "kernel": tuning.KERNEL_NAMES[entry.kernel], "config": entry.config[:-1],
        "peers": times, "peers_missing": reasons,
    }  # fmt: skip


def row_head(family, name, m, bits, group, pair: bool, dtype: torch.dtype) -> dict:
    n, k = SHAPES[family][name]
    return {
        "family": family, "layer": name, "n": n, "k": k, "m": m, "bits": bits,
        "group_size": group, "lut": "pair" if pair else "scalar",
        "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip


def _pair(case: Case) -> bool:
    return bool(case.layer.matrix.pair_table)


def missing_row(head: dict, reason: str) -> dict:
    fields = ("us", "us_overlap", "us_plugin", "bytes", "error", "dense_error", "floor_us")
    nothing = dict.fromkeys(fields)
    return head | nothing | {
        "target_us": None, "kernel": None, "config": None, "peers": {}, "missing": reason,
    }  # fmt: skip


def bench(ours: Ours, others: dict, arguments, budget: Budget, read_tbps: float, state: dict):
    """Yields a row for each layer, format and m; those after the budget say that they miss."""
    layers = [(f, name) for f in arguments.families for name in SHAPES[f]]
    for (family, name), (bits, group, pair, dtype) in product(layers, arguments.formats):
        case = None
        for m in arguments.ms:
            if budget.is_over():
                head = row_head(family, name, m, bits, group, pair, dtype)
                yield missing_row(head, budget.reason())
                continue
            if case is None:
                case = prepare(
                    ours.library, family, name, bits, group, pair, dtype, others, state
                )  # fmt: skip
            row = measure(ours, case, m, read_tbps, arguments)
            print(_line(row, budget), flush=True)
            yield row
        case = None
        torch.cuda.empty_cache()


def _line(row: dict, budget: Budget) -> str:
    overlap = "" if row["us_overlap"] is None else f"overlap {row['us_overlap']:7.1f} "
    overlap += "" if row["us_plugin"] is None else f"plugin {row['us_plugin']:7.1f} "
    times = " ".join(f"{name} {us:.1f}" for name, us in row["peers"].items())
    return (
        f"{budget.spent():5.0f}s {row['family']:8}{row['layer']:8} W{row['bits']}"
        f"g{row['group_size']:<4}{row['lut']:7}{row['dtype']:9}m={row['m']:<5}{row['us']:8.1f} "
        f"{overlap}floor {row['floor_us']:6.1f} error {row['error']:.1e} "
        f"(dense {row['dense_error']:.1e}) {row['config'] or ''} {times}"
    )


def load_peers(arguments) -> tuple[dict, dict]:
    """Usable peers, and for the record the version of each or why it is not there."""
    usable, reasons = peer_library.load(arguments.peers)
    state: dict[str, dict] = {name: {"unavailable": reason} for name, reason in reasons.items()}
    shapes = {nk for family in arguments.families for nk in SHAPES[family].values()}
    for name, peer in usable.items():
        state[name] = {"version": peer.version}
        wanted = [
            (n, k, bits, group, dtype)
            for (n, k), (bits, group, _, dtype) in product(shapes, arguments.formats)
            if peer.refusal(n, k, bits, group) is None
        ]
        failed = peer.precompile(wanted, arguments.budget_s / 2 or COMPILE_S)
        if failed is not None:
            state[name]["precompile"] = failed
    return usable, state


def parse_formats(text: str) -> Iterator[tuple[int, int, bool, torch.dtype]]:
    for item in text.split(","):
        bits, group, *rest = item.split(":")
        dtype = torch.float16 if "fp16" in rest else torch.bfloat16
        yield int(bits), int(group), "pair" in rest, dtype


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("library")
    parser.add_argument("--families", default="8b,70b,70b_tp4")
    parser.add_argument("--formats", default="4:128", help="bits:group[:pair][:fp16], ...")
    parser.add_argument("--ms", default="1,2,4,8,16,32", help="rows of x, up to 8192")
    parser.add_argument("--peers", default="cublas", help=f"of {', '.join(peer_library.REGISTRY)}")
    parser.add_argument("--budget-s", type=float, default=0, help="then rows are left out; 0: none")
    parser.add_argument("--sweep", type=int, default=0, help="configurations to try")
    parser.add_argument("--replays", type=int, default=7)
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path, default=Path("kernels.json"))
    parser.add_argument("--append", action="store_true", help="keep the other rows of --out")
    parser.add_argument("--tuning", type=Path, help="write the best configurations here")
    parser.add_argument("--check-targets", action="store_true", help="exit 1 when one is missed")
    arguments = parser.parse_args()
    arguments.ms = [int(m) for m in arguments.ms.split(",")]
    arguments.families = arguments.families.split(",")
    arguments.peers = [name for name in arguments.peers.split(",") if name]
    arguments.formats = list(parse_formats(arguments.formats))
    return arguments


def head_commit() -> str:
    command = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def merge(old: list[dict], new: list[dict]) -> list[dict]:
    """Old rows with those measured again replaced; a row that misses replaces none."""

    def key(row: dict) -> tuple:
        return tuple(row[name] for name in KEY)

    measured = {key(row) for row in old if row["us"] is not None}
    new = [row for row in new if row["us"] is not None or key(row) not in measured]
    again = {key(row) for row in new}
    return [row for row in old if key(row) not in again] + new


def write_tuning(rows: list[dict], path: Path, device_name: str, commit: str) -> None:
    """The decode kernel's section; others of the file stay."""
    record = json.loads(path.read_text()) if path.is_file() else {"device": device_name}
    best = record.setdefault("decode", {})
    for row in rows:
        if row["us"] is not None and row["kernel"] == tuning.KERNEL_NAMES[tuning.DECODE]:
            problem = tuning.Problem(row["n"], row["k"], row["m"], row["bits"], 128)
            best[problem.keys[0]] = row["config"]
    path.write_text(json.dumps(record | {"commit": commit}, indent=1) + "\n")


def main() -> int:
    arguments = parse()
    budget = Budget(arguments.budget_s)
    ours = Ours(Library(arguments.library), device())
    limits = roofline()
    print(limits, flush=True)
    others, state = load_peers(arguments)
    print(f"{budget.spent():5.0f}s peers: {json.dumps(state)}", flush=True)
    result = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "commit": arguments.commit or head_commit(), "command": "python " + " ".join(sys.argv),
        "roofline": limits, "peer_state": state, "rows": [],
    }  # fmt: skip
    is_kept = arguments.append and arguments.out.exists()
    old = json.loads(arguments.out.read_text()) if is_kept else {"rows": []}
    if is_kept:
        result["command"] = f"{old['command']} ; {result['command']}"
    rows = []
    for row in bench(ours, others, arguments, budget, limits["read_TBps"], state):
        rows.append(row)
        result["rows"] = merge(old["rows"], rows)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.tuning:
        write_tuning(result["rows"], arguments.tuning, ours.gpu.name, result["commit"])
    if not arguments.check_targets:
        return 0
    text, passed = targets.report(result["rows"])
    print(text)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
