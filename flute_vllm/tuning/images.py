"""Which GPU code a library holds, and which of it a GPU runs.

A launch is cut for the code that runs, not for the GPU: one of a later generation than any image
runs PTX of an earlier one, which the driver compiles for it, with that one's tables and without
clusters.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

FATBIN_MAGIC = b"\x50\xed\x55\xba"
PTX, MACHINE_CODE = 1, 2
ARCHITECTURE_SPECIFIC = 0x100000  # the "a" of sm_90a
LEAST_IMAGE = 2048  # bytes; smaller ones are the CUDA runtime's own and hold no kernel


def architectures(library: Path) -> tuple[str, ...]:
    """GPU architectures in a library: "sm_90a" for machine code, "compute_80" for PTX.

    Reads the fat binaries that nvcc embeds; kinds, sizes and flags are those of CUDA 13.
    """
    content, found = library.read_bytes(), set()
    position = content.find(FATBIN_MAGIC)
    while position >= 0:
        header, size = struct.unpack_from("<6xHQ", content, position)
        entry, end = position + header, position + header + size
        while entry + 48 <= min(end, len(content)):
            kind, head, payload = struct.unpack_from("<H2xIQ", content, entry)
            number, flags = struct.unpack_from("<28xI8xQ", content, entry)
            if head < 48:
                break
            if kind == MACHINE_CODE and payload >= LEAST_IMAGE:
                found.add((number, "sm_", "a" if flags & ARCHITECTURE_SPECIFIC else ""))
            elif kind == PTX and payload >= LEAST_IMAGE:
                found.add((number, "compute_", ""))
            entry += head + payload
        position = content.find(FATBIN_MAGIC, position + 4)
    return tuple(f"{prefix}{number}{suffix}" for number, prefix, suffix in sorted(found))


def code_for(capability: str, images: Iterable[str]) -> int | None:
    """The architecture (80, 90, ...) whose code a GPU of ``capability`` ("9.0") runs; None: none.

    As the driver chooses: machine code of its own generation up to its own number, the latest of
    it; else the latest PTX that is not newer. Code with an "a" runs on exactly its architecture.
    """
    major, minor = map(int, capability.split("."))
    own = major * 10 + minor
    machine, ptx = [], []
    for image in images:
        kind, _, number = image.partition("_")
        if number.endswith("a"):
            machine += [own] if int(number[:-1]) == own else []
        elif int(number) <= own and kind == "compute":
            ptx.append(int(number))
        elif int(number) <= own and int(number) // 10 == major:
            machine.append(int(number))
    return max(machine or ptx, default=None)
