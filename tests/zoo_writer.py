"""Writes synthetic checkpoints in the layout of the published FLUTE ones, for tests only.

The packer here follows the format notes from the packing side: it places each field into its word
and shares no code with ``flute_vllm.importers``, which reads fields out of words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

# NF tables of upstream FLUTE before rounding (format notes, section 5); the zeros are -0.0.
NF_TABLES = {
    2: (-1.0, -0.0, 0.33791509, 1.0),
    3: (-1.0, -0.47862902, -0.2171417, -0.0, 0.16093013, 0.33791509, 0.56261683, 1.0),
    4: (
        -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
        0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
    ),
}  # fmt: skip
DECODER_LINEAR = re.compile(r"(?:.*\.)?layers\.\d+\..*_proj")


def encode(codes: torch.Tensor, bits: int, tile_p: int = 32) -> torch.Tensor:
    """Packs uint8 codes [N, K] to upstream's int16 [N * bits / 16, K]."""
    rows, columns = codes.shape
    tile = 512 if bits == 3 else 16 // bits * tile_p
    if rows % tile or columns % 2 or (bits == 3 and tile_p != 32):
        raise ValueError(f"cannot pack {rows} x {columns}: N must be a multiple of {tile}, K even")
    even, odd = codes[:, 0::2].to(torch.int64), codes[:, 1::2].to(torch.int64)
    pairs = (even << bits) | odd
    if bits == 3:
        words = _encode_three(pairs)
    else:
        per_word = 16 // bits
        fields = pairs.reshape(rows // (tile_p * per_word), per_word, tile_p, columns // 2)
        words = sum(fields[:, j] << (2 * bits * j) for j in range(per_word))
        words = words.reshape(rows // per_word, columns // 2)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1).reshape(words.shape[0], columns)
    return torch.where(halves >= 0x8000, halves - 0x10000, halves).to(torch.int16)


def _encode_three(pairs: torch.Tensor) -> torch.Tensor:
    """Words of 6-bit fields [N, K / 2]: plane 0, then planes 1 and 2 alternating by 32 rows."""
    tiles, half = pairs.shape[0] // 512, pairs.shape[1]
    fields = pairs.reshape(tiles, 16, 32, half)
    planes = []
    for plane in range(3):
        word = ((fields[:, 15] >> (2 * plane)) & 3) << 30
        for slot in range(5):
            word = word | (fields[:, 3 * slot + plane] << (6 * slot))
        planes.append(word)
    rest = torch.stack(planes[1:], dim=1).reshape(tiles * 64, half)
    return torch.cat([planes[0].reshape(tiles * 32, half), rest])


def pair_table(table: torch.Tensor) -> torch.Tensor:
    """``tables2`` float32 [2**b, 2**b, 1]: bit patterns of all pairs, the first one low."""
    entry = table.view(torch.int16)
    side = len(entry)
    low, high = entry[:, None].expand(side, side), entry[None, :].expand(side, side)
    return torch.stack([low, high], dim=-1).contiguous().view(torch.float32)


def nf_table(bits: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.tensor(NF_TABLES[bits]).to(dtype)


def random_table(bits: int, seed: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """A table unlike NF: random values in random order, the largest magnitude 1."""
    values = torch.randn(2**bits, generator=torch.Generator().manual_seed(seed))
    return (values / values.abs().max()).to(dtype)


def quantize(
    weight: torch.Tensor, table: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [N, K] and absmax scales [N, G] of the nearest table values."""
    rows, columns = weight.shape
    groups = weight.float().reshape(rows, columns // group_size, group_size)
    scales = groups.abs().amax(-1).to(table.dtype)
    unit = groups / scales.float().clamp_min(1e-8).unsqueeze(-1)
    values, order = table.float().sort()
    above = torch.bucketize(unit, (values[1:] + values[:-1]) / 2)
    return order[above].to(torch.uint8).reshape(rows, columns), scales


def dense(codes: torch.Tensor, scales: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Dequantized weight in the dtype of the scales, from the formula alone."""
    spread = scales.float().repeat_interleave(codes.shape[1] // scales.shape[1], dim=1)
    return (table.float()[codes.long()] * spread).to(scales.dtype)


def zoo_tensors(
    codes: torch.Tensor, scales: torch.Tensor, table: torch.Tensor, bits: int, tile_p: int = 32
) -> dict[str, torch.Tensor]:
    """The four tensors of one module by suffix."""
    return {
        "weight": encode(codes, bits, tile_p), "scales": scales, "tables": table,
        "tables2": pair_table(table),
    }  # fmt: skip


def write_zoo_checkpoint(
    folder: str | Path,
    source: Any,
    bits: int = 4,
    group_size: int = 64,
    *,
    tile_p: int = 32,
    tables: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
    flute_config: Mapping[str, Any] | None = None,
) -> dict[str, torch.Tensor]:
    """Quantizes the decoder linears of a dense model and writes a checkpoint folder.

    Args:
        folder: created if needed.
        source: a Hugging Face model, or a state dict (then pass ``config``, the content of
            config.json). Modules named ``layers.<i>. ... _proj`` are quantized, each N a multiple
            of the packing granularity (512 suits every bit width) and K of ``group_size``.
        bits, group_size, tile_p: of the layout; tile_p 64 needs 2 or 4 bits.
        tables: one table [2**bits] for all modules, or tables by the end of the module name
            ({"q_proj": ..., "k_proj": ...}); modules without one, and None, use the NF table.
        dtype: of scales, tables and dense tensors.
        flute_config: replaces ``{"num_sms": 108, "num_bits": bits, "group_size": group_size}``.

    Returns:
        State dict of the dense twin: dequantized linears and the unchanged other tensors.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(source, "state_dict"):
        own = {"architectures": [type(source).__name__], "torch_dtype": str(dtype).split(".")[1]}
        config = config or {**source.config.to_dict(), **own}
        tied = set(getattr(source, "_tied_weights_keys", None) or ())
        shared = getattr(source.config, "tie_word_embeddings", False)
        state = source.state_dict()
        source = {k: v for k, v in state.items() if not (shared and k in tied)}
    stored: dict[str, torch.Tensor] = {}
    twin: dict[str, torch.Tensor] = {}
    for name, tensor in source.items():
        module = name.removesuffix(".weight")
        if tensor.dim() != 2 or not DECODER_LINEAR.fullmatch(module):
            stored[name] = twin[name] = tensor.detach().to(dtype).contiguous()
            continue
        table = _table_for(module, tables, bits, dtype)
        codes, scales = quantize(tensor.detach(), table, group_size)
        for suffix, part in zoo_tensors(codes, scales, table, bits, tile_p).items():
            stored[f"{module}.{suffix}"] = part.clone()
        twin[name] = dense(codes, scales, table)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(config or {}), indent=2, default=str))
    if flute_config is None:
        flute_config = {"num_sms": 108, "num_bits": bits, "group_size": group_size}
    (folder / "flute_config.json").write_text(json.dumps(dict(flute_config), indent=4))
    return twin


def _table_for(
    module: str,
    tables: torch.Tensor | Mapping[str, torch.Tensor] | None,
    bits: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    if isinstance(tables, torch.Tensor):
        return tables.to(dtype)
    for ending, table in (tables or {}).items():
        if module.endswith(ending):
            return table.to(dtype)
    return nf_table(bits, dtype)
