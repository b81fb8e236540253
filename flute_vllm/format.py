"""The checkpoint format: tensor names, shapes, bit layout and the value of every weight.

This file is the only owner of the format (README, "Checkpoint format"). It is pure torch: no
vLLM, no compiled code, so it is also the oracle that the kernels are tested against.

One quantized linear layer of ``out_features`` N and ``in_features`` K has three tensors:

======== ========= ================================= ===================================
name     dtype     shape                             meaning
======== ========= ================================= ===================================
qweight  int32     [N, K / 32 * bits]                codes, one little-endian bit stream a row
scales   scale     [N, K / group_size] or [N, 1]     one factor for each row and group of K
table    scale     [2**bits] or [2**(2 * bits), 2]   value of each code, or of each code pair
======== ========= ================================= ===================================

The weight is ``round(table[code] * scale)``, rounded once, to nearest even, to the dtype of the
scales. The product itself is exact in float32: 11 (fp16) or 8 (bf16) significant bits each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from flute_vllm.errors import FluteError

FORMAT_VERSION = 1
UNIT = 32  # weights whose codes fill whole 32-bit words at every bit width
BITS = (2, 3, 4)
GROUP_SIZES = (32, 64, 128, 256)
PER_ROW = -1  # group_size that stands for one scale for each row
TABLE_KINDS = ("scalar", "pair")
SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
TENSOR_NAMES = ("qweight", "scales", "table")
BLOCK_WEIGHTS = 1 << 20  # at once: 64-bit temporaries of a whole output head would take gigabytes


@dataclass(frozen=True)
class LayerSpec:
    """How one linear layer is stored. Raises :class:`FluteError` for values outside the format."""

    bits: int
    group_size: int
    scale_dtype: str = "bfloat16"
    table_kind: str = "scalar"

    def __post_init__(self) -> None:
        _check_choice("bits", self.bits, BITS)
        _check_choice("group_size", self.group_size, (*GROUP_SIZES, PER_ROW))
        _check_choice("scale_dtype", self.scale_dtype, tuple(SCALE_DTYPES))
        _check_choice("table_kind", self.table_kind, TABLE_KINDS)

    def with_changes(self, **changes: object) -> LayerSpec:
        return replace(self, **changes)

    @property
    def torch_scale_dtype(self) -> torch.dtype:
        return SCALE_DTYPES[self.scale_dtype]

    @property
    def table_shape(self) -> tuple[int, ...]:
        return (2**self.bits,) if self.table_kind == "scalar" else (2 ** (2 * self.bits), 2)

    def num_groups(self, in_features: int) -> int:
        return 1 if self.group_size == PER_ROW else in_features // self.group_size

    def words_per_row(self, in_features: int) -> int:
        return in_features // UNIT * self.bits

    def check_in_features(self, in_features: int, where: str) -> None:
        """Raises FluteError unless ``in_features`` is a multiple of 32 and of the group size."""
        step = UNIT if self.group_size == PER_ROW else self.group_size
        if in_features <= 0 or in_features % step:
            raise FluteError(
                f"in_features {in_features} cannot be stored",
                where=where,
                why=f"{in_features} is not a positive multiple of {step} "
                f"(group_size {self.group_size}, unit {UNIT})",
                fix="choose a smaller --group-size, or skip this module (modules_to_not_convert)",
            )

    def tensor_layout(
        self, out_features: int, in_features: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor of a layer, by name."""
        scale = self.torch_scale_dtype
        return {
            "qweight": ((out_features, self.words_per_row(in_features)), torch.int32),
            "scales": ((out_features, self.num_groups(in_features)), scale),
            "table": (self.table_shape, scale),
        }

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Stored bits for each weight: codes, scales and table."""
        layout = self.tensor_layout(out_features, in_features).values()
        stored = sum(torch.Size(shape).numel() * dtype.itemsize * 8 for shape, dtype in layout)
        return stored / (out_features * in_features)


def _check_choice(name: str, value: object, allowed: tuple) -> None:
    if isinstance(value, bool) or value not in allowed:
        raise FluteError(
            f"unsupported {name} {value!r}",
            where=f"quantization_config.{name}",
            why=f"{name} must be one of {', '.join(map(str, allowed))}",
            fix="correct the config, or requantize with `flute-vllm quantize`",
        )


def row_blocks(rows: int, columns: int, weights: int = 0) -> Iterator[slice]:
    """Slices of rows of [N, K] that hold about so many weights each, by default BLOCK_WEIGHTS."""
    step = max(1, (weights or BLOCK_WEIGHTS) // max(1, columns))
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def _bit_positions(bits: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Word and shift of the first bit of each of the 32 codes of a unit."""
    start = torch.arange(UNIT, device=device) * bits
    return start // 32, start % 32


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs codes along K.

    Code k of a row occupies bits ``[bits * k, bits * (k + 1))`` of the row's bit stream, least
    significant bit first, cut into 32-bit words; at 3 bits two codes of each unit of 32 straddle
    a word boundary.

    Args:
        codes: uint8 [N, K], each below ``2**bits``, K a multiple of 32.
        bits: 2, 3 or 4.

    Returns:
        int32 [N, K / 32 * bits].
    """
    _check_choice("bits", bits, BITS)
    if codes.dim() != 2 or codes.shape[1] % UNIT or codes.dtype != torch.uint8:
        raise FluteError(
            "cannot pack codes",
            where="format.pack",
            why=f"expected uint8 [N, K] with K a multiple of {UNIT}, got {codes.dtype} "
            f"{list(codes.shape)}",
            fix="pad K or convert the codes to uint8",
        )
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise FluteError(
            "cannot pack codes",
            where="format.pack",
            why=f"largest code {int(codes.max())} needs more than {bits} bits",
            fix="pass the bits that the codes were made for",
        )
    rows, columns = codes.shape
    shape = (rows, columns // UNIT * bits)
    packed = torch.empty(shape, dtype=torch.int32, device=codes.device)
    for block in row_blocks(rows, columns):
        packed[block] = _pack_rows(codes[block], bits)
    return packed


def _pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    rows, columns = codes.shape
    units = codes.reshape(rows, columns // UNIT, UNIT).to(torch.int64)
    word, shift = _bit_positions(bits, codes.device)
    words = torch.zeros(rows, columns // UNIT, bits, dtype=torch.int64, device=codes.device)
    # Fields are disjoint, so addition is a bitwise or; what passes bit 32 belongs to the next word.
    shifted = units << shift
    words.index_add_(2, word, shifted & 0xFFFFFFFF)
    straddles = (shift + bits) > 32
    words.index_add_(2, word[straddles] + 1, shifted[..., straddles] >> 32)
    signed = torch.where(words >= 2**31, words - 2**32, words)
    return signed.to(torch.int32).reshape(rows, columns // UNIT * bits)


def unpack(qweight: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of :func:`pack`: int32 [N, K / 32 * bits] to uint8 codes [N, K]."""
    _check_choice("bits", bits, BITS)
    rows, columns = qweight.shape[0], qweight.shape[1] // bits * UNIT
    codes = torch.empty((rows, columns), dtype=torch.uint8, device=qweight.device)
    for block in row_blocks(rows, columns):
        codes[block] = _unpack_rows(qweight[block], bits)
    return codes


