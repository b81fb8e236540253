"""A small random LoRA adapter in PEFT's layout, and the weights with it merged in."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RANK, ALPHA = 8, 16
TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
PREFIX = "base_model.model."


def write_adapter(
    weights: dict[str, torch.Tensor], folder: Path, scale: float = 1 / 64, seed: int = 7
) -> Path:
    """Writes an adapter for the linear layers in ``weights``, named as in a checkpoint.

    Args:
        scale: of the product of both matrices; 1/64 changes the answers of a random model.
    """
    folder.mkdir(parents=True)
    config = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none",
        "task_type": "CAUSAL_LM", "target_modules": TARGETS,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    tensors, each = {}, scale**0.5
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in TARGETS:
            rows, columns = weight.shape
            down = torch.randn(RANK, columns, generator=generator) * each
            up = torch.randn(rows, RANK, generator=generator) * each
            tensors[f"{PREFIX}{module}.lora_A.weight"] = down
            tensors[f"{PREFIX}{module}.lora_B.weight"] = up
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def merge(weights: dict[str, torch.Tensor], adapter: Path) -> dict[str, torch.Tensor]:
    """float32 weights that give what the adapter gives beside ``weights``."""
    lora = load_file(adapter / "adapter_model.safetensors")
    merged = {}
    for name, weight in weights.items():
        module = PREFIX + name.removesuffix(".weight")
        merged[name] = weight.float()
        if f"{module}.lora_A.weight" in lora:
            product = lora[f"{module}.lora_B.weight"] @ lora[f"{module}.lora_A.weight"]
            merged[name] += product * (ALPHA / RANK)
    return merged
