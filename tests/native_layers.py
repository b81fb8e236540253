"""Native configs, random matrices and layers of vLLM made from them, for tests of the plugin."""

from __future__ import annotations

import torch
from fake_vllm import fake_rank, make_layer

from flute_vllm import format as flute_format
from flute_vllm.errors import FluteError
from flute_vllm.format import LayerSpec
from flute_vllm.plugin.config import FluteConfig

NATIVE = {
    "quant_method": "flute", "format_version": 1, "bits": 4, "group_size": 32,
    "scale_dtype": "bfloat16",
}  # fmt: skip
LAYER = "model.layers.0"


def native_config(**changes) -> FluteConfig:
    return FluteConfig.from_config({**NATIVE, **changes})


def random_matrix(rows: int, columns: int, spec: LayerSpec, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**spec.bits, (rows, columns), generator=generator, dtype=torch.uint8)
    dtype = spec.torch_scale_dtype
    groups = spec.num_groups(columns)
    return {
        "qweight": flute_format.pack(codes, spec.bits),
        "scales": torch.randn(rows, groups, generator=generator).to(dtype),
        "table": torch.randn(spec.table_shape, generator=generator).to(dtype),
    }


def rank_weight(layer: torch.nn.Module) -> torch.Tensor:
    return layer.quant_method.dequantize_weight(layer)


def column_layer(config: FluteConfig, prefix: str = f"{LAYER}.mlp.up_proj"):
    with fake_rank(0, 1):
        return make_layer(
            "ColumnParallelLinear", config, prefix, input_size=64, output_size=8, bias=False
        )


def check_message(error: FluteError, *words: str) -> None:
    assert all((error.what, error.where, error.why, error.fix))
    for word in words:
        assert word in str(error), f"{word!r} not in: {error}"