def _unpack_rows(qweight: torch.Tensor, bits: int) -> torch.Tensor:
    rows, columns = qweight.shape
    words = qweight.reshape(rows, columns // bits, bits).to(torch.int64) & 0xFFFFFFFF
    word, shift = _bit_positions(bits, qweight.device)
    following = words[..., (word + 1).clamp_max(bits - 1)]
    stream = words[..., word] | (following << 32)
    codes = (stream >> shift) & (2**bits - 1)
    return codes.to(torch.uint8).reshape(rows, columns // bits * UNIT)


def dequantize_codes(
    codes: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Dense weight of a layer from its codes.

    Args:
        codes: uint8 [N, K].
        scales: fp16 or bf16 [N, K / group_size], or [N, 1].
        table: [2**bits] values, or [2**(2 * bits), 2] pairs; a pair's index is
            ``code[2i] * 2**bits + code[2i + 1]``.
        dtype: dtype of the single rounding; the dtype of ``scales`` when None. float32 keeps the
            exact product.

    Returns:
        [N, K] in ``dtype``.
    """
    weight = torch.empty(codes.shape, dtype=dtype or scales.dtype, device=codes.device)
    for block in row_blocks(*codes.shape):
        weight[block] = _exact_rows(codes[block], scales[block], table)
    return weight


def _exact_rows(codes: torch.Tensor, scales: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """float32 [N, K]: the exact products of table values and scales."""
    rows, columns = codes.shape
    index = codes.to(torch.int64)
    if table.dim() == 2:
        side = int(round(table.shape[0] ** 0.5))
        values = table.float()[index[:, 0::2] * side + index[:, 1::2]].reshape(rows, columns)
    else:
        values = table.float()[index]
    groups = values.reshape(rows, scales.shape[1], columns // scales.shape[1])
    exact = groups * scales.float().unsqueeze(-1)
    return exact.reshape(rows, columns)


def dequantize(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    bits: int,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Dense weight [N, K] of the three tensors of a layer; see :func:`dequantize_codes`."""
    return dequantize_codes(unpack(qweight, bits), scales, table, dtype)
