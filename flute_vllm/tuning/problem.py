"""What every kernel's choice starts from: the sizes of a product and the records they make."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

from flute_vllm.errors import FluteError
from flute_vllm.tuning.device import TILE_K, TILE_ROWS

MAX_CLUSTER = 8  # blocks


@dataclass(frozen=True)
class ProblemBase:
    """y [m, n] = x [m, k] w [n, k]^T; ``parts``: rows of each fused matrix; ``pair``: a table of
    pairs. Raises FluteError."""

    n: int
    k: int
    m: int
    bits: int
    group_size: int
    parts: tuple[int, ...] = ()
    pair: bool = False

    KERNEL: ClassVar[str]  # for messages
    MOST_ROWS: ClassVar[int | None] = None  # of x

    def __post_init__(self) -> None:
        fits = self.MOST_ROWS is None or self.m <= self.MOST_ROWS
        if self.n <= 0 or self.k <= 0 or self.k % 32 or self.m < 1 or not fits:
            rows = f"1..{self.MOST_ROWS}" if self.MOST_ROWS else "positive"
            raise FluteError(
                f"no {self.KERNEL} launch for m {self.m}, n {self.n}, k {self.k}",
                where=f"{type(self).__module__}.Problem",
                why=f"m must be {rows}, n positive, k a positive multiple of 32",
                fix="use the dequantizing path",
            )

    @property
    def part_tiles(self) -> tuple[int, ...]:
        return tuple(math.ceil(rows / TILE_ROWS) for rows in (self.parts or (self.n,)))

    @property
    def has_two_halves(self) -> bool:
        """Two fused matrices of as many rows: what a gated product takes as gate and up."""
        return len(self.parts) == 2 and self.parts[0] == self.parts[1]

    def fits_cluster(self, splits: int, gated: bool) -> bool:
        """Whether the blocks that share sums are no more than a cluster takes: those that split k,
        for a gated product of both halves."""
        return not gated or (self.has_two_halves and 2 * splits <= MAX_CLUSTER)

    @property
    def k_tiles(self) -> int:
        return math.ceil(self.k / TILE_K)

    @property
    def groups(self) -> int:
        """Of a record."""
        return TILE_K // self.group_size if 0 < self.group_size < TILE_K else 1

    @property
    def variant(self) -> str:
        """What ends the keys of launches measured for this kind of record: nothing for single
        values in groups of 128 and longer, whose records are alike."""
        if self.groups == 1 and not self.pair:
            return ""
        return f",{TILE_K // self.groups}" + (",pair" if self.pair else "")

    def keys_up_to(self, *most_rows: int) -> list[str]:
        """Of launches measured for up to so many rows of x, the most fitting first: a kind of
        record without an entry takes that of groups of 128, other bits take that of 4."""
        found = itertools.product((self.bits, 4), most_rows, (self.variant, ""))
        return list(dict.fromkeys(f"{self.n},{self.k},{m},{b}{kind}" for b, m, kind in found))

    @property
    def record_bytes(self) -> int:
        return TILE_ROWS * TILE_K * self.bits // 8 + 2 * TILE_ROWS * self.groups
