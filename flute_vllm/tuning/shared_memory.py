"""Parts of a block's shared memory, counted as the C++ side of a launch does."""

from __future__ import annotations

import math

LINE = 128  # bytes of a line of memory
CLUSTER_BARRIER_BYTES = 16


def whole_lines(size: int) -> int:
    return math.ceil(size / LINE) * LINE


def slot_stride(request_bytes: int, record_bytes: int) -> int:
    """Shared memory for a request of records in the decode kernel. As in layout.cuh."""
    step = record_bytes & -record_bytes
    return whole_lines(request_bytes + max(0, LINE - step))


def cluster_room(sums: int, threads: int, value_bytes: int, ranks: int) -> int:
    """Bytes where a block of a cluster receives the others' part of ``sums`` sums. As in
    cluster_sums.cuh."""
    turns = math.ceil(math.ceil(sums / threads) / ranks)
    return (ranks - 1) * turns * threads * value_bytes
