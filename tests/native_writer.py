"""Writes small native checkpoints whose modules have tables, bits and groups of their own."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch

from flute_vllm.checkpoint import Checkpoint
from flute_vllm.format import LayerSpec, dequantize
from flute_vllm.quantize.codebooks import normal_float
from flute_vllm.quantize.tensor import quantize_tensor
from flute_vllm.schema import FluteQuantizationConfig
from flute_vllm.writer import AtomicFolder

LINEARS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    "qkv_proj", "gate_up_proj", "lm_head",
)  # fmt: skip


def module_table(module: str, bits: int) -> torch.Tensor:
    """A normal-float table, scaled and shuffled by the module's name: no two are alike."""
    generator = torch.Generator().manual_seed(zlib.crc32(module.encode()))
    table = torch.as_tensor(normal_float(bits).values)
    order = torch.randperm(len(table), generator=generator)
    return table[order] * (0.8 + 0.4 * torch.rand(1, generator=generator))


def write_native(
    source: Path, out: Path, spec: LayerSpec, twin: Path | None = None, **config_fields
) -> Path:
    """Quantizes the linears of a dense folder; ``twin`` receives the dense float32 equivalent.

    ``config_fields`` are further fields of quantization_config (overrides, skipped modules).
    """
    checkpoint = Checkpoint(source)
    schema = FluteQuantizationConfig(
        format_version=1, bits=spec.bits, group_size=spec.group_size,
        scale_dtype=spec.scale_dtype, **config_fields,
    )  # fmt: skip
    tensors, dense = {}, {}
    for name in checkpoint.tensors:
        tensor = checkpoint.load(name)
        module, _, kind = name.rpartition(".")
        module_spec = schema.spec_for(module)
        is_linear = kind == "weight" and module.rpartition(".")[2] in LINEARS
        if not is_linear or module_spec is None:
            tensors[name] = dense[name] = tensor
            continue
        table = module_table(module, module_spec.bits)
        quantized = quantize_tensor(tensor, module_spec, table, "absmax", module).tensors()
        tensors |= {f"{module}.{key}": value for key, value in quantized.items()}
        dense[name] = dequantize(**quantized, bits=module_spec.bits)
    config = checkpoint.config
    with AtomicFolder(out) as folder:
        folder.copy_extras(source)
        folder.write_tensors("model.safetensors", tensors)
        folder.commit({**config, "quantization_config": schema.to_json()})
    if twin is not None:
        with AtomicFolder(twin) as folder:
            folder.write_tensors("model.safetensors", dense)
            folder.commit(config)
    return out
