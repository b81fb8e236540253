"""What the layers of many architectures read, block by block, against hooks on the whole model."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from flute_vllm.checkpoint import Checkpoint
from flute_vllm.errors import FluteError
from flute_vllm.evaluate import load_twin
from flute_vllm.hf_quantizer import FluteLinear
from flute_vllm.quantize.activations import observe
from flute_vllm.quantize.blocks import BlockRunner
from flute_vllm.quantize.model import quantize_checkpoint
from flute_vllm.quantize.names import model_class
from flute_vllm.quantize.plan import QuantizeSettings, plan_checkpoint
from flute_vllm.validate import validate_checkpoint

BUNDLED = Path(__file__).resolve().parents[1] / "examples" / "stdlib_model" / "model"
COMMON = {
    "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 128, "intermediate_size": 128, "num_key_value_heads": 2,
}  # fmt: skip
PER_LAYER = {
    "head_dim": 32, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 256,
    "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
# What each does that a LLaMA does not.
RUN = {
    "falcon": {"alibi": True},  # blocks return tuples; a bias of attention as an argument
    "bloom": {"n_layer": 2, "n_head": 2},  # tuples
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 2, "max_seq_len": 128},  # tuples
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 2, "rotary_dim": 16, "n_positions": 128},
    "gpt_neo": {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},  # reads [B * T, K] in its MLP
    "gpt_neox": {},  # attention beside the MLP
    "phi": {},
    "stablelm": {},
}
TEXT = {**COMMON, "head_dim": 32}
VISION = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 56, "patch_size": 14,
}  # fmt: skip
# Models that read images, whose decoders lie elsewhere on disk than in transformers, most of them.
MULTIMODAL = {
    "gemma3": {"text_config": TEXT, "vision_config": VISION},
    "llava": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**VISION, "model_type": "clip_vision_model"},
    },
    "mistral3": {
        "text_config": {**TEXT, "model_type": "mistral"},
        "vision_config": {**VISION, "model_type": "pixtral"},
    },
    "paligemma": {
        "text_config": {**TEXT, "model_type": "gemma"}, "projection_dim": 64,
        "vision_config": {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
    },
    "qwen2_5_vl": {
        "text_config": {
            **TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]},
        },
        "vision_config": {
            "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2,
            "out_hidden_size": 64,
        },
    },
}  # fmt: skip
NOT_RUN = {
    "gemma3n_text": {
        **PER_LAYER, "activation_sparsity_pattern": [0.0, 0.0], "laurel_rank": 32,
    },
    "gemma4_text": {**PER_LAYER, "global_head_dim": 32},
}  # fmt: skip


def own_name(name: str, config) -> str:
    """What an architecture calls a field of COMMON."""
    return config.attribute_map.get(name, name)


def write_model(folder, kind: str, changes: dict):
    torch.manual_seed(0)
    known = AutoConfig.for_model(kind)
    common = {
        name: value for name, value in COMMON.items()
        if hasattr(known, name) and own_name(name, known) not in changes
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **{**common, **changes})
    model_class(config).from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", sorted(RUN))
def test_moments_are_those_of_the_whole_model(kind, layers, tmp_path):
    fields = dict(RUN[kind])
    depth = next((n for n in ("n_layer", "n_layers", "num_layers") if n in fields), None)
    if kind == "gpt_neo":
        fields["attention_types"] = [[["global", "local"][:layers], 1]]
    fields[depth or "num_hidden_layers"] = layers
    check_moments(write_model(tmp_path / "dense", kind, fields))


@pytest.mark.parametrize("kind", sorted(MULTIMODAL))
def test_the_decoder_of_a_model_that_reads_images_is_quantized(kind, tmp_path):
    folder = write_model(tmp_path / "dense", kind, MULTIMODAL[kind])
    check_moments(folder)
    settings = QuantizeSettings(device="cpu", samples=4, length=32, group_size=32)
    report = quantize_checkpoint(folder, tmp_path / "out", settings)
    config = validate_checkpoint(Checkpoint(tmp_path / "out"))
    assert len(report["modules"]) == 14
    assert not [name for name in report["modules"] if "vision" in name or "visual" in name]
    stored = Checkpoint(folder).tensors.items()
    seeing = [name for name, info in stored if ("vision" in name or "visual" in name)
              and name.endswith("proj.weight") and len(info.shape) == 2]  # fmt: skip
    assert seeing
    assert all(config.is_skipped(name.removesuffix(".weight")) for name in seeing)
    twin, ids = load_twin(tmp_path / "out").eval(), torch.tensor([[5, 77, 201]])
    loaded = type(twin).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert sum(isinstance(module, FluteLinear) for module in loaded.modules()) == 14
    with torch.no_grad():
        found, expected = (model(input_ids=ids).logits for model in (loaded, twin))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("recipe", ["learned", "best"])
def test_recipes_that_look_at_the_whole_model_find_its_decoder(recipe, tmp_path):
    folder = write_model(tmp_path / "dense", "llava", MULTIMODAL["llava"] | {
        "text_config": MULTIMODAL["llava"]["text_config"] | {"vocab_size": 4096}})  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BUNDLED / name, folder / name)
    settings = QuantizeSettings(
        recipe=recipe, device="cpu", samples=4, length=32, group_size=32, bits=3
    )
    report = quantize_checkpoint(folder, tmp_path / "out", settings)
    validate_checkpoint(Checkpoint(tmp_path / "out"))
    assert len(report["modules"]) == 14
    assert "left_out" not in report.get("finetuning", {})


def test_names_of_two_kinds_mean_the_same(tmp_path):
    """Bits by module, skipped and unfit modules, for vLLM (names on disk) and transformers."""
    folder = write_model(tmp_path / "dense", "llava", MULTIMODAL["llava"])
    settings = QuantizeSettings(
        recipe="nf", device="cpu", group_size=128, skip=("re:language_model.*1.mlp.up_proj",),
        overrides={"re:language_model.*0.mlp.*": 3, "re:language_model.*1.self_attn.*": 2},
    )  # fmt: skip
    plan = plan_checkpoint(Checkpoint(folder), replace(settings, skip=(), overrides={}))
    assert not [m for m in plan.specs if "down_proj" not in m]  # the others have 64 columns
    settings = replace(settings, group_size=32)
    with pytest.raises(FluteError, match="gate_proj"):  # vLLM fuses it with up_proj
        quantize_checkpoint(folder, tmp_path / "none", settings)
    settings = replace(settings, skip=("re:language_model.*1.mlp.down_proj",))
    quantize_checkpoint(folder, tmp_path / "out", settings)
    twin, ids = load_twin(tmp_path / "out").eval(), torch.tensor([[5, 77, 201]])
    loaded = type(twin).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    layers = {n: m for n, m in loaded.named_modules() if isinstance(m, FluteLinear)}
    assert {n.rpartition(".")[2]: m.spec.bits for n, m in layers.items() if ".0." in n} == {
        "q_proj": 4, "k_proj": 4, "v_proj": 4, "o_proj": 4, "gate_proj": 3, "up_proj": 3,
        "down_proj": 3,
    }  # fmt: skip
    assert len(layers) == 13
    with torch.no_grad():
        found, expected = (model(input_ids=ids).logits for model in (loaded, twin))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("place", ["embeddings", "norm"])
def test_what_is_wrong_with_weights_is_no_matter_of_the_architecture(place, tmp_path):
    folder = write_model(tmp_path / "dense", "stablelm", {})
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = {"embeddings": "model.embed_tokens.weight",
            "norm": "model.layers.0.input_layernorm.weight"}[place]  # fmt: skip
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    settings = QuantizeSettings(device="cpu", samples=4, length=32, group_size=32)
    with pytest.raises(FluteError, match=name):
        quantize_checkpoint(folder, tmp_path / "out", settings)


def check_moments(folder) -> None:
    """Every linear layer of every block, and the head, read what they read in the whole model."""
    runner = BlockRunner(Checkpoint(folder), torch.device("cpu"))
    ids = torch.randint(3, 250, (6, 48), generator=torch.Generator().manual_seed(1))
    runner.probe(ids[:2])
    hidden = runner.embed(ids, at_once=96)
    config = AutoConfig.from_pretrained(folder)
    model = model_class(config).from_pretrained(folder, dtype=torch.float32).eval()
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _module, args, name=name: seen.__setitem__(name, args[0])
            )
    with torch.no_grad():
        model(ids)
    for index, block in enumerate(runner.blocks):
        prefix = f"{runner.stack}.{index}."
        leaves = [n for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)]
        outputs: list[torch.Tensor] = []
        with runner.block(index) as loaded:
            moments = observe(runner, index, loaded, hidden, 2, leaves, outputs=outputs)
        hidden = torch.cat(outputs)
        for leaf in leaves:
            x = seen[prefix + leaf].reshape(6, 48, -1)
            for part, rows in (("hessian", slice(4)), ("heldout", slice(4, 6))):
                here = x[rows].reshape(-1, x.shape[-1])
                found = moments.sums[f"{part} {leaf}"]
                assert torch.allclose(found, here.T @ here, rtol=1e-3, atol=1e-3), (leaf, part)
            assert moments.tokens[leaf] == 4 * 48
    head = model.get_output_embeddings()
    expected = seen[next(n for n, m in model.named_modules() if m is head)]
    with runner.tails(1) as (tail,), torch.no_grad():
        tail.head.register_forward_pre_hook(lambda _m, args: seen.__setitem__("tail", args[0]))
        parts = []
        for _ in runner.run(tail, len(runner.blocks), hidden):
            parts.append(seen["tail"])
    assert torch.allclose(torch.cat(parts), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["falcon", "opt"])
def test_they_are_quantized_by_the_default_recipe(kind, tmp_path, caplog):
    folder = write_model(tmp_path / "dense", kind, RUN[kind])
    settings = QuantizeSettings(device="cpu", samples=4, length=32, group_size=32)
    report = quantize_checkpoint(folder, tmp_path / "out", settings)
    validate_checkpoint(Checkpoint(tmp_path / "out"))
    assert report["calibration"] is not None
    assert not caplog.records


@pytest.mark.parametrize("kind", sorted(NOT_RUN))
def test_arguments_that_differ_from_text_to_text_are_told(kind, tmp_path, caplog):
    """Their blocks are given an embedding of their own for each token."""
    folder = write_model(tmp_path / "dense", kind, NOT_RUN[kind])
    settings = QuantizeSettings(device="cpu", samples=4, length=32, group_size=32)
    with caplog.at_level("WARNING", logger="flute_vllm"):
        report = quantize_checkpoint(folder, tmp_path / "out", settings)
    assert report["calibration"] is None
    assert "differs from text to text" in caplog.text
    assert "rounds to nearest" in caplog.text


def test_shared_keys_and_values_are_told(tmp_path):
    kinds = ["sliding_attention"] * 2
    changes = {**NOT_RUN["gemma3n_text"], "num_kv_shared_layers": 1, "layer_types": kinds}
    folder = write_model(tmp_path / "dense", "gemma3n_text", changes)
    runner = BlockRunner(Checkpoint(folder), torch.device("cpu"))
    with pytest.raises(FluteError, match="keys and values of others"):
        runner.probe(torch.ones(2, 16, dtype=torch.int64))
