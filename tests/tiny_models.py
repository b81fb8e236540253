"""Tiny random decoder models of several architectures, written as dense Hugging Face folders.

Weights are larger than a real initialisation, so that greedy tokens depend on every layer and a
wrong weight shows. Prompts are token ids: no tokenizer is needed.
"""

from __future__ import annotations

from pathlib import Path

import torch

VOCAB = 512
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "initializer_range": 0.2,
}
# Fields beyond COMMON; each line is what makes the architecture different for a loader.
ARCHITECTURES: dict[str, dict] = {
    "llama": {"tie_word_embeddings": False, "head_dim": 64},
    "llama_bias": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "gemma2": {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 256},
    "qwen2": {"tie_word_embeddings": True},  # biases on q, k and v
    "mistral": {"sliding_window": None, "head_dim": 64},
    "phi3": {"tie_word_embeddings": False, "original_max_position_embeddings": 512},  # fused
    "gemma3": {
        "model_type": "gemma3_text", "head_dim": 64, "query_pre_attn_scalar": 64,
        "sliding_window": 256,
    },
    "qwen3": {"tie_word_embeddings": True, "head_dim": 64},  # norms on q and k
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
}  # fmt: skip
PROMPTS = [[5, 77, 301, 42, 9], [17] * 3 + [400, 401], [250, 3, 11, 499, 60, 8, 123]]


def write_tiny_model(folder: Path, architecture: str, seed: int = 0, **changes) -> Path:
    """Writes a random float32 model stored in bfloat16, biases included, and returns its folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type = architecture.partition("_")[0]
    fields = {**COMMON, **ARCHITECTURES[architecture], **changes}
    model_type = fields.pop("model_type", model_type)
    config = AutoConfig.for_model(model_type, **fields)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
        if model_type.startswith("gemma"):
            # Gemma multiplies embeddings by sqrt(hidden_size) and ties the head to them: unscaled,
            # every model answers with its last prompt token.
            model.get_input_embeddings().weight.mul_(0.02)
    model.save_pretrained(folder)
    return folder


def greedy_with_transformers(
    folder: Path, prompts: list[list[int]] = PROMPTS, tokens: int = 24
) -> list[dict]:
    """Greedy tokens and their log-probabilities of a dense folder, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    model.eval()
    results = []
    for prompt in prompts:
        ids, chosen, logprobs = list(prompt), [], []
        with torch.no_grad():
            for _ in range(tokens):
                logits = model(torch.tensor([ids])).logits[0, -1]
                distribution = torch.log_softmax(logits, -1)
                token = int(logits.argmax())
                chosen.append(token)
                logprobs.append(float(distribution[token]))
                ids.append(token)
        results.append({"tokens": chosen, "logprobs": logprobs})
    return results
