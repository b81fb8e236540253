"""Which kernel runs with how many rows of x, decided once for a layer.

A plan is a list of entries, one for each range of M: the op looks up the entry of a call and asks
nothing else, so the choice is the same before, during and after CUDA graph capture.

Order of precedence: ``FLUTE_DECODE_CONFIG`` for the decode kernel, entries measured on this device
(``configs/tuning/<device>.json``), the heuristic of each kernel.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace

from flute_vllm.errors import FluteError
from flute_vllm.tuning import decode, planes, sm90, tile
from flute_vllm.tuning.device import Device, measured

DENSE, DECODE, SM90, TILE, PLANES = range(5)  # as in kernels/bindings_cuda.cpp
KERNEL_NAMES = ("dequantize + torch.matmul", "decode", "sm90", "tile", "bit planes")
ENTRY_NUMBERS = 10  # largest M (0: any), kernel, up to eight numbers of its config
GATES = 16  # added to the kernel where its launch can apply a gated activation
DENSE_BYTES = 256 << 20  # of a dequantized weight, at most
DENSE_PAIR_ROWS = 1024
AHEAD_ENVIRONMENT = "FLUTE_AHEAD_BYTES"
AHEAD_BYTES = 4 << 20  # of the next layer, asked for as a launch ends (NOTES.md)
SM90_BUCKETS = (
    *(16, 32, 48, 64, 96, 128, 192, 256, 384, 512),
    *(768, 1024, 1536, 2048, 3072, 4096, 6144, 8192),
)


@dataclass(frozen=True)
class Entry:
    """What runs up to ``largest_m`` rows of x; 0 stands for all above the entry before."""

    largest_m: int
    kernel: int
    config: tuple[int, ...] = ()
    why: str = ""
    gates: bool = False  # its launch can also apply the activation of flute::gemm_gated

    @property
    def numbers(self) -> list[int]:
        head = [self.largest_m, self.kernel + GATES * self.gates, *self.config]
        return head + [0] * (ENTRY_NUMBERS - len(head))


def entries(
    n: int, k: int, bits: int, group_size: int, parts: tuple[int, ...], device: Device,
    *, pair: bool = False, overlap: int = 0, environment: Mapping[str, str] = os.environ,
) -> list[Entry]:  # fmt: skip
    """The plan of a layer [n, k] whose fused matrices have ``parts`` rows, with pair tables or not.

    ``overlap`` > 0 lets a launch begin before the previous kernel has finished, where the device
    and the kernel can.
    """

    def decoding(m: int) -> Entry:
        problem = decode.Problem(n, k, m, bits, group_size, parts, pair)
        config = decode.select(problem, device, overlap=overlap, environment=environment)
        return Entry(m, DECODE, config.numbers, "few rows")

    if device.capability != 90:
        found = [decoding(m) for m in decode.LAUNCH_ROWS]
        for m in (*tile.BUCKETS, 0):
            rows = m or tile.BUCKETS[-1] + 1
            config = tile.select(tile.Problem(n, k, rows, bits, group_size, parts), device)
            found.append(Entry(m, TILE, config.numbers, "heuristic"))
        return found

    def gated(entry: Entry) -> Entry:
        problem = (n, k, entry.largest_m or SM90_BUCKETS[-1], bits, group_size, parts, pair)
        return replace(entry, gates=is_gated(entry, problem, device))

    found = []
    forced = bool(environment.get(decode.ENVIRONMENT))  # empty is unset, as in decode.select
    single_row = planes.Problem(n, k, 1, bits, group_size, parts, pair)
    config = None if forced else planes.select(single_row, device, overlap=overlap)
    if config is not None:
        origin = "measured" if planes.measured_config(single_row, device) else "heuristic"
        found.append(Entry(1, PLANES, config.numbers, f"one row at 2 bits: {origin}"))
    found += [decoding(m) for m in decode.FEW_LAUNCH_ROWS]
    table = measured(device.name, "sm90")
    simple = all(rows % decode.TILE_ROWS == 0 for rows in parts)
    for m in SM90_BUCKETS:
        problem = sm90.Problem(n, k, m, bits, group_size, parts, pair)
        keys = problem.keys_up_to(m)
        key = next((key for key in keys if key in table and simple), None)
        numbers = table[key] if key else None
        why = f"measured: configs/tuning/{device.name}.json, entry {key}"
        if m <= decode.BUCKETS[-1] and (forced or (numbers and numbers[0] == DECODE)):
            found.append(decoding(m))
            continue
        if numbers and numbers[0] == DENSE:
            found.append(Entry(m, DENSE, why=why))
            continue
        config = None
        if numbers and numbers[0] == SM90:
            config = sm90.complete(problem, sm90.Config(*numbers[1:]), device)
        if pair and config is None and m >= DENSE_PAIR_ROWS and 2 * n * k <= DENSE_BYTES:
            found.append(Entry(m, DENSE, why="the kernel for so many rows takes no pair tables"))
            continue
        if config is None:
            why, config = "heuristic", sm90.select(problem, device)
        found.append(Entry(m, SM90, (*config.numbers[:-1], config.overlap or overlap), why))
    found.append(replace(found[-1], largest_m=0))
    return [gated(entry) for entry in found]


def is_gated(
    entry: Entry, problem: tuple[int, int, int, int, int, tuple[int, ...], bool], device: Device
) -> bool:
    """Whether an entry's launch is to end with the activation; ``problem`` as in :func:`can_gate`.

    Not one that splits k: clusters of four and more find no room on some of the multiprocessors,
    twice the time (NOTES.md).
    """
    splits = entry.config[4 if entry.kernel == SM90 else 2] if entry.config else 0
    return splits == 1 and can_gate(entry, problem, device)


def can_gate(
    entry: Entry, problem: tuple[int, int, int, int, int, tuple[int, ...], bool], device: Device
) -> bool:
    """Whether an entry's launch can end with ``act(gate) * up``, gate and up being the two parts.

    ``problem``: n, k, rows of x, bits, group_size, parts, pair.
    """
    if entry.kernel == DECODE:
        config = decode.Config(*entry.config)
        return decode.launch(decode.Problem(*problem), config, device, gated=True) is not None
    if entry.kernel == PLANES:
        config = decode.Config(*entry.config)
        return planes.launch(planes.Problem(*problem), config, device, gated=True) is not None
    if entry.kernel == SM90:
        config = sm90.Config(*entry.config)
        return sm90.launch(sm90.Problem(*problem), config, device, gated=True) is not None
    return False


def workspace_bytes(
    entry: Entry,
    problem: tuple[int, int, int, int, int, tuple[int, ...], bool],
    device: Device,
) -> int:
    """What a call takes of the device's memory while it runs, besides x and y.

    ``problem`` as in :func:`can_gate`, its rows of x those of the call: the weight in 16 bits
    where it is decoded for torch's product, sums that blocks pass on where they share k.
    """
    n, k, *_ = problem
    if entry.kernel == DENSE:
        return 2 * n * k
    found: sm90.Launch | tile.Launch | None = None
    if entry.kernel == SM90:
        found = sm90.launch(sm90.Problem(*problem), sm90.Config(*entry.config), device)
    elif entry.kernel == TILE:
        found = tile.launch(tile.Problem(*problem[:-1]), tile.Config(*entry.config), device)
    return found.workspace_bytes if found else 0


def plan(
    n: int, k: int, bits: int, group_size: int, parts: tuple[int, ...], device: Device,
    *, pair: bool = False, overlap: int = 0,
) -> list[int]:  # fmt: skip
    """``entries`` as the list of numbers that ``flute::gemm`` takes."""
    found = entries(n, k, bits, group_size, parts, device, pair=pair, overlap=overlap)
    return [number for entry in found for number in entry.numbers]


def ahead_bytes(environment: Mapping[str, str] = os.environ) -> int:
    """Bytes of the next layer's weights that a launch asks L2 for; the environment may change it.

    Raises FluteError when it is no whole number of bytes.
    """
    text = environment.get(AHEAD_ENVIRONMENT, "")
    if not text:
        return AHEAD_BYTES
    if not text.isdecimal():
        raise FluteError(
            "cannot read an environment variable", where=AHEAD_ENVIRONMENT,
            why=f"{text!r} is no number of bytes",
            fix=f"unset it (then {AHEAD_BYTES} are asked for), or give a number; 0 for none",
        )  # fmt: skip
    return int(text)


def by_rows(numbers: list[int]) -> tuple[list[int], list[list[int]]]:
    """A plan taken apart for :func:`single`: limits of all entries but the last, and each entry as
    a plan of its own, for any number of rows."""
    entry_lists = [numbers[at : at + ENTRY_NUMBERS] for at in range(0, len(numbers), ENTRY_NUMBERS)]
    return [entry[0] for entry in entry_lists[:-1]], [[0, *entry[1:]] for entry in entry_lists]


def single(parts: tuple[list[int], list[list[int]]], m: int) -> list[int]:
    """The plan of only the entry for ``m`` rows.

    The op converts the whole list at every call, some 30 ns a number: 6 us for 20 entries, as
    much as the rest of an eager call.
    """
    limits, entry_lists = parts
    return entry_lists[bisect_left(limits, m)]


def entry_of(found: list[Entry], m: int) -> Entry:
    """The entry that serves m rows of x."""
    return next(entry for entry in found if entry.largest_m == 0 or m <= entry.largest_m)
