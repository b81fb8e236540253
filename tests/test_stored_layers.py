"""Layers of vLLM against what a checkpoint stores: fused on disk, absent parts, renamed, added."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny_model

from flute_vllm.checkpoint import Checkpoint, read_json
from flute_vllm.format import LayerSpec
from flute_vllm.quantize.model import quantize_checkpoint
from flute_vllm.quantize.plan import QuantizeSettings, plan_checkpoint
from flute_vllm.validate import validate_checkpoint

pytest.importorskip("vllm")

from flute_vllm.plugin.config import FluteConfig  # noqa: E402

SETTINGS = {"recipe": "nf", "group_size": 32, "device": "cpu"}


def config_of(folder, packed: dict[str, list[str]] | None = None) -> FluteConfig:
    section = read_json(folder / "config.json")["quantization_config"]
    config = FluteConfig.from_config(section)
    config.packed_modules_mapping = packed or {}
    config.maybe_update_config(str(folder))
    return config


def spec_of(config: FluteConfig, prefix: str) -> LayerSpec | None:
    return config.common_spec(prefix, config.stored_modules(prefix))


def quantize(dense, out, **settings):
    quantize_checkpoint(dense, out, QuantizeSettings(**{**SETTINGS, **settings}))
    return out


def add_tensors(folder, tensors: dict[str, torch.Tensor]) -> None:
    file = folder / "model.safetensors"
    save_file({**load_file(file), **tensors}, file, {"format": "pt"})


@pytest.mark.parametrize("override", [{"gate_up_proj": 3}, {}])
def test_a_matrix_that_is_fused_on_disk_keeps_its_own_bits(override, tmp_path):
    """vLLM packs gate_proj and up_proj of GLM-4, whose checkpoints hold gate_up_proj."""
    dense = write_tiny_model(tmp_path / "dense", "phi3")
    skip = () if override else ("gate_up_proj",)
    out = quantize(dense, tmp_path / "out", overrides=override, skip=skip)
    config = config_of(out, {"gate_up_proj": ["gate_proj", "up_proj"]})
    found = spec_of(config, "model.layers.0.mlp.gate_up_proj")
    assert found == (LayerSpec(3, 32) if override else None)
    assert spec_of(config, "model.layers.0.mlp.down_proj") == LayerSpec(4, 32)


def test_a_part_that_the_checkpoint_lacks_does_not_count(tmp_path):
    """Gemma-4 has no v_proj where values are the keys."""
    dense = write_tiny_model(tmp_path / "dense", "llama")
    out = quantize(dense, tmp_path / "out", overrides={"q_proj": 3, "k_proj": 3, "v_proj": 3})
    config = config_of(out, {"qkv_proj": ["q_proj", "k_proj", "v_proj"]})
    for name in [n for n in config.stored if n.endswith("0.self_attn.v_proj")]:
        del config.stored[name]
    config.schema.overrides.pop("v_proj")
    assert spec_of(config, "model.layers.0.self_attn.qkv_proj") == LayerSpec(3, 32)


def test_a_layer_that_vllm_adds_stays_dense(tmp_path):
    """Such as the score of a reranker, which is made of rows of the head."""
    out = quantize(write_tiny_model(tmp_path / "dense", "llama"), tmp_path / "out")
    config = config_of(out)
    assert spec_of(config, "score") is None
    assert spec_of(config, "model.layers.1.mlp.down_proj") == LayerSpec(4, 32)


@pytest.mark.parametrize("name", ["qkv_proj", "gate_up_proj"])
def test_a_fused_layer_of_a_class_that_tells_no_parts(name, tmp_path):
    """As StableLM and GPT-J have it in vLLM; and a name that nobody knows, as of MiniCPM3."""
    dense = write_tiny_model(tmp_path / "dense", "llama")
    bits = {part: 3 for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")}
    config = config_of(quantize(dense, tmp_path / "out", overrides=bits))
    parent = "model.layers.0." + ("self_attn" if name == "qkv_proj" else "mlp")
    assert spec_of(config, f"{parent}.{name}") == LayerSpec(3, 32)
    assert config.common_spec("a.fused", config.stored_modules("a.fused"), True) == LayerSpec(4, 32)
    assert spec_of(config, "") == LayerSpec(4, 32)


def test_expressions_hold_for_the_names_on_disk(tmp_path):
    from vllm.model_executor.models.utils import WeightsMapper

    dense = write_tiny_model(tmp_path / "dense", "llama")
    out = quantize(dense, tmp_path / "out", overrides={r"re:model\.layers\.1\.mlp\..*": 2})
    config = config_of(out)
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "decoder."}))
    assert spec_of(config, "decoder.layers.1.mlp.down_proj") == LayerSpec(2, 32)
    assert spec_of(config, "decoder.layers.0.mlp.down_proj") == LayerSpec(4, 32)
    # vLLM puts a decoder inside of a larger model.
    assert spec_of(config, "language_model.model.layers.1.mlp.down_proj") == LayerSpec(2, 32)


def test_stored_matrices_that_the_model_lacks_stay_dense(tmp_path):
    """Blocks for further tokens (MTP), and blocks beyond num_hidden_layers."""
    dense = write_tiny_model(tmp_path / "dense", "llama")
    more = ("mtp.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj")
    add_tensors(dense, {f"{name}.weight": torch.zeros(64, 64).bfloat16() for name in more})
    plan = plan_checkpoint(Checkpoint(dense), QuantizeSettings(**SETTINGS))
    assert any("2 matrices stay dense" in note for note in plan.notes)
    out = quantize(dense, tmp_path / "out")
    validate_checkpoint(Checkpoint(out))
    config = config_of(out)
    for name in more:
        assert spec_of(config, name) is None
    skipping = QuantizeSettings(**SETTINGS, skip=("mtp",))
    assert plan_checkpoint(Checkpoint(dense), skipping).config.is_skipped(more[0])


def test_what_vllm_cannot_load_quantized_stays_dense(tmp_path):
    dense = write_tiny_model(
        tmp_path / "dense", "llama", model_type="llama4_text", num_local_experts=2,
        intermediate_size_mlp=512, interleave_moe_layer_step=3, moe_layers=[], head_dim=64,
    )  # fmt: skip
    plan = plan_checkpoint(Checkpoint(dense), QuantizeSettings(**SETTINGS))
    quantized = {module.rpartition(".")[2] for module in plan.specs}
    assert quantized == {"o_proj", "gate_proj", "up_proj", "down_proj"}
    assert any("rotary" in note for note in plan.notes)
