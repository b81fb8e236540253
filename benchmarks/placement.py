"""The GPUs of a machine, and which of them each of several engines gets, by memory."""

from __future__ import annotations

import contextlib
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class Need:
    """Of one engine: GPUs, and bytes on each of them."""

    ranks: int
    nbytes: int


@dataclass(frozen=True)
class Places:
    """GPUs of each engine, and bytes on each GPU."""

    devices: list[tuple[int, ...]]
    load: list[int]


def place(needs: list[Need], gpus: int) -> Places:
    """A simple rule that keeps the fullest GPU as empty as it can.

    Engines are placed from the largest share of a GPU to the smallest, each on the neighbours
    whose fullest GPU has most room. Among equals on the last ones: what is not placed here, such as
    tests on one GPU, runs on the first.

    Raises:
        ValueError: An engine wants more GPUs than there are.
    """
    load = [0] * gpus
    devices: dict[int, tuple[int, ...]] = {}
    for index, need in sorted(enumerate(needs), key=lambda pair: -pair[1].nbytes):
        if need.ranks > gpus:
            raise ValueError(f"an engine on {need.ranks} GPUs cannot be placed on {gpus}")
        starts = range((gpus // need.ranks - 1) * need.ranks, -1, -need.ranks)
        blocks = [tuple(range(start, start + need.ranks)) for start in starts]
        devices[index] = min(blocks, key=lambda block: max(load[gpu] for gpu in block))
        for gpu in devices[index]:
            load[gpu] += need.nbytes
    return Places([devices[index] for index in range(len(needs))], load)


def visible(devices: tuple[int, ...], environment: dict[str, str]) -> dict[str, str]:
    """The variable that shows a process these GPUs only, of those that ``environment`` shows.

    Raises:
        ValueError: ``environment`` shows fewer.
    """
    if not devices:
        return {}
    shown = environment.get("CUDA_VISIBLE_DEVICES")
    known = (
        [gpu for gpu in shown.split(",") if gpu]
        if shown is not None
        else [str(gpu) for gpu in range(max(devices) + 1)]
    )
    if max(devices) >= len(known):
        raise ValueError(f"GPU {max(devices)} is none of CUDA_VISIBLE_DEVICES={shown}")
    return {"CUDA_VISIBLE_DEVICES": ",".join(known[gpu] for gpu in devices)}


def ask_gpu(field_name: str) -> str | None:
    """Of the first GPU, without starting CUDA here: children that fork could not use it."""
    command = ["nvidia-smi", f"--query-gpu={field_name}", "--format=csv,noheader,nounits"]
    with contextlib.suppress(FileNotFoundError):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.strip().splitlines()[0]
    return None


def gpu_total_bytes() -> int | None:
    total = ask_gpu("memory.total")
    return None if total is None else int(total) << 20
