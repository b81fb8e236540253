"""Bit layout of upstream FLUTE's packed ``weight``, shared by all formats that FLUTE packed.

Notation of the format notes: W[n, k] with N rows and K columns, b bits, P = N * b / 16 packed
rows, and T ("tile P", 32 or 64) the distance in n between the fields of one word. The int16
matrix [P, K] is read as little-endian 32-bit words ``w[row, c]`` with c = k // 2; a word holds
fields of 2b bits, each one K-pair of one output row: the even k in the high b bits, the odd k in
the low b bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from flute_vllm.errors import FluteError
from flute_vllm.format import UNIT, pack

TILE_SIZES = (32, 64)
DEFAULT_TILE = 32
# Codes decoded and packed at a time: on a CPU the int64 temporaries of format.pack then stay in
# the cache (5 times faster than 16 Mi); a GPU wants longer kernels.
CPU_CHUNK = 1 << 20
GPU_CHUNK = 1 << 24


def tile_rows(bits: int, tile_p: int = DEFAULT_TILE) -> int:
    """Output rows that are packed together; N must be a multiple (format notes, section 2)."""
    return 16 * tile_p if bits == 3 else 16 // bits * tile_p


def packed_rows(out_features: int, bits: int) -> int:
    """P of a matrix of N = ``out_features``."""
    return out_features * bits // 16


def check_packed(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], bits: int, tile_p: int = DEFAULT_TILE
) -> int:
    """N of a packed matrix. Raises FluteError for a dtype or shape that cannot be packed."""

    def bad(why: str, fix: str) -> FluteError:
        return FluteError("not a FLUTE-packed weight", where=name, why=why, fix=fix)

    if bits == 3 and tile_p != DEFAULT_TILE:
        raise bad(f"3-bit packing exists for tile_p 32 only, not {tile_p}", "set tile_p to 32")
    if dtype != torch.int16 or len(shape) != 2:
        raise bad(
            f"expected int16 [N * {bits} / 16, K], got {str(dtype).removeprefix('torch.')} "
            f"{list(shape)}",
            "pass the tensors as FLUTE's packer wrote them, without casting the weight",
        )
    rows, columns = shape
    out_features, step = rows * 16 // bits, tile_rows(bits, tile_p)
    if not rows or rows * 16 % bits or out_features % step or not columns or columns % 2:
        raise bad(
            f"{rows} packed rows of {columns} columns at {bits} bits are N = {rows * 16 / bits:g}; "
            f"N must be a multiple of {step} (tile_p {tile_p}) and K even",
            "pass the unsharded matrix, and check num_bits and tile_p in flute_config.json",
        )
    return out_features


def iter_codes(
    weight: torch.Tensor, bits: int, tile_p: int = DEFAULT_TILE
) -> Iterator[tuple[int, torch.Tensor]]:
    """Decodes whole tiles of rows at a time, so that temporaries stay small.

    Yields the first row n of each piece and its uint8 codes [rows, K].
    """
    out_features = check_packed("weight", weight.dtype, tuple(weight.shape), bits, tile_p)
    columns = weight.shape[1]
    step = tile_rows(bits, tile_p)
    tiles = max(1, _chunk(weight) // (step * columns))
    planes = _planes(weight, bits, tile_p)
    for first in range(0, out_features // step, tiles):
        words = [plane[first : first + tiles] for plane in planes]
        yield first * step, _decode_tiles(words, bits)


def decode(weight: torch.Tensor, bits: int, tile_p: int = DEFAULT_TILE) -> torch.Tensor:
    """Codes of a packed matrix (format notes, section 3).

    Args:
        weight: int16 [P, K], on any device.
        bits: 2, 3 or 4.
        tile_p: T, 32 or 64; always 32 for 3 bits.

    Returns:
        uint8 [N, K] with N = 16 P / bits. Raises FluteError for other dtypes and shapes.
    """
    out_features = check_packed("weight", weight.dtype, tuple(weight.shape), bits, tile_p)
    codes = torch.empty(out_features, weight.shape[1], dtype=torch.uint8, device=weight.device)
    for row, piece in iter_codes(weight, bits, tile_p):
        codes[row : row + piece.shape[0]] = piece
    return codes


def to_qweight(weight: torch.Tensor, bits: int, tile_p: int = DEFAULT_TILE) -> torch.Tensor:
    """The native ``qweight`` int32 [N, K / 32 * bits] of a packed matrix; K a multiple of 32."""
    out_features = check_packed("weight", weight.dtype, tuple(weight.shape), bits, tile_p)
    words = weight.shape[1] // UNIT * bits
    qweight = torch.empty(out_features, words, dtype=torch.int32, device=weight.device)
    rows = max(1, _chunk(weight) // weight.shape[1])
    for first, codes in iter_codes(weight, bits, tile_p):
        out = qweight[first : first + codes.shape[0]]
        for target, part in zip(out.split(rows), codes.split(rows), strict=True):
            target.copy_(pack(part, bits))
    return qweight


def _chunk(weight: torch.Tensor) -> int:
    return CPU_CHUNK if weight.device.type == "cpu" else GPU_CHUNK


def _planes(weight: torch.Tensor, bits: int, tile_p: int) -> list[torch.Tensor]:
    """int32 words of each tile, one view [tiles, T, K / 2] for each plane.

    2 and 4 bits have one plane. 3 bits have three: plane 0 fills the first third of the rows,
    planes 1 and 2 alternate by 32 rows in the rest (section 3.3).
    """
    words = weight.contiguous().view(torch.int32)
    if bits != 3:
        return [words.unflatten(0, (-1, tile_p))]
    split = words.shape[0] // 3
    rest = words[split:].unflatten(0, (-1, 2, tile_p))
    return [words[:split].unflatten(0, (-1, tile_p)), rest[:, 0], rest[:, 1]]


def _decode_tiles(words: list[torch.Tensor], bits: int) -> torch.Tensor:
    """uint8 codes [tiles * rows of a tile, K] of the planes [tiles, T, K / 2] of some tiles."""
    tiles, tile_p, pairs = words[0].shape
    fields = 16 // bits if bits != 3 else 16
    codes = torch.empty(tiles, fields, tile_p, pairs, 2, dtype=torch.uint8, device=words[0].device)
    mask = 2**bits - 1
    for j in range(fields):
        field = _field(words, bits, j)
        codes[:, j, :, :, 0] = (field >> bits) & mask
        codes[:, j, :, :, 1] = field & mask
    return codes.reshape(tiles * fields * tile_p, pairs * 2)


def _field(words: list[torch.Tensor], bits: int, j: int) -> torch.Tensor:
    """Field j in the low 2b bits; what lies above is garbage for the caller's mask."""
    if bits != 3:
        return words[0] >> (2 * bits * j)
    if j < 15:
        return words[j % 3] >> (6 * (j // 3))
    # The 16th sub-tile lives in the two bits that five 6-bit fields leave in each word. The
    # shifts are arithmetic, so each pair must lose its sign extension before it is moved up.
    low, middle, high = ((word >> 30) & 3 for word in words)
    return low | (middle << 2) | (high << 4)
