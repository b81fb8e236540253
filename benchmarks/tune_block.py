"""Chooses launches by the time of a whole decoder block on a GPU that is never idle.

    python benchmarks/tune_block.py LIBRARY [--models 8b,70b] [--ms 16,32,128] [--out FILE]

``flute-vllm tune`` times one layer at a time. A server runs blocks, for hours: where products take
all the power that the GPU may use, its clock depends on the energy of all launches, and norms and
attention stand between the layers. Here one layer's launch is exchanged at a time, in a graph of
whole blocks; the candidates take turns, so that the drift of the clock meets all of them, and the
best stays for the next layer. Attention stands as a kernel that reads as many bytes as keys and
values of ``--context`` tokens take.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from bench_block import Block
from bench_kernels import head_commit
from kernel_library import Library, device
from model_shapes import MODELS, cache_bytes, linear_shapes

from flute_vllm import tuning
from flute_vllm.format import LayerSpec
from flute_vllm.tools import tune
from flute_vllm.tools.layers import LinearLayer
from flute_vllm.tools.timing import Budget, CallGraph

BITS, GROUP_SIZE = 4, 128
TURN_MS = 16.0  # of one candidate without a pause
ROUNDS = 6  # of turns; the first does not count
REPLACES_US = 0.15  # so much faster must a block be with another launch


def candidates(block: Block, name: str, m: int, known: dict, limit: int) -> list[tuning.Entry]:
    """The launch that runs now, those that were fastest alone, the heuristic's favourites."""
    n, k = block.shapes[name]
    layer = LinearLayer(name, block.parts(name), k, LayerSpec(BITS, GROUP_SIZE))
    found = [block.entries(m)[name]]
    found += [tuning.Entry(m, kernel, tuple(c)) for _, kernel, *c in known.get((n, k, m), [])]
    found += tune.candidates(layer, m, block.gpu, limit)
    problem = (n, k, m, BITS, GROUP_SIZE, layer.parts, False)
    unique = {
        (entry.kernel, entry.config): replace(
            entry, largest_m=m, gates=tuning.is_gated(entry, problem, block.gpu)
        )
        for entry in found
    }
    return list(unique.values())


def in_turns(graphs: list[CallGraph]) -> list[float]:
    """Microseconds of a call of each graph, the GPU busy throughout."""
    ms = [graph.busy_us(1.0) * graph.calls / 1e3 for graph in graphs]
    times = [
        [graph.busy_us(max(TURN_MS, 4 * one)) for graph, one in zip(graphs, ms, strict=True)]
        for _ in range(ROUNDS)
    ]
    return [statistics.median(found) for found in zip(*times[1:], strict=True)]


def tune_block(block: Block, m: int, cache: torch.Tensor, known: dict, limit: int) -> Iterator:
    """For each layer its name, and microseconds of a block with each launch, the best first."""

    def attention(qkv: torch.Tensor, width: int) -> torch.Tensor:
        torch.amax(cache)
        return qkv[:, :width] * 0.5

    best = block.entries(m)
    for name in block.shapes:
        entries = candidates(block, name, m, known, limit)
        graphs = [
            CallGraph(block.calls(m, "ours", "gated", entries={**best, name: entry},
                                  attention=attention))
            for entry in entries
        ]  # fmt: skip
        times = in_turns(graphs)
        fastest = min(range(len(times)), key=times.__getitem__)
        if times[fastest] < times[0] - REPLACES_US:
            best[name] = entries[fastest]
        ranked = sorted(zip(times, entries, strict=True), key=lambda pair: pair[0])
        us = [[round(us, 2), entry.kernel, *entry.config] for us, entry in ranked]
        yield name, {"now": [round(times[0], 2), entries[0].kernel, *entries[0].config], "us": us}
        del graphs


def write(result: dict, path: Path) -> None:
    """One row a line."""
    rows = [json.dumps(row, separators=(",", ":")) for row in result["rows"]]
    head = json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=1)
    path.write_text(head[:-2] + ',\n "rows": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("library")
    parser.add_argument("--models", default="8b,70b", help="of model_shapes.py; 70b:2 on two GPUs")
    parser.add_argument("--ms", default="16,32,64,128")
    parser.add_argument("--context", type=int, default=300, help="tokens of each sequence")
    parser.add_argument("--limit", type=int, default=10, help="launches of the heuristic's")
    parser.add_argument("--known", type=Path, help="launches.json: take its best, too")
    parser.add_argument("--known-limit", type=int, default=6)
    parser.add_argument("--budget-s", type=float, default=0, help="then rows are left out")
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path, default=Path("block_launches.json"))
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    library, gpu, budget = Library(arguments.library), device(), Budget(arguments.budget_s)
    known: dict[tuple[int, int, int], list] = {}
    if arguments.known:
        for row in json.loads(arguments.known.read_text())["rows"]:
            if row["bits"] == BITS:
                key = (row["n"], row["k"], row["m"])
                known[key] = row["us"][: arguments.known_limit]
    result = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "commit": arguments.commit or head_commit(), "command": "python " + " ".join(sys.argv),
        "columns": "us of a block, kernel (tuning/plan.py), its config", "left_out": [],
        "rows": [],
    }  # fmt: skip
    for text in arguments.models.split(","):
        model, _, ranks = text.partition(":")
        count = int(ranks or 1)
        shapes = linear_shapes(model, count)
        block = Block(library, gpu, shapes)
        for m in map(int, arguments.ms.split(",")):
            if budget.is_over():
                result["left_out"].append([text, m])
                continue
            per_layer = cache_bytes(model, count) // MODELS[model]["num_hidden_layers"]
            cache = torch.zeros(m * arguments.context * per_layer // 4, device="cuda")
            for name, times in tune_block(block, m, cache, known, arguments.limit):
                n, k = shapes[name]
                row = {"model": text, "layer": name, "n": n, "k": k, "m": m}
                result["rows"].append(row | times)
                write(result, arguments.out)  # what is measured stays, whatever comes
                best, now = times["us"][0], times["now"]
                print(f"{budget.spent():4.0f}s {text} m={m} {name}: {now} best {best}", flush=True)
        del block
        torch.cuda.empty_cache()
    write(result, arguments.out)


if __name__ == "__main__":
    main()
