"""Checks the CUDA kernels on a GPU: a grid of cases against fp64, repeatability, graphs, streams.

    python benchmarks/gpu_check.py LIBRARY [--small] [--out check.json]

A case passes when its error against an fp64 product with the exact (unrounded) weights is at most
1.5 times that of ``torch.matmul`` on the dequantized weights. Outputs are poisoned with NaN first.
``--small`` is for compute-sanitizer and for other architectures' code.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import random
import time
from dataclasses import replace

import torch
from check_gated import check_gated
from kernel_library import Library, device, relative_error

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
COUNTS = (
    *(1, 2, 3, 4, 5, 7, 8, 9, 11, 13, 15, 16, 17, 20, 23, 24, 27, 31, 32),
    *(33, 48, 57, 64, 65, 96, 100, 128, 129, 192, 200, 257, 500, 1000, 8192),
)
UNEVEN_COUNTS = (1, 5, 20, 100)  # some columns of x are far larger than the others
SMALL_COUNTS = (1, 8, 13, 32, 33, 64, 100, 128, 200, 257)


def random_entry(problem: tuple, gpu: tuning.Device, rng: random.Random) -> tuning.Entry:
    """Any legal launch of any kernel that takes so many rows: results must not depend on it."""
    m = problem[2]
    kernels = [tuning.TILE]
    kernels += [tuning.DECODE] if m <= tuning.MAX_ROWS else []
    if m == 1 and tuning.planes.takes(tuning.planes.Problem(*problem), gpu):
        kernels += [tuning.PLANES] * 4
    kernels += [tuning.SM90, tuning.SM90] if gpu.capability == 90 else []
    kernel = rng.choice(kernels)
    while True:
        if kernel == tuning.DECODE:
            splits = (1, 2, 4, 8) if gpu.capability >= 90 else (1,)
            config = tuning.Config(
                rng.choice((1, 2, 3, 5, 7, 8, 14, 31, 60, 120)), rng.choice((1, 2, 4, 8, 16)),
                rng.choice(splits), rng.choice((0, 2, 3, 6)), rng.choice(tuning.BLOCK_WARPS),
                rng.choice((0, 0, 1, 4)),
            )  # fmt: skip
            full = tuning.complete(tuning.Problem(*problem), config, gpu)
        elif kernel == tuning.PLANES:
            config = tuning.Config(
                rng.choice((1, 2, 3, 5, 8, 14, 31, 60, 120)), rng.choice(tuning.planes.ROW_WARPS),
                rng.choice((1, 2, 4, 8)), rng.choice((0, 1, 3)), tuning.planes.WARPS,
                rng.choice((0, 0, 1, 4)),
            )  # fmt: skip
            full = tuning.planes.complete(tuning.planes.Problem(*problem), config, gpu)
        elif kernel == tuning.SM90:
            prefill = rng.random() < 0.3
            columns = rng.choice(tuning.sm90.PREFILL_COLUMNS if prefill else tuning.sm90.COLUMNS)
            full = tuning.sm90.Config(
                columns,
                2 if prefill else rng.choice(tuning.sm90.WARPGROUPS[columns]),
                8 if prefill else rng.choice((1, 2, 3, 4, 6, 8, 9, 16, 23)),
                2 if prefill else rng.choice((1, 2, 4, 8)),
                rng.choice((0, 1, 2) if prefill else (1, 2, 4, 8)),
                rng.choice((1, 2, 3, 4)), rng.choice((2, 3, 4, 6)), rng.choice((0, 0, 1, 4)),
            )  # fmt: skip
            if not tuning.sm90.launch(tuning.sm90.Problem(*problem), full, gpu):
                full = None
        else:
            full = tuning.tile.Config(
                rng.choice(tuning.tile.TOKENS), rng.randint(1, 5), rng.randint(2, 5),
                rng.randint(1, 5),
            )  # fmt: skip
            if not tuning.tile.launch(tuning.tile.Problem(*problem), full, gpu):
                full = None
        if full is not None:
            return tuning.Entry(m, kernel, full.numbers)


def check_grid(library: Library, gpu: tuning.Device, small: bool) -> dict:
    rng = random.Random(0)
    cases: collections.Counter[str] = collections.Counter()
    failures = layers = 0
    worst: dict[str, float] = collections.defaultdict(float)
    for bits, group, dtype, pair in itertools.product((4, 3, 2), COLUMNS, DTYPES, (False, True)):
        columns = COLUMNS[group][1:2] if small else COLUMNS[group]
        for parts, k in itertools.product(ROWS[2:4] if small else ROWS, columns):
            n = sum(parts)
            if n > 50000 and k > 500:
                continue
            seed = layers
            layer = library.random_layer(
                n, k, bits, group, dtype, pair=pair, parts=parts, seed=seed
            )
            w = layer.dense()
            layers += 1
            if not torch.equal(library.dequantize(layer), w):
                failures += 1
                print("dequantize differs", bits, group, dtype, pair, parts, k)
            exact = layer.dense(torch.float32).double()
            plan = tuning.entries(n, k, bits, group, parts, gpu, pair=pair, environment={})
            for m in SMALL_COUNTS if small else COUNTS:
                if m * n > 1 << 25:
                    continue
                x = torch.randn(m, k, device="cuda")
                if m in UNEVEN_COUNTS:
                    x[:, :: rng.choice((5, 37, 97))] *= rng.choice((30, 300))
                x = x.to(dtype)
                reference = x.double() @ exact.t()
                bound = relative_error(x @ w.t(), reference)
                problem = (n, k, m, bits, group, parts, pair)
                for entry in (tuning.entry_of(plan, m), random_entry(problem, gpu, rng)):
                    y = torch.full((m, n), float("nan"), dtype=dtype, device="cuda")
                    library.run(layer, entry, x, y)
                    error = relative_error(y, reference)
                    kernel = tuning.KERNEL_NAMES[entry.kernel]
                    cases[kernel] += 1
                    worst[kernel] = max(worst[kernel], error / bound)
                    if not error <= 1.5 * bound:
                        failures += 1
                        if failures < 20:
                            print("failed", bits, group, dtype, pair, parts, k, m, entry, error)
    return {
        "cases": sum(cases.values()),
        "cases_of_kernel": cases,
        "layers_dequantized": layers,
        "failures": failures,
        "worst_error_ratio": max(worst.values()),
        "worst_of_kernel": worst,
    }


def check_repeats(library: Library, gpu: tuning.Device, repeats: int) -> dict:
    """Equal bits from repeated calls, and from captured graphs on two streams at once.

    ``repeats`` up to 32 rows of x, a tenth of them above.
    """
    different = calls = 0
    counts = (1, 16, 32, 64, 128, 300, 1000)
    for (n, k), m, bits in itertools.product(((4096, 4096), (2560, 8192)), counts, (4, 3, 2)):
        layer = library.random_layer(n, k, bits, 128, torch.bfloat16)
        plan = tuning.entries(n, k, bits, 128, (n,), gpu, overlap=1, environment={})
        entry = tuning.entry_of(plan, m)
        x = torch.randn(m, k, device="cuda").bfloat16()
        first = library.run(layer, entry, x, x.new_empty(m, n)).clone()
        outputs = [x.new_empty(m, n) for _ in range(2)]
        times = repeats if m <= tuning.MAX_ROWS else max(1, repeats // 10)
        calls += times
        for _ in range(times):
            different += not torch.equal(library.run(layer, entry, x, outputs[0]), first)
        graphs = [torch.cuda.CUDAGraph() for _ in outputs]
        for graph, y in zip(graphs, outputs, strict=True):
            with torch.cuda.graph(graph):
                for _ in range(4):
                    library.run(layer, entry, x, y)
        streams = [torch.cuda.Stream() for _ in outputs]
        for _ in range(times // 10 + 1):
            for graph, stream in zip(graphs, streams, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
        torch.cuda.synchronize()
        different += sum(not torch.equal(y, first) for y in outputs)
    return {"repeats": repeats, "calls": calls, "different": different}


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
    result["gated"] = check_gated(library, gpu, random_entry, arguments.small)
    result["repeats"] = check_repeats(library, gpu, 2 if arguments.small else arguments.repeats)
    result["seconds"] = round(time.time() - start, 1)
    print(json.dumps(result))
    if arguments.out:
        with open(arguments.out, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
