"""Times launches of a model's own layers on this GPU and writes the best to a tuning file.

The file (``configs/tuning/<device>.json``, section ``sm90``) says for "n,k,M,bits" which kernel
runs with up to M rows of x, and how its launch is cut; ``tuning/plan.py`` reads it. Groups of less
than 128 and tables of pairs have keys of their own (``tuning/problem.py``). Up to 8 rows run the
decode kernel, whose section ``decode`` has one launch for up to 2 and one for up to 8, and one row
at 2 bits the kernel of section ``planes``. Calls are timed as the plugin makes them. Entries found
in the file are kept, and named, so an interrupted run goes on where it was. The order of work and
the candidates are fixed; times, and with them close decisions, vary by a few per cent.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flute_vllm import __version__, ops, tuning
from flute_vllm.format import LayerSpec
from flute_vllm.tools.bench import random_tensors
from flute_vllm.tools.layers import LinearLayer
from flute_vllm.tools.timing import CallGraph, copies_for
from flute_vllm.tuning import DECODE, DENSE, PLANES, SM90, Entry, decode, planes, sm90
from flute_vllm.tuning.plan import DENSE_BYTES

FEW_ROWS = tuning.BUCKETS[0]  # up to here launches are not in section sm90
# 1: where a kernel of its own takes it
TUNED_ROWS = (1, *tuning.FEW_LAUNCH_ROWS, *tuning.SM90_BUCKETS)
DENSE_ROWS = 256  # from here on decoding the whole weight for torch's GEMM may win
DECODE_WINS = 0.97  # the decode kernel is taken for 9 to 32 rows only where clearly faster
# So much faster must another launch be to replace the one that runs now. Of 74 entries that one run
# changed without such a margin, some were 2 to 6 % slower in the next two (NOTES.md).
REPLACES = 0.98
QUICK, CAREFUL, FINALISTS = 2, 7, 4  # replays of all candidates, of the best few
PASSES = 3  # over the best few, one after another, so that a drift of the clock meets all of them
# From so many rows on products take all the power that a GPU may use, and launches are compared
# while it is busy, too: at 128 rows the best of the first replays was up to 14 % behind (NOTES.md).
BUSY_ROWS, BUSY_MS, BUSY_FINALISTS, BUSY_PASSES = 48, 50.0, 8, 2


@dataclass(frozen=True)
class Tuned:
    """The winner of one bucket; ``tried`` launches were timed."""

    section: str
    key: str
    numbers: tuple[int, ...]  # in section sm90 the kernel, then its config
    us: float
    tried: int


def candidates(layer: LinearLayer, m: int, gpu: tuning.Device, limit: int) -> list[Entry]:
    """Launches worth timing, the most promising first; ``limit`` of the Hopper kernels."""
    if m == 1 and takes_one_row(layer, gpu):
        return planes_candidates(one_row(layer), gpu, limit)
    if m <= FEW_ROWS:
        return decode_candidates(tuning.Problem(*layer.sizes(m)), gpu, limit)
    problem = sm90.Problem(*layer.sizes(m))
    full = set()
    for config in sm90.candidates(problem, gpu):
        for stages in (0, 1, 2):
            done = sm90.complete(problem, replace(config, stages=stages), gpu)
            if done is not None:
                full.add(done)
    ranked = sorted(full, key=lambda c: (sm90.clocks(problem, c, gpu), c.numbers))[:limit]
    found = [Entry(m, SM90, (*config.numbers[:-1], 1)) for config in ranked]
    if m <= tuning.MAX_ROWS:
        few = tuning.Problem(*layer.sizes(m))
        found.append(Entry(m, DECODE, tuning.select(few, gpu, overlap=1).numbers))
    if m >= DENSE_ROWS and layer.n * layer.k * 2 <= DENSE_BYTES:
        found.append(Entry(m, DENSE))
    return found


def current_launch(layer: LinearLayer, m: int, gpu: tuning.Device) -> Entry:
    """What runs now, by the tuning file or the heuristic."""
    plan = tuning.entries(
        layer.n, layer.k, layer.spec.bits, layer.spec.group_size, layer.parts, gpu,
        pair=layer.is_pair, overlap=1, environment={},
    )  # fmt: skip
    entry = tuning.entry_of(plan, m)
    return Entry(m, entry.kernel, entry.config)


def one_row(layer: LinearLayer) -> planes.Problem:
    """What the kernel of bit planes is asked to do."""
    return planes.Problem(*layer.sizes(1))


def takes_one_row(layer: LinearLayer, gpu: tuning.Device) -> bool:
    return planes.takes(one_row(layer), gpu)


def planes_candidates(problem: planes.Problem, gpu: tuning.Device, limit: int) -> list[Entry]:
    """Launches of the kernel of bit planes, the most promising first."""
    full = completed(planes.candidates(problem, gpu), (1, 2, 3), planes.complete, problem, gpu)
    ranked = sorted(full, key=lambda c: (planes.clocks(problem, c, gpu), c.numbers))[:limit]
    return [Entry(1, PLANES, config.numbers) for config in ranked]


def decode_candidates(problem: tuning.Problem, gpu: tuning.Device, limit: int) -> list[Entry]:
    """The same of the decode kernel."""
    full = completed(tuning.candidates(problem, gpu), (0, 2, 3), tuning.complete, problem, gpu)
    ranked = sorted(full, key=lambda c: (decode.clocks(problem, c, gpu), c.numbers))[:limit]
    return [Entry(problem.m, DECODE, config.numbers) for config in ranked]


def completed(
    configs: Iterable[tuning.Config], slots: tuple[int, ...], complete: Callable,
    problem: tuning.Problem | planes.Problem, gpu: tuning.Device,
) -> set[tuning.Config]:  # fmt: skip
    """``configs`` with each number of ``slots``, as far as ``complete`` finds them legal."""
    wishes = [replace(c, slots=n, overlap=1) for c in configs for n in slots]
    return {done for c in wishes if (done := complete(problem, c, gpu)) is not None}


def best_of(
    entries: list[Entry],
    time_us: Callable[[Entry, bool], float],
    *,
    finalists: int = FINALISTS,
    passes: int = 1,
    current: Entry | None = None,
) -> tuple[Entry, float]:
    """All once quickly, the best few and ``current`` carefully: ``time_us`` is told whether to be
    careful. Of several passes over these the first does not count. ``current``, one of ``entries``,
    is replaced by what is clearly faster only."""
    quick = sorted((time_us(entry, False), i) for i, entry in enumerate(entries))
    best = [entries[i] for _, i in quick[:finalists]]
    if any(e.kernel == DECODE for e in entries) and not any(e.kernel == DECODE for e in best):
        best.append(next(e for e in entries if e.kernel == DECODE))
    if current is not None and current not in best:
        best.append(current)
    rounds = [[time_us(entry, True) for entry in best] for _ in range(passes)]
    counted = zip(*rounds[1 if passes > 1 else 0 :], strict=True)
    times = {entry: statistics.mean(found) for entry, found in zip(best, counted, strict=True)}
    winner = min(best, key=times.get)
    if winner.kernel == DECODE:  # the kernel of the rows above is left for a clear gain
        others = [entry for entry in best if entry.kernel != DECODE]
        if others and times[winner] > DECODE_WINS * min(map(times.get, others)):
            winner = min(others, key=times.get)
    if current is not None and times[winner] > REPLACES * times[current]:
        winner = current
    return winner, times[winner]


class EntryTimer:
    """Microseconds of a call with an entry: the mean over calls of several numbers of rows.

    ``calls``: for the numbers of a plan, the calls with each input, weights in rotation. ``busy``:
    a careful time is the mean of that of a GPU that begins and that of one that is busy.
    """

    def __init__(self, calls: Callable[[list[int]], list[list[Callable]]], *, busy: bool) -> None:
        self.busy, self._calls = busy, calls
        # Of those timed carefully. Not of all: a graph holds the outputs of its calls.
        self._graphs: dict[Entry, list[CallGraph]] = {}

    def __call__(self, entry: Entry, careful: bool) -> float:
        graphs = self._graphs.get(entry) or [
            CallGraph(calls) for calls in self._calls(replace(entry, largest_m=0).numbers)
        ]
        if not careful:
            return statistics.mean(graph.median_us(QUICK) for graph in graphs)
        self._graphs[entry] = graphs
        us = statistics.mean(graph.median_us(CAREFUL) for graph in graphs)
        if not self.busy:
            return us
        return (us + statistics.mean(graph.busy_us(BUSY_MS) for graph in graphs)) / 2


def tune_layer(
    layer: LinearLayer, rows: Iterable[int], gpu: tuning.Device, device: torch.device, limit: int
) -> Iterator[Tuned]:
    """Winners of the buckets ``rows``, one after another."""
    spec = layer.spec
    settings = (list(layer.parts), spec.bits, spec.group_size)
    qweight, scales, table = random_tensors(layer, device)
    records = ops.repack(qweight, scales, table, *settings)
    scales = scales.new_zeros(1)
    copies = [records] + [records.clone() for _ in range(copies_for(records.numel() * 4) - 1)]
    pairs = list(zip(copies, copies[1:] + copies[:1], strict=True))
    gemm, ahead = torch.ops.flute.gemm, tuning.ahead_bytes()

    def calls(inputs: list[torch.Tensor], numbers: list[int]) -> list[list[Callable]]:
        return [
            [functools.partial(gemm, x, q, scales, table, *settings, numbers, after, ahead)
             for q, after in pairs]
            for x in inputs
        ]  # fmt: skip

    for m in rows:
        counts = served(layer, m, gpu)
        inputs = [torch.randn(count, layer.k, device=device).to(spec.torch_scale_dtype)
                  for count in counts]  # fmt: skip
        current = current_launch(layer, m, gpu)
        entries = list(dict.fromkeys([*candidates(layer, m, gpu, limit), current]))
        timer = EntryTimer(functools.partial(calls, inputs), busy=m >= BUSY_ROWS)
        # The first pass brings the GPU to the clock that it keeps.
        finalists, passes = (BUSY_FINALISTS, BUSY_PASSES) if timer.busy else (FINALISTS, PASSES)
        entry, us = best_of(entries, timer, finalists=finalists, passes=passes, current=current)
        section, key = place_of(layer, m, gpu)
        numbers = entry.config[:-1]
        if section == "sm90":
            numbers = (entry.kernel, *(numbers if entry.kernel == SM90 else ()))
        yield Tuned(section, key, numbers, us, len(entries))


def buckets(layer: LinearLayer, rows: Iterable[int], gpu: tuning.Device) -> list[int]:
    """The entries that serve ``rows``, by their largest numbers of rows."""
    alone = takes_one_row(layer, gpu)
    return sorted({m if m == 1 and alone else bucket_of(m) for m in rows})


def bucket_of(m: int) -> int:
    """The rows that the launch for ``m`` serves at most; above the few, ``m`` itself."""
    return next((most for most in tuning.FEW_LAUNCH_ROWS if m <= most), m)


def served(layer: LinearLayer, m: int, gpu: tuning.Device) -> set[int]:
    """Rows to time a launch of bucket ``m`` with. One serves several of the few rows: the mean of
    the fewest and the most counts."""
    if m not in tuning.FEW_LAUNCH_ROWS:
        return {m}
    first = 2 if takes_one_row(layer, gpu) else 1
    return {max((most + 1 for most in tuning.FEW_LAUNCH_ROWS if most < m), default=first), m}


def place_of(layer: LinearLayer, m: int, gpu: tuning.Device) -> tuple[str, str]:
    """Section and key of an entry in the file."""
    if m == 1 and takes_one_row(layer, gpu):
        return "planes", f"{layer.n},{layer.k}"
    most = bucket_of(m)
    (key, *_) = sm90.Problem(*layer.sizes(m)).keys_up_to(most)
    return "decode" if m <= FEW_ROWS else "sm90", key


def kept_text(layer: LinearLayer, rows: list[int], path: Path) -> str:
    """Which entries of the file stay, and what they were measured with: records of this layer's
    kind, but not always of its group size."""
    groups = one_row(layer).groups
    measured_with = f"groups of {tuning.TILE_K // groups}" + (" and longer" if groups == 1 else "")
    return (
        f"{layer.name}, {layer.n} x {layer.k}, {layer.spec.bits} bits: kept from {path} up to "
        f"{', '.join(map(str, rows))} rows, measured with {measured_with}"
        + (" and tables of pairs" if layer.is_pair else "")
    )


def write(path: Path, found: dict) -> None:
    """Replaces the file at once: a reader never sees half of it."""
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(path)


def tune(
    layers: list[LinearLayer],
    path: Path,
    *,
    rows: Iterable[int] = TUNED_ROWS,
    limit: int = 100,
    budget_s: float = 0,
    show: Callable[[str], None] = print,
) -> int:
    """Fills the tuning file for ``layers``; returns how many entries were added.

    Raises FluteError where the extension has no CUDA kernels.
    """
    ops.load()
    device, start = torch.device("cuda", torch.cuda.current_device()), time.monotonic()
    gpu = tuning.device_of(device)
    found = json.loads(path.read_text()) if path.is_file() else {"device": gpu.name}
    work = []
    for layer in layers:
        asked = buckets(layer, rows, gpu)
        places = {m: place_of(layer, m, gpu) for m in asked}
        missing = [m for m in asked if places[m][1] not in found.setdefault(places[m][0], {})]
        work += [(layer, m) for m in missing]
        if kept := [m for m in asked if m not in missing]:
            show(kept_text(layer, kept, path))
    added = 0
    for layer in layers:
        missing = [m for other, m in work if other is layer]
        for tuned in tune_layer(layer, missing, gpu, device, limit) if missing else ():
            found[tuned.section][tuned.key] = list(tuned.numbers)
            found["sm90_by"] = f"flute-vllm {__version__}, torch {torch.__version__}"
            write(path, found)
            added += 1
            spent = time.monotonic() - start
            left = spent / added * (len(work) - added)
            show(
                f"{added}/{len(work)} {tuned.key}: {tuned.us:.1f} us, {tuned.numbers}, "
                f"{tuned.tried} tried, {left:.0f} s left"
            )
            if budget_s and spent > budget_s:
                show(f"stopped after {spent:.0f} s; run again to go on")
                return added
        torch.cuda.empty_cache()
    return added


def main() -> None:
    """For hosts without the command-line packages: layers by size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("layers", help="NxK, ... ")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", default="4")
    parser.add_argument("--rows", default=",".join(map(str, TUNED_ROWS)))
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--budget-s", type=float, default=0)
    arguments = parser.parse_args()
    sizes = [tuple(map(int, text.split("x"))) for text in arguments.layers.split(",")]
    layers = [
        LinearLayer(f"{n}x{k}", (n,), k, LayerSpec(int(bits), 128))
        for bits in arguments.bits.split(",")
        for n, k in sizes
    ]
    rows = [int(m) for m in arguments.rows.split(",")]
    tune(layers, arguments.out, rows=rows, limit=arguments.limit, budget_s=arguments.budget_s)


if __name__ == "__main__":
    main()
