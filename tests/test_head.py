"""The output head: sharded by vocabulary in vLLM, quantized on request."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flute_vllm import format as flute_format
from flute_vllm.checkpoint import Checkpoint
from flute_vllm.errors import FluteError
from flute_vllm.evaluate import load_twin
from flute_vllm.format import LayerSpec
from flute_vllm.hf_quantizer import FluteLinear
from flute_vllm.quantize.blocks import BlockRunner
from flute_vllm.quantize.model import quantize_checkpoint
from flute_vllm.quantize.plan import QuantizeSettings, plan_checkpoint
from flute_vllm.validate import quantized_modules, validate_checkpoint

pytest.importorskip("vllm")
from fake_vllm import fake_rank, finish, load, make_head  # noqa: E402
from native_layers import check_message, native_config, random_matrix, rank_weight  # noqa: E402
from native_writer import write_native  # noqa: E402
from tiny_models import write_tiny_model  # noqa: E402

VOCABULARY, COLUMNS = 100, 64
HEAD = "lm_head"


def head_config(**changes):
    return native_config(modules_to_not_convert=[], scale_dtype="float16", **changes)


def random_head(bits: int = 4) -> dict[str, torch.Tensor]:
    return random_matrix(VOCABULARY, COLUMNS, LayerSpec(bits, 32, "float16"), seed=bits)


# --- in vLLM ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_hold_their_rows_of_the_vocabulary_and_zeros(size, bits):
    tensors = random_head(bits)
    padded = torch.zeros(-(-VOCABULARY // 64) * 64, COLUMNS)
    padded[:VOCABULARY] = flute_format.dequantize(**tensors, bits=bits)
    for rank, share in enumerate(padded.chunk(size)):
        with fake_rank(rank, size):
            layer = make_head(head_config(bits=bits), HEAD, VOCABULARY, COLUMNS)
            load(layer, tensors)
            finish(layer)
        assert torch.equal(rank_weight(layer), share.to(rank_weight(layer).dtype))
        x = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(rank))
        found = layer.quant_method.apply(layer, x)
        torch.testing.assert_close(found, x @ share.t(), rtol=1e-4, atol=1e-4)
        assert (layer.weight.dtype, layer.weight.device) == (torch.float32, x.device)  # for LoRA


@pytest.mark.parametrize(
    ("prefix", "skipped", "stored", "is_quantized"),
    [
        (HEAD, [], None, True),
        ("language_model.lm_head", [], None, True),
        (HEAD, [HEAD], None, False),
        (HEAD, [], {"lm_head", "model.layers.0.mlp.up_proj"}, True),
        ("language_model.lm_head", [], {"lm_head"}, True),
        (HEAD, [], {"model.layers.0.mlp.up_proj"}, False),  # dense or tied, and not listed
        ("", [], None, False),  # a model that does not tell its head's name
    ],
)
def test_which_heads_are_quantized(prefix, skipped, stored, is_quantized):
    config = native_config(modules_to_not_convert=skipped)
    config.quantized_modules = None if stored is None else frozenset(stored)
    with fake_rank(0, 1):
        layer = make_head(config, prefix, VOCABULARY, COLUMNS)
    assert hasattr(layer, "qweight") == is_quantized
    assert ("weight" in dict(layer.named_parameters())) != is_quantized


def test_a_head_of_another_vocabulary_is_refused():
    with fake_rank(0, 2):
        layer = make_head(head_config(), HEAD, VOCABULARY - 1, COLUMNS)
        with pytest.raises(FluteError) as caught:
            load(layer, random_head())
    check_message(caught.value, "lm_head.qweight", "[100, 8]", "[99, 8]")


def test_a_missing_tensor_of_the_head_is_named():
    tensors = random_head()
    tensors.pop("table")
    with fake_rank(0, 1):
        layer = make_head(head_config(), HEAD, VOCABULARY, COLUMNS)
        load(layer, tensors)
        with pytest.raises(FluteError) as caught:
            finish(layer)
    check_message(caught.value, "missing tensor table", "lm_head.table")


# --- quantizing ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("head") / "dense", "llama", vocab_size=500)


def settings_of(recipe: str, **changes) -> QuantizeSettings:
    return QuantizeSettings(recipe=recipe, lm_head=True, group_size=32, **changes)


def test_a_head_is_quantized_only_on_request(llama, tmp_path):
    checkpoint = Checkpoint(llama)
    without = plan_checkpoint(checkpoint, QuantizeSettings(group_size=32))
    assert HEAD not in without.specs
    assert HEAD in without.config.modules_to_not_convert
    plan = plan_checkpoint(checkpoint, settings_of("fast", overrides={HEAD: 3}))
    assert plan.specs[HEAD] == LayerSpec(3, 32, "bfloat16")
    assert plan.shapes[HEAD] == (500, 256)
    quantize_checkpoint(llama, tmp_path / "out", settings_of("fast", overrides={HEAD: 3}))
    result = Checkpoint(tmp_path / "out")
    validate_checkpoint(result)
    assert HEAD in quantized_modules(result)
    assert f"{HEAD}.weight" not in result.tensors


@pytest.mark.parametrize("is_declared", [True, False])
def test_a_tied_head_gets_a_weight_of_its_own(is_declared, tmp_path):
    """With the flag in config.json, and where that is the architecture's default."""
    from transformers import AutoModelForCausalLM

    architecture = "qwen2" if is_declared else "gemma3"
    folder = write_tiny_model(tmp_path / "dense", architecture)
    assert "lm_head.weight" not in Checkpoint(folder).tensors
    embeddings = Checkpoint(folder).load("model.embed_tokens.weight")
    quantize_checkpoint(folder, tmp_path / "out", settings_of("fast", calib="none"))
    result = Checkpoint(tmp_path / "out")
    validate_checkpoint(result)
    assert not result.is_head_tied
    assert result.config["tie_word_embeddings"] is False
    assert torch.equal(result.load("model.embed_tokens.weight"), embeddings)
    stored = {name: result.load(f"{HEAD}.{name}") for name in ("qweight", "scales", "table")}
    head = flute_format.dequantize(**stored, bits=4).float()
    error = (head - embeddings.float()).square().sum() / embeddings.float().square().sum()
    assert error < 0.01
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    twin, ids = load_twin(tmp_path / "out"), torch.tensor([[5, 77, 301]])
    assert isinstance(model.lm_head, FluteLinear)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, twin(ids).logits, rtol=1e-3, atol=1e-3)


