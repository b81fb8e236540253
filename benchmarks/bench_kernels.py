"""Times the decode kernels on the layer shapes of LLaMA-3-8B and 70B (also its TP=4 shards).

    python benchmarks/bench_kernels.py LIBRARY [--bits 4,3,2] [--ms 1,2,4,8,16,32] [--sweep]

Microseconds per call, median over replays of a CUDA graph that holds the calls back to back, with
weights rotating over more than 256 MB so that L2 holds none. ``floor`` is bytes / measured read
bandwidth. ``--sweep`` tries several configurations and writes the best to ``--tuning``.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import subprocess
import sys
from dataclasses import replace

import torch
from kernel_library import Library, device

from flute_vllm import tuning

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
ROTATE_BYTES = 280e6


def event_us(function, repeats: int = 1) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / repeats


def graph_us(functions, calls: int, replays: int) -> float:
    for function in functions[:2]:
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            functions[i % len(functions)]()
    for _ in range(4):  # the first replays over fresh memory are up to 15 % slower
        graph.replay()
    torch.cuda.synchronize()
    return statistics.median(event_us(graph.replay) / calls for _ in range(replays))


def roofline() -> dict[str, float]:
    source = torch.empty(1 << 29, dtype=torch.int32, device="cuda").random_()
    target, size = torch.empty_like(source), source.numel() * 4
    torch.amax(source)
    read = size / min(event_us(lambda: torch.amax(source), 3) for _ in range(7)) / 1e6
    copy = 2 * size / min(event_us(lambda: target.copy_(source), 3) for _ in range(7)) / 1e6
    source = target = None
    a = torch.randn(8192, 8192, device="cuda").bfloat16()
    a @ a
    product = 2 * 8192**3 / statistics.median(event_us(lambda: a @ a, 2) for _ in range(5)) / 1e6
    return {"read_TBps": read, "copy_TBps": copy, "bf16_TFLOPs": product}


def sweep_candidates(problem: tuning.Problem, gpu: tuning.Device, limit: int):
    full = {}
    for config in tuning.candidates(problem, gpu):
        for slots in (0, 2, 3):
            done = tuning.complete(problem, replace(config, slots=slots), gpu)
            if done is not None:
                full[done] = tuning.efficiency(problem, done, gpu)
    return sorted(full, key=full.get, reverse=True)[:limit]


def decode_us(library, layer, records, x, y, calls, replays, config, overlap) -> float:
    config = replace(config, overlap=overlap)
    functions = [functools.partial(library.decode, layer, config, x, y, r) for r in records]
    return graph_us(functions, calls, replays)


def bench(library: Library, arguments, gpu: tuning.Device, read_tbps: float):
    best: dict[str, list[int]] = {}
    for family in arguments.families.split(","):
        for layer_name, (n, k) in SHAPES[family].items():
            for bits, group, pair, dtype in arguments.formats:
                layer = library.random_layer(n, k, bits, group, dtype, pair=pair)
                layer.qweight = None
                stored = layer.records.numel() * 4
                copies = max(2, math.ceil(ROTATE_BYTES / stored))
                records = [layer.records] + [layer.records.clone() for _ in range(copies - 1)]
                dense = [torch.randn(n, k, device="cuda").to(dtype) for _ in range(2)]
                for m in arguments.ms:
                    x = torch.randn(m, k, device="cuda").to(dtype)
                    y = x.new_empty(m, n)
                    moved = stored + 2 * m * (n + k)
                    floor = moved / read_tbps / 1e6
                    calls = copies * max(1, round(500 / (floor + 3) / copies))
                    calls = min(calls, max(copies if floor < 30 else 4, int(1500 / floor)))
                    problem = tuning.Problem(n, k, m, bits, group)
                    configs = [tuning.select(problem, gpu)]
                    if arguments.sweep:
                        configs = sweep_candidates(problem, gpu, arguments.sweep)

                    time_config = functools.partial(
                        decode_us, library, layer, records, x, y, calls, arguments.replays
                    )
                    plain, config = min(
                        ((time_config(config, 0), config) for config in configs),
                        key=lambda pair: pair[0],
                    )
                    overlapped, early = min(
                        (time_config(config, early), early) for early in (1, config.slots)
                    )
                    row = {
                        "family": family, "layer": layer_name, "n": n, "k": k, "m": m,
                        "bits": bits, "group_size": group, "lut": "pair" if pair else "scalar",
                        "dtype": str(dtype).removeprefix("torch."), "us": plain,
                        "us_overlap": overlapped, "bytes": moved, "floor_us": floor,
                        "target_us": floor / 0.88 + 2.5,
                        "config": [config.row_tiles, config.row_warps, config.splits, config.slots],
                        "peers": {},
                    }  # fmt: skip
                    if m in (1, 32) and bits == 4:
                        linear = torch.nn.functional.linear
                        functions = [functools.partial(linear, x, w) for w in dense]
                        if n * k * 4 > 150e6:  # two copies pass through L2 without hits
                            row["peers"]["cublas"] = graph_us(functions, 10, arguments.replays)
                    key = f"{n},{k},{problem.width},{bits}"
                    best[key] = row["config"]
                    print(
                        f"{family:8}{layer_name:8} W{bits}g{group:<4}{row['lut']:7}"
                        f"{row['dtype']:9}m={m:<3} {plain:6.1f} overlap {overlapped:6.1f} "
                        f"floor {floor:5.1f} target {row['target_us']:5.1f} {row['config']}",
                        flush=True,
                    )
                    yield row, best
                del records, dense, layer
                torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library")
    parser.add_argument("--families", default="8b,70b,70b_tp4")
    parser.add_argument("--formats", default="4:128", help="bits:group[:pair][:fp16], ...")
    parser.add_argument("--ms", default="1,2,4,8,16,32")
    parser.add_argument("--sweep", type=int, default=0, help="configurations to try")
    parser.add_argument("--replays", type=int, default=7)
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", default="kernels.json")
    parser.add_argument("--tuning", help="write the best configurations here")
    arguments = parser.parse_args()
    arguments.ms = [int(m) for m in arguments.ms.split(",")]
    formats = []
    for text in arguments.formats.split(","):
        bits, group, *rest = text.split(":")
        dtype = torch.float16 if "fp16" in rest else torch.bfloat16
        formats.append((int(bits), int(group), "pair" in rest, dtype))
    arguments.formats = formats
    library, gpu = Library(arguments.library), device()
    limits = roofline()
    print(limits)
    commit = (
        arguments.commit
        or subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
    )
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": commit,
        "command": " ".join(sys.argv),
        "roofline": limits,
        "rows": [],
    }
    best: dict[str, list[int]] = {}
    for row, best in bench(library, arguments, gpu, limits["read_TBps"]):  # noqa: B007
        result["rows"].append(row)
        with open(arguments.out, "w") as file:
            json.dump(result, file, indent=1)
    if arguments.tuning:
        with open(arguments.tuning, "w") as file:
            json.dump({"device": gpu.name, "commit": commit, "decode": best}, file, indent=1)


if __name__ == "__main__":
    main()
