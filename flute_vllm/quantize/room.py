"""How much memory this process can still get, and whether an error means that it got too little."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch


def available_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of host memory that this process can still get: the least that any limit leaves.

    Limits are the machine's size, what /proc/meminfo calls available, and those of the process's
    control groups, of version 1 or 2; systems without the latter two have only the first.

    Args:
        proc, groups: where the kernel tells of them.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for line in _lines(proc / "meminfo"):
        if line[0] == "MemAvailable:":
            limits.append(1024 * int(line[1]))
    return min([*limits, *_left_in_groups(proc, groups)])


def _left_in_groups(proc: Path, groups: Path) -> Iterator[int]:
    """Bytes below the limit of each control group that this process is in, and of those above."""
    for line in _lines(proc / "self" / "cgroup"):
        _, controllers, path = " ".join(line).split(":", 2)
        if not controllers:
            root, names = groups, ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            root = groups / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        folder = root / path.lstrip("/")
        # In a container the path may be that of the host, where only the root is there.
        for place in (folder, *folder.parents):
            limit, usage = (next(_lines(place / name), ["max"])[0] for name in names[:2])
            if "max" not in (limit, usage):
                stat = {line[0]: int(line[1]) for line in _lines(place / "memory.stat")}
                # Files that were read count as used, but are dropped before a process is ended.
                cached = sum(
                    stat.get(f"{names[2]}{kind}_file", 0) for kind in ("active", "inactive")
                )
                yield int(limit) - int(usage) + cached
            if place == root:
                break


def _lines(path: Path) -> Iterator[list[str]]:
    """The words of each line of a file of the kernel's; nothing where there is none."""
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            yield line.split()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: that of a CPU's memory has no type of its own in torch."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    told = ("can't allocate memory", "ALLOC_FAILED")  # torch's CPU allocator; CUDA's libraries
    return isinstance(error, RuntimeError) and any(part in str(error) for part in told)
