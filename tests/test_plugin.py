"""The plugin without an engine: registration, sharding, fused layers, and what it refuses."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch

from flute_vllm import format as flute_format
from flute_vllm import tuning
from flute_vllm.errors import FluteError
from flute_vllm.format import LayerSpec

pytest.importorskip("vllm")
from fake_vllm import fake_rank, finish, load, make_layer  # noqa: E402
from native_layers import (  # noqa: E402
    LAYER,
    check_message,
    column_layer,
    native_config,
    random_matrix,
    rank_weight,
)

from flute_vllm.plugin import register  # noqa: E402
from flute_vllm.plugin.config import FluteConfig  # noqa: E402


def dense(tensors: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
    return flute_format.dequantize(**tensors, bits=bits)


# --- registration -------------------------------------------------------------------------------


def test_import_is_light():
    program = (
        "import sys, flute_vllm; heavy = {'torch', 'vllm', 'transformers'} & set(sys.modules);"
        "raise SystemExit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_vllm_finds_the_plugin_in_a_fresh_process():
    program = (
        "from vllm.plugins import load_general_plugins; load_general_plugins()\n"
        "from vllm.model_executor.layers.quantization import get_quantization_config\n"
        "import sys, torch\n"
        "if get_quantization_config('flute').__name__ != 'FluteConfig': raise SystemExit(1)\n"
        "if 'gemm' in vars(torch.ops.flute): raise SystemExit(2)\n"
        "if torch.cuda.is_initialized(): raise SystemExit(3)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_registering_twice_is_harmless():
    from vllm.model_executor.layers.quantization import get_quantization_config

    register()
    register()
    assert get_quantization_config("flute") is FluteConfig


def test_a_vllm_release_outside_the_tested_range_is_named(monkeypatch, caplog):
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    with caplog.at_level("WARNING", logger="vllm.flute"):
        register()
    assert "0.99.1" in caplog.text


def test_config_crosses_processes():
    config = native_config(overrides={"down_proj": {"bits": 3}})
    for clone in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert clone.schema == config.schema
        assert "bits=4" in repr(clone)
    zoo = FluteConfig.from_config({"num_sms": 108, "num_bits": 4, "group_size": 64})
    assert pickle.loads(pickle.dumps(zoo)).importer.layer_spec() == zoo.importer.layer_spec()


def test_errors_cross_processes():
    error = FluteError("a", where="b", why="c", fix="d")
    assert pickle.loads(pickle.dumps(error)).fix == "d"


# --- sharding: the ranks together hold exactly the matrix ---------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["ColumnParallelLinear", "RowParallelLinear", "ReplicatedLinear"])
def test_ranks_hold_the_slices_of_the_dense_matrix(kind, size, group_size, bits):
    spec = LayerSpec(bits, group_size, "float16")
    tensors = random_matrix(24, 256, spec, seed=bits)
    config = native_config(bits=bits, group_size=group_size, scale_dtype="float16")
    expected = dense(tensors, bits)
    for rank in range(size):
        with fake_rank(rank, size):
            sizes = {"input_size": 256, "output_size": 24, "bias": False}
            layer = make_layer(kind, config, f"{LAYER}.mlp.down_proj", **sizes)
            load(layer, tensors)
            finish(layer)
        if kind == "ColumnParallelLinear":
            share = expected.chunk(size, 0)[rank]
        elif kind == "RowParallelLinear":
            share = expected.chunk(size, 1)[rank]
        else:
            share = expected
        assert torch.equal(rank_weight(layer), share)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_qkv_keeps_three_tables_and_replicates_kv_heads(size):
    spec = LayerSpec(4, 32)
    config = native_config()
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    heads, kv_heads, head_size, hidden = 4, 2, 8, 64
    rows = {"q": heads * head_size, "k": kv_heads * head_size, "v": kv_heads * head_size}
    parts = {name: random_matrix(n, hidden, spec, seed=ord(name)) for name, n in rows.items()}
    for rank in range(size):
        with fake_rank(rank, size):
            layer = make_layer(
                "QKVParallelLinear", config, f"{LAYER}.self_attn.qkv_proj", hidden_size=hidden,
                head_size=head_size, total_num_heads=heads, total_num_kv_heads=kv_heads, bias=False,
            )  # fmt: skip
            for name in ("v", "q", "k"):  # any order
                load(layer, parts[name], name)
            finish(layer)
        kv_rank, kv_ranks = (
            (rank, size) if size <= kv_heads else (rank * kv_heads // size, kv_heads)
        )
        expected = [
            dense(parts["q"], 4).chunk(size, 0)[rank],
            dense(parts["k"], 4).chunk(kv_ranks, 0)[kv_rank],
            dense(parts["v"], 4).chunk(kv_ranks, 0)[kv_rank],
        ]
        assert torch.equal(rank_weight(layer), torch.cat(expected))
        assert layer.table.shape == (3, 16)


@pytest.mark.parametrize("size", [1, 2])
def test_gate_up_from_two_files_and_from_one(size):
    spec = LayerSpec(3, 64)
    config = native_config(bits=3, group_size=64)
    config.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    gate, up = random_matrix(16, 128, spec, 1), random_matrix(16, 128, spec, 2)
    fused = random_matrix(32, 128, spec, 3)
    sizes = {"input_size": 128, "output_sizes": [16, 16], "bias": False}
    for rank in range(size):
        with fake_rank(rank, size):
            prefix = f"{LAYER}.mlp.gate_up_proj"
            separate = make_layer("MergedColumnParallelLinear", config, prefix, **sizes)
            load(separate, gate, 0)
            load(separate, up, 1)
            finish(separate)
            together = make_layer("MergedColumnParallelLinear", config, prefix, **sizes)
            load(together, fused)
            finish(together)
        halves = [dense(gate, 3).chunk(size, 0)[rank], dense(up, 3).chunk(size, 0)[rank]]
        assert torch.equal(rank_weight(separate), torch.cat(halves))
        halves = [half.chunk(size, 0)[rank] for half in dense(fused, 3).chunk(2, 0)]
        assert torch.equal(rank_weight(together), torch.cat(halves))


def test_forward_adds_the_bias_and_keeps_the_dtype():
    spec = LayerSpec(4, 32)
    tensors = random_matrix(8, 64, spec, seed=0)
    with fake_rank(0, 1):
        layer = make_layer(
            "ColumnParallelLinear", native_config(), "a", input_size=64, output_size=8, bias=True
        )
        load(layer, {**tensors, "bias": torch.arange(8.0)})
        finish(layer)
    x = torch.randn(3, 64)
    y, _ = layer(x)
    expected = x.double() @ dense(tensors, 4).double().T + torch.arange(8.0)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    for dtype in (torch.float16, torch.bfloat16):
        assert layer.quant_method.apply(layer, x.to(dtype)).dtype == dtype
        wide_bias = torch.arange(8.0)
        assert layer.quant_method.apply(layer, x.to(dtype), wide_bias).dtype == dtype


def test_an_eager_call_passes_one_launch_and_a_graph_all(monkeypatch):
    """Looked up by the rows of x, whatever its leading dimensions; no device is needed for that."""
    spec = LayerSpec(4, 32)
    with fake_rank(0, 1):
        layer = make_layer(
            "ColumnParallelLinear", native_config(), "a", input_size=64, output_size=8, bias=False
        )
        load(layer, random_matrix(8, 64, spec, seed=0))
        finish(layer)
    layer.flute_plan = tuning.plan(8, 64, 4, 32, (8,), tuning.H200)
    layer.flute_plan_parts = tuning.by_rows(layer.flute_plan)
    gemm, seen = torch.ops.flute.gemm, []

    class Recorder:
        def __call__(self, *arguments):
            *rest, plan, following, next_bytes = arguments
            assert (following, next_bytes) == (None, tuning.AHEAD_BYTES)
            seen.append(plan)
            # vLLM 0.33 leaves parameters of its own class, which would call this once more.
            with torch._C.DisableTorchFunctionSubclass():
                return gemm(*rest, [])

    monkeypatch.setattr(torch.ops.flute, "gemm", Recorder())
    for shape in ((1, 64), (2, 50, 64), (0, 64)):
        layer.quant_method.apply(layer, torch.randn(shape))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    layer.quant_method.apply(layer, torch.randn(1, 64))
    found = tuning.entries(8, 64, 4, 32, (8,), tuning.H200)
    wanted = [[0, *tuning.entry_of(found, m).numbers[1:]] for m in (1, 100, 0)]
    assert seen == [*wanted, layer.flute_plan]


# --- which layers are quantized -----------------------------------------------------------------


def test_patterns_select_bits_and_dense_layers():
    config = native_config(
        modules_to_not_convert=["lm_head", "re:.*layers\\.1\\..*"],
        overrides={"down_proj": {"bits": 3, "group_size": 64}},
    )
    with fake_rank(0, 1):
        sizes = {"input_size": 128, "output_size": 8, "bias": False}
        down = make_layer("RowParallelLinear", config, f"{LAYER}.mlp.down_proj", **sizes)
        other = make_layer("RowParallelLinear", config, f"{LAYER}.self_attn.o_proj", **sizes)
        skipped = make_layer("RowParallelLinear", config, "model.layers.1.mlp.down_proj", **sizes)
    assert down.quant_method.spec == LayerSpec(3, 64)
    assert other.quant_method.spec == LayerSpec(4, 32)
    assert type(skipped.quant_method).__name__ == "UnquantizedLinearMethod"
    assert config.get_quant_method(torch.nn.Embedding(4, 4), "model.embed_tokens") is None


# --- what it refuses ----------------------------------------------------------------------------


def test_rank_that_cuts_a_group_names_the_allowed_sizes():
    with fake_rank(0, 4), pytest.raises(FluteError) as caught:
        make_layer(
            "RowParallelLinear", native_config(group_size=64), f"{LAYER}.mlp.down_proj",
            input_size=384, output_size=8, bias=False,
        )  # fmt: skip
    check_message(caught.value, "384 / 4 = 96", "group_size 64", "allowed: 1, 2", "down_proj")


def test_in_features_that_do_not_fit_the_group():
    with fake_rank(0, 1), pytest.raises(FluteError) as caught:
        make_layer("ColumnParallelLinear", native_config(), "layer", input_size=80, output_size=8)
    check_message(caught.value, "80", "multiple of 32", "layer")


@pytest.mark.parametrize("missing", ["qweight", "scales", "table"])
def test_missing_tensor_is_named(missing):
    layer = column_layer(native_config())
    tensors = random_matrix(8, 64, LayerSpec(4, 32), seed=0)
    tensors.pop(missing)
    load(layer, tensors)
    with pytest.raises(FluteError) as caught:
        finish(layer)
    check_message(caught.value, "missing", f"{LAYER}.mlp.up_proj.{missing}")


def test_missing_matrix_of_a_fused_layer_is_named():
    config = native_config()
    tensors = random_matrix(8, 64, LayerSpec(4, 32), seed=0)
    with fake_rank(0, 1):
        layer = make_layer(
            "MergedColumnParallelLinear", config, f"{LAYER}.mlp.gate_up_proj",
            input_size=64, output_sizes=[8, 8], bias=False,
        )  # fmt: skip
    load(layer, tensors, 0)
    with pytest.raises(FluteError) as caught:
        finish(layer)
    check_message(caught.value, "missing", "gate_up_proj", "matrix 1")


def test_layer_without_any_tensor_is_an_error():
    with pytest.raises(FluteError) as caught:
        finish(column_layer(native_config()))
    check_message(caught.value, "missing", "up_proj.qweight")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("qweight", lambda t: t[:4], ["[4, 8]", "[8, 8]"]),
        ("qweight", lambda t: t[:, :6], ["[8, 6]", "[8, 8]"]),
        ("qweight", lambda t: t.to(torch.int64), ["int64", "int32"]),
        ("scales", lambda t: t.half(), ["float16", "bfloat16"]),
        ("scales", lambda t: t[:, :1], ["[8, 1]", "[8, 2]"]),
        ("table", lambda t: t[:8], ["[8]", "[16]"]),
        ("table", lambda t: t.float(), ["float32", "bfloat16"]),
    ],
)
def test_wrong_shape_or_dtype_is_refused(name, change, words):
    layer = column_layer(native_config())
    tensors = random_matrix(8, 64, LayerSpec(4, 32), seed=0)
    with pytest.raises(FluteError) as caught:
        load(layer, {name: change(tensors[name])})
    check_message(caught.value, f"up_proj.{name}", *words)


@pytest.mark.parametrize(("name", "value"), [("scales", "nan"), ("table", "inf")])
def test_values_that_are_not_finite_are_refused(name, value):
    layer = column_layer(native_config())
    tensors = random_matrix(8, 64, LayerSpec(4, 32), seed=0)
    tensors[name].view(-1)[3] = float(value)
    load(layer, tensors)
    with pytest.raises(FluteError) as caught:
        finish(layer)
    check_message(caught.value, f"up_proj.{name}", "1 of")


def test_fused_matrices_with_different_bits_are_refused():
    config = native_config(overrides={"k_proj": {"bits": 3}})
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    with fake_rank(0, 1), pytest.raises(FluteError) as caught:
        make_layer(
            "QKVParallelLinear", config, f"{LAYER}.self_attn.qkv_proj", hidden_size=64,
            head_size=8, total_num_heads=4, total_num_kv_heads=2,
        )  # fmt: skip
    check_message(caught.value, "k_proj: 3 bits", "q_proj: 4 bits", "qkv_proj")


def test_unknown_format_version_is_refused():
    with pytest.raises(FluteError) as caught:
        native_config(format_version=2)
    check_message(caught.value, "format_version", "2")


def test_config_of_another_method_is_refused():
    with pytest.raises(FluteError):
        FluteConfig.from_config({"quant_method": "gptq", "bits": 4})


def test_dummy_weights_pass_the_checks():
    layer = column_layer(native_config())
    layer.scales.data.uniform_(-1e-3, 1e-3)
    layer.table.data.uniform_(-1e-3, 1e-3)
    finish(layer)
    assert layer.quant_method.apply(layer, torch.randn(2, 64)).isfinite().all()
