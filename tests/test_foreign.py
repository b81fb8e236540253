"""Layers of foreign checkpoints as vLLM's own loader sees them, without an engine."""

from __future__ import annotations

import pytest
import torch
from zoo_writer import dense, nf_table, quantize, zoo_tensors

pytest.importorskip("vllm")
from fake_vllm import fake_rank, finish, make_layer  # noqa: E402
from native_layers import LAYER, rank_weight  # noqa: E402
from vllm.model_executor.models import utils  # noqa: E402
from vllm.utils.torch_utils import set_default_torch_dtype  # noqa: E402

from flute_vllm.plugin.config import FluteConfig  # noqa: E402

ROWS, COLUMNS, GROUP_SIZE = 512, 256, 64


def foreign_layer(bits: int) -> torch.nn.Module:
    """A module with one layer of a zoo checkpoint, made as vLLM makes a bfloat16 model."""
    config = FluteConfig.from_config({"num_sms": 108, "num_bits": bits, "group_size": GROUP_SIZE})
    holder = torch.nn.Module()
    with fake_rank(0, 1), set_default_torch_dtype(torch.bfloat16):
        holder.o_proj = make_layer(
            "RowParallelLinear", config, f"{LAYER}.self_attn.o_proj", input_size=COLUMNS,
            output_size=ROWS, bias=False,
        )  # fmt: skip
    return holder


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_vllm_finds_no_dtype_to_warn_of(bits, dtype, monkeypatch):
    """Its loader warns where a tensor is not of its parameter's dtype, unless float32 holds it."""
    warned = []
    monkeypatch.setattr(utils.logger, "warning", lambda *words: warned.append(words))
    holder = foreign_layer(bits)
    table = nf_table(bits, dtype)
    codes, scales = quantize(torch.randn(ROWS, COLUMNS), table, GROUP_SIZE)
    tensors = zoo_tensors(codes, scales, table, bits)
    loaded = utils.AutoWeightsLoader(holder).load_weights(
        (f"o_proj.{suffix}", tensor) for suffix, tensor in tensors.items()
    )
    assert loaded == {f"o_proj.{suffix}" for suffix in tensors}
    assert warned == []
    finish(holder.o_proj)
    assert torch.equal(rank_weight(holder.o_proj), dense(codes, scales, table))
    assert set(dict(holder.o_proj.named_parameters())) == {"qweight", "scales", "table"}


def test_a_placeholder_has_one_element_of_the_dtype_of_its_tensor():
    """Not none: vLLM's reload passes over a layer for which it could count no element."""
    layer = foreign_layer(4).o_proj
    found = {name: (p.dtype, p.numel()) for name, p in layer.named_parameters()}
    for name in ("qweight", "scales", "table"):
        del found[name]
    assert found == {
        "weight": (torch.int16, 1), "tables": (torch.float32, 1), "tables2": (torch.float32, 1),
    }  # fmt: skip
