"""Results while other processes use the GPU: those of a GPU of one's own, bit for bit.

A switch between processes may come at any place of a kernel. Launches of some milliseconds meet
many; ten thousand blocks of a few rows make such a launch on a small matrix. torch's own product
is there as control: should it differ too, it is not our kernels.
"""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
from test_cuda_kernel import kernels  # noqa: F401 - a fixture

from flute_vllm import tuning

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
N, K, ROUNDS, OTHERS = 57344, 256, 20, 3
BUSY = """
import torch
a = torch.randn(4096, 4096, device="cuda").bfloat16()
print("ready", flush=True)
while True:
    for _ in range(20):
        a @ a
    torch.cuda.synchronize()
"""
# Sums shared by a cluster, by warpgroups, by both, by none; prefill; decode; torch alone.
LAUNCHES = {
    "cluster": (200, tuning.SM90, (32, 4, 2, 1, 8, 2, 2, 0)),
    "warpgroups": (257, tuning.SM90, (16, 8, 1, 4, 1, 2, 4, 0)),
    "both": (257, tuning.SM90, (16, 8, 1, 4, 4, 2, 4, 4)),
    "none": (257, tuning.SM90, (16, 4, 4, 4, 1, 2, 4, 0)),
    "prefill": (2048, tuning.SM90, (256, 2, 8, 2, 1, 2, 5, 0)),
    "spread": (300, tuning.SM90, (192, 2, 8, 2, 0, 2, 5, 0)),
    "decode": (16, tuning.DECODE, (1, 1, 2, 3, 16, 0)),
    "small decode": (8, tuning.DECODE, (1, 1, 2, 3, 8, 0)),
    "torch": (2048, None, ()),
}


@pytest.fixture(scope="module")
def launches(kernels) -> dict:  # noqa: F811
    """Calls with an output each to write to, and what they gave while the GPU was ours."""
    library, gpu = kernels
    if gpu.capability != 90:
        pytest.skip("the launches are for compute capability 9.0")
    layer = library.random_layer(N, K, 4, 256, torch.bfloat16)
    dense, found = layer.dense(), {}
    for name, (m, kernel, config) in LAUNCHES.items():
        x = torch.randn(m, K, device="cuda").bfloat16()
        if kernel is None:
            call = lambda y, x=x: torch.mm(x, dense.t(), out=y)  # noqa: E731
        else:
            entry = tuning.Entry(m, kernel, config)
            call = lambda y, x=x, entry=entry: library.run(layer, entry, x, y)  # noqa: E731
        found[name] = (call, call(x.new_empty(m, N)).clone())
    torch.cuda.synchronize()
    return found


@pytest.fixture(scope="module")
def busy(launches):
    """Other processes that keep the GPU busy, from when all expected results are there."""
    processes = [
        subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True)
        for _ in range(OTHERS)
    ]
    try:
        assert [process.stdout.readline().strip() for process in processes] == ["ready"] * OTHERS
        time.sleep(1)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize("name", LAUNCHES)
def test_results_do_not_change(name, launches, busy):
    call, expected = launches[name]
    for _ in range(ROUNDS):
        y = torch.full_like(expected, float("nan"))
        call(y)
        wrong = y != expected
        count = int(wrong.sum())
        places = wrong.nonzero()[:8].tolist() if count else []
        assert not count, f"{count} wrong, {int(y.isnan().sum())} of them NaN, first at {places}"
