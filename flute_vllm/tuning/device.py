"""What a choice of launch depends on besides the problem: the device, and measurements."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flute_vllm.resources import data_path
from flute_vllm.tuning.images import architectures, code_for

if TYPE_CHECKING:
    import torch

TILE_ROWS, TILE_K = 16, 128  # of a record, kernels/cuda/layout.cuh
SHARED_RESERVED = 1024  # the system's share at the start of a block's shared memory
CONFIG_FOLDER = data_path("configs", "tuning")


@dataclass(frozen=True)
class Device:
    """What a choice depends on."""

    name: str
    multiprocessors: int
    shared_bytes: int  # a block's limit
    capability: int  # 80, 90, ...: of the code that it runs, see images.py

    @property
    def wide_table(self) -> bool:
        return self.capability in (80, 87) or 90 <= self.capability < 120

    def blocks_at_once(self, splits: int) -> int:
        # Multiprocessors come in groups of up to 18; clusters of 4 leave some of them idle.
        clusters = self.multiprocessors // splits
        return (clusters if splits <= 2 else clusters * 10 // 11) * splits


H200 = Device("h200", 132, 232448, 90)


@functools.cache
def device_of(place: torch.device) -> Device:
    """The Device of a CUDA device; its name is that of the file in ``configs/tuning``."""
    import torch

    from flute_vllm import ops

    properties = torch.cuda.get_device_properties(place)
    images = architectures(ops.LIBRARY) if ops.LIBRARY.is_file() else ()
    return Device(
        table_name(properties.name, properties.multi_processor_count),
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        code_for(f"{properties.major}.{properties.minor}", images)
        or properties.major * 10 + properties.minor,
    )


def table_name(gpu: str, multiprocessors: int) -> str:
    """Name of the file of measured launches for a GPU that CUDA calls ``gpu``.

    A slice of an H200 (MIG) or a GH200 has other launches than the whole H200 of the file.
    """
    is_whole = gpu.startswith("NVIDIA H200") and multiprocessors == H200.multiprocessors
    return H200.name if is_whole else gpu


@functools.cache
def measured(
    device_name: str, section: str, folder: Path = CONFIG_FOLDER
) -> Mapping[str, list[int]]:
    """A section of ``<device>.json``, empty where there is none.

    ``decode``: "n,k,M,bits", M one of LAUNCH_ROWS -> row_tiles, row_warps, splits[, slots[,
    warps]]. ``planes``: "n,k" -> the same five. ``sm90``: "n,k,M,bits" -> kernel, then the numbers
    of its config. Such keys are of single values in groups of 128 and longer; ",64", ",32" and,
    for tables of pairs, ",128,pair" and the like behind them tell other kinds of records, which
    the former serve, too, where they have no entry of their own (problem.py).
    """
    path = folder / f"{device_name}.json"
    return json.loads(path.read_text()).get(section, {}) if path.is_file() else {}
