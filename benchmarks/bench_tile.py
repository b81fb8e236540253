"""Times the tile kernels (more than 32 rows of x) on the layer shapes of LLaMA-3-8B and 70B.

    python benchmarks/bench_tile.py LIBRARY [--ms 64,128,256,1024] [--bits 4] [--sweep]
        [--capability 86] [--out tile.json]

Microseconds per call inside a CUDA graph, as in bench_kernels.py; beside the kernel, torch.matmul
on a dense weight, and the dense path of the package: decode all of w, then torch.matmul. ``tflops``
counts 2 M N K. ``--sweep`` times every choice of tokens and splits that is near the planned one's
expected cost, for fitting tile_plan.clocks. ``--capability`` plans as for an older device.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from dataclasses import astuple, replace

import torch
from bench_kernels import SHAPES
from kernel_library import Library, device, in_rotation

from flute_vllm.tools.timing import graph_us
from flute_vllm.tuning import tile as tile_plan


def configs_to_time(problem, gpu, sweep: bool) -> list[tile_plan.Config]:
    chosen = tile_plan.select(problem, gpu)
    if not sweep:
        return [chosen]
    limit = 1.5 * tile_plan.clocks(problem, chosen, gpu)
    near = tile_plan.candidates(problem, gpu)
    return [chosen] + [
        config
        for config in near
        if config != chosen and tile_plan.clocks(problem, config, gpu) < limit
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library")
    parser.add_argument("--families", default="8b")
    parser.add_argument("--ms", default="64,128,256,1024")
    parser.add_argument("--bits", default="4")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--capability", type=int)
    parser.add_argument("--replays", type=int, default=5)
    parser.add_argument("--out", default="tile.json")
    arguments = parser.parse_args()
    library, gpu = Library(arguments.library), device()
    if arguments.capability:
        limit = 101376 if arguments.capability in (86, 89, 120) else gpu.shared_bytes
        gpu = replace(gpu, capability=arguments.capability, shared_bytes=limit)
    rows, group = [], arguments.group
    shapes = [(f, *item) for f in arguments.families.split(",") for item in SHAPES[f].items()]
    for (family, name, (n, k)), bits in (
        (shape, int(bits)) for shape in shapes for bits in arguments.bits.split(",")
    ):
        layer = library.random_layer(n, k, bits, group, torch.bfloat16)
        layer.qweight = None
        records = [copy.records for copy in in_rotation(layer)]
        dense = [library.dequantize(layer) for _ in range(2)]
        for m in map(int, arguments.ms.split(",")):
            x = torch.randn(m, k, device="cuda").bfloat16()
            y = x.new_empty(m, n)
            time = functools.partial(graph_us, replays=arguments.replays)
            problem = tile_plan.Problem(n, k, m, bits, group)
            timed = []
            for config in configs_to_time(problem, gpu, arguments.sweep):
                space = library.tile_workspace(layer, config, m)
                functions = [
                    functools.partial(library.tile, layer, config, x, y, space, r) for r in records
                ]
                timed.append((time(functions), astuple(config)))

            def decode_and_multiply(records, layer=layer, x=x, w=dense[0], y=y):
                library._call(library.c.flute_dequantize, layer.matrix, records, layer.table, w)
                torch.matmul(x, w.t(), out=y)

            row = {
                "family": family, "layer": name, "n": n, "k": k, "m": m, "bits": bits,
                "us": timed[0][0], "config": timed[0][1], "all": timed,
                "tflops": 2e-6 * m * n * k / timed[0][0],
                "cublas_us": time([functools.partial(torch.matmul, x, w.t()) for w in dense]),
                "decode_cublas_us": time(
                    [functools.partial(decode_and_multiply, r) for r in records]
                ),
            }  # fmt: skip
            rows.append(row)
            print(
                f"{family:8}{name:8} W{bits} m={m:<5} {row['us']:8.1f} {row['tflops']:5.0f} TFLOP/s"
                f" {timed[0][1]} best {min(timed)[0]:.1f} {min(timed)[1]}"
                f" cublas {row['cublas_us']:.1f} decode+cublas {row['decode_cublas_us']:.1f}",
                flush=True,
            )
        del records, dense, layer
        torch.cuda.empty_cache()
    result = {"device": torch.cuda.get_device_name(), "command": " ".join(sys.argv), "rows": rows}
    with open(arguments.out, "w") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
