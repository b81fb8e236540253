"""Checks the CUDA kernels on a GPU: a grid of cases against fp64, repeatability, graphs, streams.

    python benchmarks/gpu_check.py LIBRARY [--small] [--out check.json]

A case passes when its error against an fp64 product with the exact (unrounded) weights is at most
1.5 times that of ``torch.matmul`` on the dequantized weights. Outputs are poisoned with NaN first.
``--small`` is for compute-sanitizer and for other architectures' code.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from dataclasses import replace

import torch
from kernel_library import Library, device

from flute_vllm import tuning

DTYPES = (torch.bfloat16, torch.float16)
# Every list has a K that is no multiple of 128, or else an odd number of tiles.
COLUMNS = {
    32: (32, 160, 1056),
    64: (64, 192, 1088),
    128: (128, 1152, 4096),
    256: (256, 2304, 4352),
    -1: (32, 416, 2048),
}
ROWS = ((16,), (24,), (37, 63), (333,), (1024, 256, 256), (57344,))
COUNTS = (1, 2, 3, 4, 5, 7, 8, 9, 11, 13, 15, 16, 17, 20, 23, 24, 27, 31, 32)


def relative_error(y: torch.Tensor, reference: torch.Tensor) -> float:
    error = ((y.double() - reference).norm() / reference.norm()).item()
    return error if error == error else float("inf")


def random_config(problem: tuning.Problem, gpu: tuning.Device, rng: random.Random):
    """Any legal configuration: results must not depend on the choice."""
    splits = (1, 2, 4, 8) if gpu.capability >= 90 else (1,)
    while True:
        rows, warps = rng.choice((1, 2, 3, 5, 7, 8, 14)), rng.choice((1, 2, 4, 8, 16))
        config = tuning.Config(rows, warps, rng.choice(splits), rng.choice((0, 2, 3, 6)))
        full = tuning.complete(problem, config, gpu)
        if full is not None:
            return replace(full, overlap=rng.choice((0, 0, 1, 4)))


def check_grid(library: Library, gpu: tuning.Device, small: bool) -> dict:
    rng = random.Random(0)
    cases = failures = layers = 0
    worst = 0.0
    counts = (1, 8, 13, 32) if small else COUNTS
    for bits, group, dtype, pair in itertools.product((4, 3, 2), COLUMNS, DTYPES, (False, True)):
        columns = COLUMNS[group][1:2] if small else COLUMNS[group]
        for parts, k in itertools.product(ROWS[2:4] if small else ROWS, columns):
            n = sum(parts)
            if n > 50000 and k > 500:
                continue
            layer = library.random_layer(
                n, k, bits, group, dtype, pair=pair, parts=parts, seed=cases
            )
            w = layer.dense()
            layers += 1
            if not torch.equal(library.dequantize(layer), w):
                failures += 1
                print("dequantize differs", bits, group, dtype, pair, parts, k)
            exact = layer.dense(torch.float32).double()
            for m in counts:
                x = torch.randn(m, k, device="cuda").to(dtype)
                reference = x.double() @ exact.t()
                bound = relative_error(x @ w.t(), reference)
                problem = tuning.Problem(n, k, m, bits, group, parts)
                chosen = tuning.select(problem, gpu, environment={})
                for config in (chosen, random_config(problem, gpu, rng)):
                    y = torch.full((m, n), float("nan"), dtype=dtype, device="cuda")
                    library.decode(layer, config, x, y)
                    error = relative_error(y, reference)
                    cases += 1
                    worst = max(worst, error / bound)
                    if not error <= 1.5 * bound:
                        failures += 1
                        if failures < 20:
                            print("failed", bits, group, dtype, pair, parts, k, m, config, error)
    return {
        "cases": cases,
        "layers_dequantized": layers,
        "failures": failures,
        "worst_error_ratio": worst,
    }


def check_repeats(library: Library, gpu: tuning.Device, repeats: int) -> dict:
    """Equal bits from repeated calls, and from captured graphs on two streams at once."""
    different = 0
    for (n, k), m, bits in itertools.product(((4096, 4096), (2560, 8192)), (1, 16, 32), (4, 3, 2)):
        layer = library.random_layer(n, k, bits, 128, torch.bfloat16)
        config = tuning.select(tuning.Problem(n, k, m, bits, 128), gpu, overlap=1, environment={})
        x = torch.randn(m, k, device="cuda").bfloat16()
        first = library.decode(layer, config, x, x.new_empty(m, n))
        outputs = [x.new_empty(m, n) for _ in range(2)]
        for _ in range(repeats):
            different += not torch.equal(library.decode(layer, config, x, outputs[0]), first)
        graphs = [torch.cuda.CUDAGraph() for _ in outputs]
        for graph, y in zip(graphs, outputs, strict=True):
            with torch.cuda.graph(graph):
                for _ in range(4):
                    library.decode(layer, config, x, y)
        streams = [torch.cuda.Stream() for _ in outputs]
        for _ in range(repeats // 10 + 1):
            for graph, stream in zip(graphs, streams, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
        torch.cuda.synchronize()
        different += sum(not torch.equal(y, first) for y in outputs)
    return {"repeats": repeats, "different": different}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--capability", type=int, help="treat the GPU as an older one, e.g. 80")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    library, gpu, start = Library(arguments.library), device(), time.time()
    if arguments.capability:
        gpu = replace(gpu, name="forced", capability=arguments.capability)
    result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    result["grid"] = check_grid(library, gpu, arguments.small)
    result["repeats"] = check_repeats(library, gpu, 2 if arguments.small else arguments.repeats)
    result["seconds"] = round(time.time() - start, 1)
    print(json.dumps(result))
    if arguments.out:
        with open(arguments.out, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