def test_a_head_that_is_missing_is_not_made_from_the_embeddings(llama, tmp_path):
    """A model that is not tied may store its head under a name that is not looked for."""
    folder = tmp_path / "dense"
    shutil.copytree(llama, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["head.weight"] = tensors.pop("lm_head.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FluteError) as caught:
        plan_checkpoint(Checkpoint(folder), settings_of("fast"))
    check_message(caught.value, "lm_head.weight", "leave out --lm-head")


def test_a_head_that_vllm_never_reads_is_refused(tmp_path):
    folder = write_tiny_model(tmp_path / "dense", "gemma2")
    with pytest.raises(FluteError) as caught:
        plan_checkpoint(Checkpoint(folder), settings_of("fast"))
    check_message(caught.value, "lm_head", "gemma2", "leave out --lm-head")


def test_a_quantized_head_beside_a_config_that_ties_it_is_refused(llama, tmp_path):
    out = write_native(llama, tmp_path / "q", LayerSpec(4, 32), modules_to_not_convert=[])
    validate_checkpoint(Checkpoint(out))
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(FluteError) as caught:
        validate_checkpoint(Checkpoint(out))
    check_message(caught.value, "lm_head.qweight", "tie_word_embeddings")


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "qwen3", "phi3"])
def test_what_the_head_reads_is_what_transformers_gives_it(family, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = write_tiny_model(tmp_path / "dense", family)
    ids = torch.randint(3, 500, (3, 16), generator=torch.Generator().manual_seed(1))
    runner = BlockRunner(Checkpoint(folder), torch.device("cpu"))
    hidden = runner.embed(ids)
    for index in range(len(runner.blocks)):
        with runner.block(index) as block:
            hidden = torch.cat(list(runner.run(block, index, hidden)))
    with runner.tails(2) as tails:
        found = [torch.cat(list(runner.run(t, len(runner.blocks), hidden))) for t in tails]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = model.get_decoder()(input_ids=ids).last_hidden_state
    for each in found:
        torch.testing.assert_close(each, wanted, rtol=1e-3, atol=1e-3)
    assert all(p.device.type == "meta" for p in runner.model.parameters())
