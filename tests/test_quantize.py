"""Codebooks, scales and codes of one matrix; which modules of a model are quantized."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, COMMON, write_tiny_model

from flute_vllm.checkpoint import Checkpoint
from flute_vllm.errors import FluteError
from flute_vllm.format import LayerSpec, dequantize, unpack
from flute_vllm.importers import from_config
from flute_vllm.quantize.codebooks import (
    load_codebook,
    normal_float,
    normal_float_construction,
    read_codebook,
)
from flute_vllm.quantize.model import quantize_checkpoint
from flute_vllm.quantize.plan import QuantizeSettings, plan_checkpoint
from flute_vllm.quantize.state import BLOCK_WEIGHTS
from flute_vllm.quantize.tensor import quantize_tensor
from flute_vllm.validate import validate_checkpoint

VECTORS = Path(__file__).parent / "data" / "flute_vectors"


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def restored(quantized, bits: int, dtype=None) -> torch.Tensor:
    return dequantize(quantized.qweight, quantized.scales, quantized.table, bits, dtype)


# --- codebooks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_float_follows_its_construction(bits):
    values = normal_float(bits).values.double()
    built = torch.tensor(normal_float_construction(bits), dtype=torch.float64)
    assert torch.allclose(values, built, rtol=0, atol=1e-7)
    assert torch.equal(values.sort().values, values)
    assert torch.equal(load_codebook(f"nf{bits}"), normal_float(bits).values)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_float_is_upstreams_table(bits):
    """The table that upstream FLUTE stored in a checkpoint, in its 16 bits."""
    stored = load_file(VECTORS / f"nf_w{bits}g64_n512_k256_fp16_tp32.safetensors")["tables"]
    assert torch.equal(normal_float(bits).values.half(), stored)


def test_user_table(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"bits": 2, "values": [3, -1, 0, 7]}))
    book = read_codebook(path)
    assert (book.name, book.bits, book.table_kind) == ("mine", 2, "scalar")
    assert book.values.tolist() == [3, -1, 0, 7]


# --- one matrix --------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_absmax_reproduces_upstream(bits):
    """Quantizing upstream's dequantized matrix gives upstream's codes and scales back.

    The original weights are not stored, but every group's largest weight has an end code, so
    scales, and with them codes, are determined by the dequantized matrix.
    """
    vector = load_file(VECTORS / f"nf_w{bits}g64_n512_k256_fp16_tp32.safetensors")
    layer = from_config({"num_bits": bits, "group_size": 64}).to_native("module", vector)
    dense = layer.dequantize()
    table = normal_float(bits).values
    result = quantize_tensor(dense, LayerSpec(bits, 64, "float16"), table, "absmax")
    assert torch.equal(result.scales, layer.scales)
    assert torch.equal(result.qweight, layer.qweight)
    assert torch.equal(restored(result, bits), dense)
    assert result.error == 0


@pytest.mark.parametrize("scale", ["absmax", "search"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_are_nearest(bits, scale):
    """No other code of the (unsorted) table is nearer to the weight, by brute force."""
    generator = torch.Generator().manual_seed(bits)
    table = torch.randn(2**bits, generator=generator)
    weight = gaussian(16, 64, seed=bits)
    result = quantize_tensor(weight, LayerSpec(bits, 32), table, scale)
    scales = result.scales.float().repeat_interleave(32, 1)
    exact = result.table.float()[unpack(result.qweight, bits).int()] * scales
    every = result.table.float() * scales[..., None]
    best = (every - weight[..., None]).abs().amin(-1)
    assert torch.allclose((exact - weight).abs(), best, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("bits", "group", "absmax", "search"),
    [(4, 64, 0.00845, 0.0073), (4, 128, 0.00915, 0.0082), (3, 64, 0.0406, 0.0331),
     (2, 64, 0.3167, 0.150)],
)  # fmt: skip
def test_error_on_gaussian_weights(bits, group, absmax, search):
    """The errors that the quantizer study measured (shared notes, accuracy.md 4.1), within 1%."""
    weight = gaussian(1024, 1024)
    spec, table = LayerSpec(bits, group), normal_float(bits).values
    assert quantize_tensor(weight, spec, table, "absmax").error == pytest.approx(absmax, rel=0.02)
    assert quantize_tensor(weight, spec, table, "search").error <= search * 1.01


@settings(max_examples=30, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4]),
    group=st.sampled_from([32, 64, -1]),
    dtype=st.sampled_from(["float16", "bfloat16"]),
    power=st.integers(-12, 8),
    seed=st.integers(0, 2**31),
)
def test_search_is_never_worse_than_absmax(bits, group, dtype, power, seed):
    weight = gaussian(8, 128, seed) * 2.0**power
    weight[3] *= 100 * torch.rand(128) ** 8  # a row with outliers
    spec, table = LayerSpec(bits, group, dtype), normal_float(bits).values
    plain = quantize_tensor(weight, spec, table, "absmax")
    searched = quantize_tensor(weight, spec, table, "search")
    assert searched.error <= plain.error * (1 + 1e-6)
    again = (restored(searched, bits).float() - weight).square().sum() / weight.square().sum()
    assert searched.error == pytest.approx(float(again), rel=1e-3, abs=1e-9)


def test_zero_groups():
    weight = gaussian(4, 128)
    weight[1, 32:64] = 0
    weight[2] = 0
    for scale in ("absmax", "search"):
        table = torch.tensor([0.5, -1.0, 1.0, 0.01])
        result = quantize_tensor(weight, LayerSpec(2, 32), table, scale)
        assert result.scales[1, 1] == 0
        assert not result.scales[2].any()
        assert torch.equal(unpack(result.qweight, 2)[2], torch.full((128,), 3, dtype=torch.uint8))
        assert not restored(result, 2)[2].any()
    nothing = quantize_tensor(torch.zeros(2, 32), LayerSpec(4, 32), normal_float(4).values)
    assert nothing.error == 0
    assert not nothing.scales.any()


def test_blocks_do_not_change_the_result(monkeypatch):
    weight, spec = gaussian(40, 256), LayerSpec(3, 64)
    whole = quantize_tensor(weight, spec, normal_float(3).values)
    monkeypatch.setitem(BLOCK_WEIGHTS, "cpu", 3 * 256)
    parts = quantize_tensor(weight, spec, normal_float(3).values)
    assert torch.equal(whole.qweight, parts.qweight)
    assert torch.equal(whole.scales, parts.scales)


def test_pair_table():
    """Codes of pairs are nearest in the plane; a product table equals the scalar result."""
    weight = gaussian(8, 64)
    scalar = normal_float(2).values
    pairs = torch.cartesian_prod(scalar, scalar)
    one = quantize_tensor(weight, LayerSpec(2, 32), scalar, "absmax")
    two = quantize_tensor(weight, LayerSpec(2, 32, table_kind="pair"), pairs, "absmax")
    assert torch.equal(one.qweight, two.qweight)
    searched = quantize_tensor(weight, LayerSpec(2, 32, table_kind="pair"), pairs, "search")
    assert searched.error <= two.error


def test_rejects_what_it_cannot_quantize():
    table = normal_float(4).values
    for weight, told in [
        (torch.zeros(4, 100), "100"),
        (torch.zeros(4, 64, dtype=torch.int8), "int8"),
        (torch.zeros(64), r"\[64\]"),
    ]:
        with pytest.raises(FluteError, match=told):
            quantize_tensor(weight, LayerSpec(4, 32), table)
    with pytest.raises(FluteError, match=r"\[8\]"):
        quantize_tensor(torch.zeros(4, 32), LayerSpec(3, 32), table)


# --- which modules -----------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", sorted({*ARCHITECTURES} - {"mixtral"}))
def test_decoder_linears_are_found(architecture, tmp_path):
    checkpoint = Checkpoint(write_tiny_model(tmp_path / "dense", architecture))
    plan = plan_checkpoint(checkpoint, QuantizeSettings())
    fused = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    split = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    leaves = fused if architecture == "phi3" else split
    found = [name.rpartition(".")[2] for name in plan.specs]
    assert sorted(found) == sorted(leaves * COMMON["num_hidden_layers"])
    assert plan.config.modules_to_not_convert == ["lm_head"]
    assert plan.config.scale_dtype == "bfloat16"


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_routers_and_experts_stay_dense(model_type, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    experts = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2,
               "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}  # fmt: skip
    config = AutoConfig.for_model(model_type, **COMMON, **experts)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    checkpoint = Checkpoint(tmp_path / "dense")
    plan = plan_checkpoint(checkpoint, QuantizeSettings())
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert attention <= {name.rpartition(".")[2] for name in plan.specs}
    routed = [name for name in checkpoint.tensors if ".experts." in name or ".gate." in name]
    assert routed
    for name in routed:
        assert plan.config.is_skipped(name.removesuffix(".weight")), name
    assert not [name for name in plan.specs if "gate." in f"{name}." or "experts" in name]
    assert len(plan.notes) == 2
    quantize_checkpoint(checkpoint.folder, tmp_path / "out")
    validate_checkpoint(Checkpoint(tmp_path / "out"))


def test_unfit_modules_stay_dense_with_a_note(tmp_path):
    folder = write_tiny_model(tmp_path / "dense", "llama", intermediate_size=480)
    plan = plan_checkpoint(Checkpoint(folder), QuantizeSettings(group_size=64))
    assert len(plan.specs) == 12
    assert "model.layers.1.mlp.down_proj" in plan.config.modules_to_not_convert
    assert any("480 is not a positive multiple of 64" in note for note in plan.notes)
    assert len(plan_checkpoint(Checkpoint(folder), QuantizeSettings(group_size=32)).specs) == 14


def test_a_module_without_float_weight_stays_dense_with_a_note(tmp_path):
    folder = write_tiny_model(tmp_path / "dense", "llama")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors")
    plan = plan_checkpoint(Checkpoint(folder), QuantizeSettings())
    assert name in plan.config.modules_to_not_convert
    assert any(note.startswith(f"{name} stays dense") for note in plan.notes)


def test_names_without_the_base_prefix(tmp_path):
    """Weights saved from the base model lack "model."; modules are found all the same."""
    folder = write_tiny_model(tmp_path / "dense", "llama")
    tensors = load_file(folder / "model.safetensors")
    stripped = {name.removeprefix("model."): value for name, value in tensors.items()}
    save_file(stripped, folder / "model.safetensors")
    plan = plan_checkpoint(Checkpoint(folder), QuantizeSettings())
    assert len(plan.specs) == 14
    assert "layers.0.mlp.down_proj" in plan.specs


@pytest.mark.parametrize("exponent", [-34, -36, -38, -40])
def test_vanishing_groups_are_quantized(exponent):
    """The inverse of such a scale overflows float32; the search must not index with it."""
    weight = torch.linspace(-1, 1, 64).repeat(4, 1)
    weight[1] = weight[1] * 10.0**exponent
    weight[1, 7] = 0.0
    spec = LayerSpec(4, 64)
    result = quantize_tensor(weight.bfloat16(), spec, normal_float(4).values, "search")
    assert result.scales.isfinite().all()
    assert torch.isfinite(dequantize(**result.tensors(), bits=4)).all()
