"""Configs of known models and of the ways to run their linear layers, for engines without weights.

``write_config`` makes a folder that vLLM serves with ``--load-format dummy``: the shapes of the
model, weights that mean nothing, nothing to download. Prompts are token ids: no tokenizer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 8192,
    "vocab_size": 128256, "tie_word_embeddings": False, "num_key_value_heads": 8,
    "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip
MODELS: dict[str, dict] = {
    "8b": LLAMA | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "70b": LLAMA | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "gemma2-9b": {
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_size": 3584,
        "intermediate_size": 14336, "num_hidden_layers": 42, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 256, "query_pre_attn_scalar": 256,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 8192,
        "vocab_size": 256000, "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1,
        "pad_token_id": 0,
    },
    "qwen2.5-7b": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584,
        "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "max_position_embeddings": 32768, "vocab_size": 152064,
        "tie_word_embeddings": False, "bos_token_id": 151643, "eos_token_id": 151645,
        "use_sliding_window": False,
    },
    # For trying the benchmark itself on a CPU.
    "tiny": LLAMA | {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
        "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """How linear layers run: what config.json says and what the engine is told.

    ``kernel``: text that the log must show, so that no other kernel is measured under this name.
    """

    quantization: dict | None = None
    engine: dict = field(default_factory=dict)
    kernel: str = ""


def _flute(bits: int, group_size: int) -> dict:
    return {
        "quant_method": "flute", "format_version": 1, "bits": bits, "group_size": group_size,
        "scale_dtype": "bfloat16",
    }  # fmt: skip


def _integer(group_size: int) -> dict:
    """Symmetric 4-bit integers of compressed-tensors, the checkpoint format of the peers."""
    weights = {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
        "group_size": group_size, "dynamic": False,
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }  # fmt: skip


def methods(group_size: int) -> dict[str, Method]:
    """All methods by name, quantized with groups of ``group_size``."""
    found = {"bf16": Method()}
    for bits in (4, 3, 2):
        stored, kernel = _flute(bits, group_size), f"flute: {bits}-bit"
        found[f"flute{bits}"] = Method(stored, {}, kernel)
        # Of a checkpoint whose output head is quantized like the decoder's layers.
        found[f"flute{bits}-head"] = Method(stored | {"modules_to_not_convert": []}, {}, kernel)
    for backend in ("marlin", "machete", "humming"):
        kernel = f"{backend.capitalize()}LinearKernel"
        found[backend] = Method(_integer(group_size), {"linear_backend": backend}, kernel)
    return found


def write_config(folder: Path, model: str, method: Method) -> Path:
    """Writes config.json of a model under a method and returns the folder."""
    config = {**MODELS[model], "torch_dtype": "bfloat16"}
    if method.quantization is not None:
        config["quantization_config"] = method.quantization
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return folder


def _head(config: dict) -> int:
    return config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])


def linear_shapes(model: str, ranks: int = 1) -> dict[str, tuple[int, int]]:
    """(out, in) features of a decoder block's fused linear layers on one of ``ranks`` GPUs."""
    config = MODELS[model]
    hidden, inner = config["hidden_size"], config["intermediate_size"] // ranks
    queries = config["num_attention_heads"] * _head(config) // ranks
    keys = max(1, config["num_key_value_heads"] // ranks) * _head(config)
    return {
        "qkv": (queries + 2 * keys, hidden), "o": (hidden, queries),
        "gate_up": (2 * inner, hidden), "down": (hidden, inner),
    }  # fmt: skip


def weight_bytes(model: str, method: Method) -> int:
    """Of all weights: linear layers as the method stores them, all else in 16 bits."""
    config = MODELS[model]
    block = sum(n * k for n, k in linear_shapes(model).values())
    bits = 16.0
    if method.quantization is not None:
        groups = method.quantization.get("config_groups", {}).get("group_0", {})
        stored = groups.get("weights", method.quantization)
        bits = stored.get("bits", stored.get("num_bits")) + 16 / stored["group_size"]
    embedding = config["vocab_size"] * config["hidden_size"]
    head_bits = 0.0 if config["tie_word_embeddings"] else 16.0
    if (method.quantization or {}).get("modules_to_not_convert") == []:
        head_bits = bits
    inside = config["num_hidden_layers"] * block
    return int(inside * bits / 8 + embedding * (16 + head_bits) / 8)


def cache_bytes(model: str, ranks: int = 1) -> int:
    """Of keys and values of one token on each GPU, in 16 bits."""
    config = MODELS[model]
    heads = max(1, config["num_key_value_heads"] // ranks)
    return 2 * 2 * config["num_hidden_layers"] * heads * _head(config)
