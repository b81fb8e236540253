"""Which launches ``sanitize.py`` checks: those that reach every kernel first, then all formats."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from sanitize_case import Case

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from flute_vllm import tuning  # noqa: E402

KERNELS = ("decode", "planes", "sm90", "prefill", "tile", "dequantize", "activate", "norm")
COLUMNS_OF = {32: 1056, 64: 1088, 128: 1152, 256: 2304, -1: 416}  # K, by group size
FEW_TILES = ((1, 1, 1), (4, 4, 2), (2, 16, 1), (3, 2, 8), (2, 1, 4))
# Decode blocks: most rows of x, warps, most row tiles of a warp. Some ways to cut a launch of each.
DECODE_CUTS = {
    (8, 16, 2): FEW_TILES,
    (8, 16, 4): ((3, 1, 1), (4, 1, 2), (7, 2, 4)),
    (8, 16, 8): ((5, 1, 1), (8, 1, 8), (15, 2, 2)),
    (8, 8, 4): ((1, 1, 1), (7, 2, 2), (4, 8, 1)),
    (8, 8, 8): ((7, 1, 1), (9, 2, 4), (5, 1, 2)),
    (16, 16, 4): FEW_TILES,
    (32, 16, 2): FEW_TILES,
}
PARTS = ((), (37, 63), (24,), (40, 16, 44), (129,))  # of a layer; (): one of 333 rows


def cases() -> Iterator[Case]:
    """First every compiled block of every kernel once, and what few launches do; then all of a
    kernel with few cases; then for each block all widths of codes with groups of 32, 64 and more,
    kernel after kernel in turn."""
    seen: set[Case] = set()
    later = (decode_cases(), sm90_cases(), prefill_cases(), tile_cases(), dequantize_cases())
    for case in (*first_cases(), *planes_cases(), *in_turn(*later)):
        if case not in seen:
            seen.add(case)
            yield case


def first_cases() -> Iterator[Case]:
    def found(
        kind: str, m: int, *wishes: tuple[int, ...], n: int = 333, k: int = 1056, **fields
    ) -> Iterator[Case]:
        group = 32 if k % 128 else 128
        for wish in wishes:
            case = replace(Case(kind, n, k, 4, group), **({"m": m} | fields))
            launch = configured(case, wish)
            if launch is None:
                raise ValueError(f"no launch {wish} of {case}")
            yield launch

    parts = {"n": 100, "parts": (37, 63)}
    pair, half = {"pair": True}, {"dtype": "float16"}
    yield from found("sm90", 33, (64, 4, 4, 4, 1), ahead=1 << 20, **parts)
    yield from found("prefill", 300, (192, 2, 8, 2, 1), **half, **parts)
    yield from found("tile", 100, (64, 3), **pair)
    yield from found("decode", 8, (2, 1, 1), ahead=4096, **parts)
    # Both halves of a gated product in one cluster, alone and with others that split k.
    halves = {"n": 200, "parts": (100, 100)}
    yield from found("decode", 8, (3, 1, 1), launches=2, activation=1, **halves)
    yield from found("decode", 5, (7, 1, 2, 0, 8), activation=2, **pair, **halves)
    two_bits = {"bits": 2, "group_size": -1}
    yield from found("planes", 1, (3, 2, 1), activation=1, launches=2, **two_bits, **halves)
    yield from found("planes", 1, (2, 4, 4), **two_bits, **half)
    yield from found("sm90", 40, (64, 4, 4, 4, 1), launches=2, activation=3, **halves)
    yield from found("sm90", 13, (16, 8, 3, 2, 2), activation=1, **half, **halves)
    yield from found("activate", 7, (), activation=1, launches=2, n=400)
    yield from found("activate", 300, (), activation=2, **half, **halves)
    yield from found("norm", 3, (), launches=2, k=4096)
    yield from found("norm", 200, (), k=8224, **half)
    yield from found("decode", 5, (7, 1, 1, 0, 8), launches=3, ahead=4096, **pair)
    yield from found("decode", 8, (3, 1, 2, 0, 8), launches=2, **half, **parts)
    yield from found("decode", 1, (7, 2, 1), (7, 1, 2), **half)
    yield from found("sm90", 13, (16, 8, 13, 4, 1), launches=3, **pair)
    yield from found("sm90", 13, (16, 4, 3, 1, 4), ahead=4096, **half)
    yield from found("prefill", 257, (256, 2, 8, 2, 2), launches=2)
    yield from found("tile", 129, (128, 1), **half, **parts)
    yield from found("decode", 13, (4, 4, 4), launches=3, ahead=1 << 20, **pair)
    yield from found("sm90", 31, (32, 8, 8, 2, 2), **half, **parts)
    yield from found("sm90", 17, (32, 4, 9, 4, 1), launches=2, ahead=4096)
    yield from found("sm90", 129, (128, 4, 16, 4, 2), **pair, **parts)
    yield from found("prefill", 129, (192, 2, 8, 2, 2))
    yield from found("dequantize", 1, (), **pair, **parts)
    yield from found("tile", 33, (64, 1), (64, 9), **parts)
    yield from found("tile", 257, (128, 9), launches=2)
    yield from found("decode", 32, (4, 4, 8), launches=2, **half)
    # One request is more than the records of such a layer; one block is less than a round.
    yield from found("decode", 1, (1, 1, 1), n=16, k=128, ahead=4096)
    yield from found("sm90", 9, (16, 4, 4, 4, 1), n=16, k=128, ahead=4096)
    # More blocks than a round of them: only the last round asks ahead.
    yield from found("decode", 3, (1, 16, 1), n=2233, k=256, ahead=1 << 20)
    yield from found("sm90", 9, (16, 4, 1, 1, 1), n=2233, k=256, ahead=1 << 20)
    # Whole rounds of prefill blocks, then clusters that share a last one; shares without a k tile.
    yield from found("prefill", 1147, (192, 2, 8, 2, 2), n=2939, k=256)
    yield from found("prefill", 1147, (192, 2, 8, 2, 2), n=2939, k=544)
    yield from found("prefill", 1147, (192, 2, 8, 2, 1), n=2939, k=256)
    yield from found("prefill", 200, (256, 2, 8, 2, 2), k=128)
    # k spread over all blocks: less than a round of tiles, and more; two launches with one set of
    # flags.
    yield from found("prefill", 300, (256, 2, 8, 2, 0), n=1000, k=2048, launches=2)
    yield from found("prefill", 1147, (192, 2, 8, 2, 0), n=2939, k=1056)
    yield from found("sm90", 9, (16, 8, 4, 1, 8), k=128)


def in_turn(*lists: Iterable[Case]) -> Iterator[Case]:
    """One of each list after another, so that they end together: longer lists come more often."""
    all_of = [list(items) for items in lists]
    places = [(i / len(items), at, i) for at, items in enumerate(all_of) for i in range(len(items))]
    return (all_of[at][i] for _, at, i in sorted(places))


class Formats:
    """Layers for one kernel: what need not meet everything else goes round in cycles, of periods
    that leave no two of them in step."""

    def __init__(self, kind: str, *, pairs: bool = True, larger: int = 1) -> None:
        self.kind, self.larger = kind, larger
        kinds = [(d, p) for p in (False, True) for d in ("bfloat16", "float16") if pairs or not p]
        self.kinds = itertools.cycle(list(itertools.islice(itertools.cycle(kinds), 7)))
        self.parts = itertools.cycle(PARTS)
        self.large_groups = itertools.cycle((128, 256, -1))
        # Launches in a row overlap: each reads records before the one ahead of it has ended.
        self.launches = itertools.cycle((1, 3, 1, 1, 2, 1, 1, 1))
        self.ahead = itertools.cycle((0, 4096, 0, 1 << 20))

    def __iter__(self) -> Iterator[Case]:
        """Every width of codes with groups of 32, of 64, and ``larger`` of the larger ones."""
        for bits in (4, 3, 2):
            for group in (32, 64, *itertools.islice(self.large_groups, self.larger)):
                (dtype, pair), parts = next(self.kinds), next(self.parts)
                launches, ahead = next(self.launches), next(self.ahead)
                yield Case(
                    self.kind, sum(parts) or 333, COLUMNS_OF[group], bits, group, dtype, pair,
                    parts, launches=1 if self.kind == "dequantize" else launches,
                    ahead=ahead if self.kind in ("decode", "sm90") else 0,
                )  # fmt: skip
        next(self.large_groups)  # the next time others

    def launched(
        self, rows: Iterable[int], wishes: Iterable[tuple], ends: Iterator[tuple]
    ) -> list[Case]:
        """With so many rows of x, and the first of the next few wishes that a launch accepts."""
        tries, counts = itertools.cycle(wishes), itertools.cycle(rows)
        return [first_legal(replace(case, m=next(counts)), tries, next(ends)) for case in self]


def decode_cases() -> Iterator[Case]:
    formats, rows = Formats("decode"), {8: (1, 8, 5), 16: (9, 16, 13), 32: (17, 32, 31)}
    slots = itertools.cycle((0, 0, 3, 0))
    return in_turn(
        *[
            formats.launched(rows[width], cuts, ((next(slots), warps) for _ in itertools.count()))
            for (width, warps, _), cuts in DECODE_CUTS.items()
        ]
    )


def planes_cases() -> Iterator[Case]:
    """The kernel takes only 2 bits, one row of x and groups of whole tiles."""
    cuts = itertools.cycle(((1, 1, 1), (5, 4, 2), (2, 32, 1, 1), (7, 2, 8), (3, 1, 4, 1)))
    launches, parts = itertools.cycle((1, 3, 1)), itertools.cycle(PARTS)
    for group, dtype in itertools.product((128, 256, -1), ("bfloat16", "float16")):
        rows = next(parts)
        case = Case(
            "planes", sum(rows) or 333, COLUMNS_OF[group], 2, group, dtype, parts=rows,
            launches=next(launches), ahead=4096,
        )  # fmt: skip
        yield first_legal(case, cuts, ())


def sm90_cases() -> Iterator[Case]:
    formats = Formats("sm90")
    rows = {16: (9, 13, 16, 33), 32: (17, 31, 9, 100), 64: (33, 64, 100, 129), 128: (100, 129, 257)}
    cuts = ((4, 4, 1), (8, 2, 2), (13, 4, 1), (3, 1, 4), (23, 8, 1), (4, 4, 8), (4, 1, 1))
    stages = itertools.cycle(((), (1, 2), (), (2, 3)))  # few: a ring that wraps soon
    blocks = [(c, w) for c in tuning.sm90.COLUMNS for w in tuning.sm90.WARPGROUPS[c]]
    return in_turn(
        *[formats.launched(rows[b[0]], [(*b, *cut) for cut in cuts], stages) for b in blocks]
    )


def prefill_cases() -> Iterator[Case]:
    formats = Formats("prefill", pairs=False, larger=2)
    rows = {192: (129, 300, 192), 256: (257, 300, 129)}
    stages = itertools.cycle(((), (1, 4), (), (3, 0), (1, 3)))
    return in_turn(
        *[
            formats.launched(
                rows[columns], [(columns, 2, 8, 2, splits) for splits in (1, 2, 4, 0)], stages
            )
            for columns in tuning.sm90.PREFILL_COLUMNS
        ]
    )


def tile_cases() -> Iterator[Case]:
    formats, rows = Formats("tile", larger=2), {64: (33, 9, 100, 64, 17), 128: (129, 100, 257, 300)}
    slots = itertools.cycle(((), (2, 2), ()))
    return in_turn(
        *[
            formats.launched(rows[tokens], [(tokens, s) for s in (1, 3, 2, 1, 4)], slots)
            for tokens in tuning.tile.TOKENS
        ]
    )


def dequantize_cases() -> Iterator[Case]:
    return iter(Formats("dequantize", larger=3))


def first_legal(case: Case, wishes: Iterator[tuple], end: tuple[int, ...]) -> Case:
    """``end``: what follows the wish, such as how deep the rings are to be, where that fits."""
    for wish in itertools.islice(wishes, 12):
        for rest in (end, (0, *end[1:]) if case.kind == "decode" else ()):
            if (found := configured(case, (*wish, *rest))) is not None:
                return found
    raise ValueError(f"no launch of {case}")


def configured(case: Case, wish: tuple[int, ...]) -> Case | None:
    """The case with a launch that begins like ``wish``; None where that is not legal."""
    sizes = (case.n, case.k, case.m, case.bits, case.group_size, case.parts)
    overlap = 1 if case.launches > 1 else 0
    full: tuning.Config | tuning.sm90.Config | tuning.tile.Config | None
    if case.kind in ("dequantize", "activate", "norm"):
        return case
    if case.kind == "decode":
        config = tuning.Config(*wish)
        full = tuning.complete(
            tuning.Problem(*sizes), replace(config, overlap=overlap), tuning.H200
        )
    elif case.kind == "planes":
        config = replace(tuning.Config(*wish), warps=tuning.planes.WARPS, overlap=overlap)
        full = tuning.planes.complete(tuning.planes.Problem(*sizes), config, tuning.H200)
    elif case.kind == "tile":
        problem = tuning.tile.Problem(*sizes)
        slots = [wish[2:]] if len(wish) > 2 else tuning.tile.SLOTS[wish[0]]
        tries = (tuning.tile.Config(*wish[:2], *pair) for pair in slots)
        full = next((c for c in tries if tuning.tile.launch(problem, c, tuning.H200)), None)
    else:
        hopper = replace(tuning.sm90.Config(*wish), overlap=overlap)
        full = tuning.sm90.complete(tuning.sm90.Problem(*sizes, case.pair), hopper, tuning.H200)
    if full is None or (case.activation and not _gates(case, full)):
        return None
    return replace(case, config=full.numbers)


def _gates(case: Case, config) -> bool:
    kernel = {"decode": tuning.DECODE, "planes": tuning.PLANES}.get(case.kind, tuning.SM90)
    problem = (case.n, case.k, case.m, case.bits, case.group_size, case.parts, case.pair)
    return tuning.can_gate(tuning.Entry(case.m, kernel, config.numbers), problem, tuning.H200)


def barriers(case: Case) -> int:
    """Of a cluster in shared memory, used or not: the tools overflow when they count too few."""
    # Both halves of a gated launch are in one cluster, and launches may overlap.
    times = (2 if case.activation else 1) * case.launches
    if case.kind in ("decode", "planes"):  # of the warps, and of the cluster
        config = tuning.Config(*case.config)
        return (config.warps * (tuning.MAX_SLOTS + 1) + 1) * config.splits * times
    if case.kind == "sm90":
        hopper = tuning.sm90.Config(*case.config)
        return (hopper.barrier_bytes // 8 + 2) * hopper.splits * times
    if case.kind == "prefill":  # of the rings of each warpgroup and of x, and of a pair of blocks
        rings = (tuning.sm90.PREFILL_GROUPS + 1) * 2 * tuning.sm90.PREFILL_STAGES
        pair = 1 + tuning.sm90.PREFILL_GROUPS * 4
        return (rings + pair) * max(1, tuning.sm90.Config(*case.config).splits) * times
    return 0
