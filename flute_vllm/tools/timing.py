"""Timing on a GPU: CUDA graphs of calls back to back, measured limits of the device, time budget.

All times are microseconds. Weights must rotate over more than ROTATE_BYTES, so that L2 holds none.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch

ROTATE_BYTES = 280e6  # several times the L2 of an H200
GRAPH_US = 800.0  # wanted length of a replay: its fixed cost is then below 1 %


class Budget:
    """Wall time of a run. ``seconds`` 0: no limit."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.start = seconds, time.monotonic()

    def spent(self) -> float:
        return time.monotonic() - self.start

    def is_over(self) -> bool:
        return bool(self.seconds) and self.spent() >= self.seconds

    def reason(self) -> str:
        return f"time budget of {self.seconds:.0f} s was spent"


def copies_for(nbytes: int) -> int:
    """Copies of a weight that together leave no cache, at least two."""
    return max(2, math.ceil(ROTATE_BYTES / nbytes))


def event_us(function: Callable, repeats: int = 1) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / repeats


def calls_in_graph(functions: int, one_us: float) -> int:
    """Whole rounds of the functions that last about GRAPH_US; fewer calls where one is long."""
    if one_us * functions > 4 * GRAPH_US:
        return max(2, math.ceil(GRAPH_US / one_us))
    return functions * max(1, round(GRAPH_US / (one_us * functions)))


class CallGraph:
    """Calls of some functions in turn, inside one CUDA graph that lasts about GRAPH_US."""

    def __init__(self, functions: Sequence[Callable], estimate_us: float = 0.0) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # first calls may compile, tune or allocate
            for function in functions[:2]:
                function()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        # Launched one by one, a small kernel seems longer than it is in a graph.
        one_us = estimate_us or event_us(functions[0], 2)
        self.calls = calls_in_graph(len(functions), max(one_us, 1.0))
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for i in range(self.calls):
                functions[i % len(functions)]()
        for _ in range(4):  # the first replays over fresh memory are up to 15 % slower
            self._graph.replay()
        torch.cuda.synchronize()

    def median_us(self, replays: int) -> float:
        """Of a call."""
        times = (event_us(self._graph.replay) / self.calls for _ in range(replays))
        return statistics.median(times)

    def busy_us(self, milliseconds: float) -> float:
        """Mean time of a call in the second half of so many milliseconds without a pause.

        A server keeps the GPU as busy. Where that takes all the power that the GPU may use, its
        clock falls, and of two launches the one that needs less energy wins.
        """
        half = math.ceil(milliseconds * 500 / event_us(self._graph.replay))
        for _ in range(half):
            self._graph.replay()
        return event_us(self._graph.replay, half) / self.calls


def graph_us(functions: Sequence[Callable], replays: int, *, estimate_us: float = 0.0) -> float:
    """Median time of a call, the functions called in turn inside one CUDA graph."""
    return CallGraph(functions, estimate_us).median_us(replays)


def roofline() -> dict[str, float]:
    """Read and copy bandwidth in TB/s and bf16 products in TFLOP/s, as this device gives them."""
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
