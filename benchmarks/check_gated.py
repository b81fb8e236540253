"""Gated products, act(gate) * up, against fp64: the part of ``gpu_check.py`` on them.

Each case runs as the plan says, and with launches drawn at random that can apply the activation.
``torch`` as the bound: matmul with the dequantized weight, then the activation as a model without
fusion computes it, in 16 bits.
"""

from __future__ import annotations

import collections
import itertools
import math
import random

import torch
from kernel_library import Layer, Library, relative_error

from flute_vllm import ops, tuning
from flute_vllm.ops import Activation

HALVES = (16, 40, 333, 1024, 7168)
COLUMNS = {32: (160, 1056), 64: (192, 1088), 128: (1152, 4096), -1: (416, 2048)}
COUNTS = (1, 2, 5, 8, 9, 16, 17, 32, 48, 64, 96, 128, 200, 500)
GATED_LIMIT = 1.5  # of torch's error
DRAWS = 2  # launches at random of each case
BOUND_ROWS, FEWEST_OUTPUTS = 512, 1000


def gate(y: torch.Tensor, activation: Activation) -> torch.Tensor:
    first, second = y.chunk(2, dim=-1)
    return ops.activate(first, activation) * second


def random_gate(random_entry, problem: tuple, gpu: tuning.Device, rng) -> tuning.Entry | None:
    """A launch at random that can gate; None where twenty could not."""
    for _ in range(20):
        entry = random_entry(problem, gpu, rng)
        if tuning.can_gate(entry, problem, gpu):
            return tuning.Entry(entry.largest_m, entry.kernel, entry.config, gates=True)
    return None


def check_gated(library: Library, gpu: tuning.Device, random_entry, small: bool) -> dict:
    """Counts of cases by kernel and of failures; the worst error in shares of torch's."""
    rng = random.Random(1)
    cases: collections.Counter[str] = collections.Counter()
    failures, worst = 0, 0.0
    formats = itertools.product((4, 3, 2), COLUMNS, (torch.bfloat16, torch.float16), (False, True))
    for number, (bits, group, dtype, pair) in enumerate(formats):
        for half, k in itertools.product(HALVES, COLUMNS[group][:1] if small else COLUMNS[group]):
            parts, activation = (half, half), Activation(1 + number % len(Activation))
            layer = library.random_layer(2 * half, k, bits, group, dtype, pair=pair, parts=parts)
            exact, dense = layer.dense(torch.float32).double(), layer.dense()
            plan = tuning.entries(2 * half, k, bits, group, parts, gpu, pair=pair, environment={})
            # Of few outputs one is most of the error, ours or torch's by chance: torch's is that of
            # many, and launches of few rows are judged together.
            x = torch.randn(BOUND_ROWS, k, device="cuda").to(dtype) / k**0.5
            bound = relative_error(
                gate(x @ dense.t(), activation), gate(x.double() @ exact.t(), activation)
            )
            for m in COUNTS[::3] if small else COUNTS:
                times = math.ceil(FEWEST_OUTPUTS / (m * half))
                x = torch.randn(times, m, k, device="cuda").to(dtype) / k**0.5
                reference = gate(x.double() @ exact.t(), activation)
                problem = (2 * half, k, m, bits, group, parts, pair)
                found = [tuning.entry_of(plan, m)]
                if gpu.capability == 90 and m <= 200:
                    draws = [random_gate(random_entry, problem, gpu, rng) for _ in range(DRAWS)]
                    found += [entry for entry in draws if entry]
                for entry in found:
                    y = torch.full((times, m, half), float("nan"), dtype=dtype, device="cuda")
                    for rows, out in zip(x, y, strict=True):
                        run_gated(library, layer, entry, activation, rows, out)
                    error = relative_error(y, reference)
                    name = tuning.KERNEL_NAMES[entry.kernel]
                    cases[name if entry.gates else f"{name}, then activate"] += 1
                    worst = max(worst, error / bound)
                    if not error <= GATED_LIMIT * bound:
                        failures += 1
                        if failures < 20:
                            print(
                                "failed gated", bits, group, dtype, pair, half, k, m, entry, error
                            )
    return {"cases": sum(cases.values()), "cases_of_kernel": cases, "failures": failures,
            "worst_error_ratio": worst}  # fmt: skip


def run_gated(
    library: Library, layer: Layer, entry: tuning.Entry, activation: Activation, x: torch.Tensor,
    y: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """What ``flute::gemm_gated`` does with an entry of a plan; y [m, n / 2]."""
    if entry.gates:
        return library.run(layer, entry, x, y, activation=activation)
    gate_up = torch.full((x.shape[0], layer.matrix.n), float("nan"), dtype=x.dtype, device="cuda")
    return library.activate(library.run(layer, entry, x, gate_up), activation, y)
