"""Quantized checkpoints of less usual decoders in vLLM engines, against their dense twins there.

Both run on the CPU in float32, so that whatever differs is what the plugin made of the checkpoint.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")
from engine import run_jobs  # noqa: E402
from test_architectures import MULTIMODAL, write_model  # noqa: E402
from tiny_models import PROMPTS, write_tiny_model  # noqa: E402

from flute_vllm.convert import dequantize_checkpoint  # noqa: E402
from flute_vllm.quantize.model import quantize_checkpoint  # noqa: E402
from flute_vllm.quantize.plan import QuantizeSettings  # noqa: E402

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

WIDE = {"hidden_size": 128, "num_attention_heads": 4, "vocab_size": 512, "num_hidden_layers": 2}
SEEING = {
    **MULTIMODAL["paligemma"],
    "text_config": {
        **MULTIMODAL["paligemma"]["text_config"], "vocab_size": 512, "initializer_range": 0.2,
    },
}  # fmt: skip
# What is new for the plugin in each, and the settings that show it.
MODELS: dict[str, tuple[dict, dict]] = {
    "falcon": ({**WIDE, "alibi": False, "new_decoder_architecture": False}, {}),
    "opt": ({**WIDE, "ffn_dim": 256, "word_embed_proj_dim": 128}, {}),
    "bloom": ({"n_layer": 2, "n_head": 4, "hidden_size": 128, "vocab_size": 512}, {}),
    # Fused on disk where vLLM packs two names, with bits of its own.
    "glm4": ({}, {"overrides": {"gate_up_proj": 3}}),
    # Named otherwise in vLLM, and an expression for the names on disk.
    "gpt_neox": (
        {**WIDE, "intermediate_size": 256},
        {"overrides": {r"re:gpt_neox\.layers\.1\..*": 2}},
    ),
    # vLLM does not tell what its fused layers are made of, nor the names of some of its layers.
    "gptj": (
        {
            "n_embd": 128,
            "n_layer": 2,
            "n_head": 4,
            "rotary_dim": 16,
            "n_positions": 256,
            "vocab_size": 512,
        },
        {"overrides": {"q_proj": 3, "k_proj": 3, "v_proj": 3}},
    ),
    "minicpm3": ({}, {}),
    "stablelm": ({}, {}),
    "paligemma": (SEEING, {}),  # the decoder inside of a larger model
    # Nothing new, but in use.
    **dict.fromkeys(("cohere2", "granite", "nemotron", "olmo2", "smollm3", "starcoder2"), ({}, {})),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, list[dict]]:
    root = tmp_path_factory.mktemp("architectures")
    jobs = []
    for name, (fields, settings) in MODELS.items():
        folder = root / name
        if not fields:
            write_tiny_model(folder / "dense", "qwen3", model_type=name)
        else:
            torch.manual_seed(0)
            wide = {} if "text_config" in fields else {"initializer_range": 0.2}
            write_model(folder / "dense", name, {**fields, **wide})
        chosen = QuantizeSettings(recipe="nf", group_size=32, device="cpu", **settings)
        quantize_checkpoint(folder / "dense", folder / "out", chosen)
        dequantize_checkpoint(folder / "out", folder / "twin")
        engine = {"limit_mm_per_prompt": {"image": 0}} if "vision_config" in fields else {}
        jobs += [
            {"model": str(folder / kind), "prompts": PROMPTS, "tokens": 12, "engine": engine}
            for kind in ("out", "twin")
        ]
    found = run_jobs(jobs)
    return {name: found[2 * i : 2 * i + 2] for i, name in enumerate(MODELS)}


@pytest.mark.parametrize("name", MODELS)
def test_answers_equal_those_of_the_dense_twin(results, name):
    for result in results[name]:
        assert "error" not in result, result["error"][-3000:]
    answers, expected = (result["outputs"] for result in results[name])
    for answer, reference in zip(answers, expected, strict=True):
        assert answer["tokens"] == reference["tokens"]
        for found, wanted in zip(answer["logprobs"], reference["logprobs"], strict=True):
            assert abs(found - wanted) <= 1e-3
