"""The plugin without an engine: registration, sharding, fused layers, and what it refuses."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import weakref

import pytest
import torch

from flute_vllm import format as flute_format
from flute_vllm import tuning
from flute_vllm.errors import FluteError
from flute_vllm.format import LayerSpec

pytest.importorskip("vllm")
from fake_vllm import fake_rank, finish, load, make_layer  # noqa: E402

from flute_vllm.plugin import register  # noqa: E402
from flute_vllm.plugin.config import FluteConfig  # noqa: E402
from flute_vllm.plugin.order import LayerOrder, next_weight  # noqa: E402

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


def dense(tensors: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
    return flute_format.dequantize(**tensors, bits=bits)


def rank_weight(layer: torch.nn.Module) -> torch.Tensor:
    return layer.quant_method.dequantize_weight(layer)


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
            return gemm(*rest, [])

    monkeypatch.setattr(torch.ops.flute, "gemm", Recorder())
    for shape in ((1, 64), (2, 50, 64), (0, 64)):
        layer.quant_method.apply(layer, torch.randn(shape))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    layer.quant_method.apply(layer, torch.randn(1, 64))
    found = tuning.entries(8, 64, 4, 32, (8,), tuning.H200)
    wanted = [[0, *tuning.entry_of(found, m).numbers[1:]] for m in (1, 100, 0)]
    assert seen == [*wanted, layer.flute_plan]


# --- the layer that runs next -------------------------------------------------------------------


class Finished(torch.nn.Module):
    """As much of a finished layer as LayerOrder looks at."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.flute_order, self.flute_place = None, 0
        self.qweight = torch.nn.Parameter(
            torch.zeros(4, dtype=torch.int32, device=device), requires_grad=False
        )


def is_next(layer: torch.nn.Module, other: torch.nn.Module | None) -> bool:
    return next_weight(layer) is (None if other is None else other.qweight)


def test_layers_are_linked_in_the_order_of_finishing():
    order, layers = LayerOrder(), [Finished() for _ in range(3)]
    assert all(is_next(layer, None) for layer in layers)
    for at in (1, 0, 2):
        order.append(layers[at])
    assert is_next(layers[1], layers[0])
    assert is_next(layers[0], layers[2])
    assert is_next(layers[2], None)
    # Not a part of the layer: it is neither saved nor moved with it.
    assert list(layers[1].modules()) == [layers[1]]
    assert list(layers[1].state_dict()) == ["qweight"]


def test_a_reload_keeps_the_places_and_finds_the_new_weights():
    order, layers = LayerOrder(), [Finished() for _ in range(3)]
    for layer in layers:
        order.append(layer)
    for layer in reversed(layers):  # in any order, or only some
        layer.qweight = torch.nn.Parameter(torch.ones(4, dtype=torch.int32), requires_grad=False)
        order.append(layer)
    late = Finished()  # behind the last that came for the first time
    order.append(late)
    for layer, behind in zip(layers, [*layers[1:], late], strict=True):
        assert is_next(layer, behind)
    assert next_weight(layers[0]).sum() == 4


def test_layers_of_two_devices_are_not_linked():
    order, here, there, there_too = LayerOrder(), Finished(), Finished("meta"), Finished("meta")
    for layer in (here, there, there_too):
        order.append(layer)
    assert is_next(here, None)
    assert is_next(there, there_too)


def test_the_layers_of_a_model_that_is_gone_are_not_held():
    order, layers = LayerOrder(), [Finished(), Finished()]
    for layer in layers:
        order.append(layer)
    gone = [weakref.ref(layer) for layer in layers]
    del layer, layers
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    late = Finished()
    order.append(late)
    assert late.flute_order == [late]


def test_copies_of_a_config_know_no_layers():
    config, layer = native_config(), Finished()
    config.order.append(layer)
    for clone in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert clone.order is not config.order
        clone.order.append(Finished())
        assert is_next(layer, None)


def test_a_model_of_many_layers_compiles(monkeypatch):
    """320 layers of a 70B model: a link from each to the next was too deep for torch.compile."""
    config = native_config()
    layers = [column_layer(config, f"{LAYER}.mlp.up_proj{i}") for i in range(320)]
    matrix = random_matrix(8, 64, LayerSpec(4, 32), seed=0)
    for layer in layers:
        load(layer, matrix)
        finish(layer)
        layer.flute_plan = tuning.plan(8, 64, 4, 32, (8,), tuning.H200)
        config.order.append(layer)
    # Without the recorders of other tests, as the plugin's layers call it.
    model = torch.nn.ModuleList(layers)

    def forward(x: torch.Tensor) -> torch.Tensor:
        total = x.new_zeros(len(x), 8)
        for layer in model:
            total = total + layer.quant_method.apply(layer, x)
        return total

    x = torch.randn(3, 64)
    torch._dynamo.reset()
    found = torch.compile(forward, backend="eager", fullgraph=True)(x)
    expected = 320 * torch.nn.functional.linear(x, rank_weight(layers[0]).float())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_one_order_serves_all_layers_of_a_config():
    config = native_config()
    layers = [column_layer(config, f"{LAYER}.mlp.{name}") for name in ("up_proj", "down_proj")]
    assert {id(layer.quant_method.order) for layer in layers} == {id(config.order)}
    for layer in layers:
        load(layer, random_matrix(8, 64, LayerSpec(4, 32), seed=0))
        finish(layer)
    # Only the GPU kernels ask ahead: layers without a plan have no place.
    assert [layer.flute_order for layer in layers] == [None, None]


def test_a_call_passes_the_weights_of_the_next_layer(monkeypatch):
    monkeypatch.setenv("FLUTE_AHEAD_BYTES", "8192")
    config = native_config()
    layers = [column_layer(config, f"{LAYER}.mlp.{name}") for name in ("up_proj", "down_proj")]
    for seed, layer in enumerate(layers):
        load(layer, random_matrix(8, 64, LayerSpec(4, 32), seed))
        finish(layer)
        layer.flute_plan = tuning.plan(8, 64, 4, 32, (8,), tuning.H200)
        layer.flute_plan_parts = tuning.by_rows(layer.flute_plan)
        config.order.append(layer)
    gemm, seen = torch.ops.flute.gemm, []

    class Recorder:
        def __call__(self, *arguments):
            seen.append(arguments[-2:])
            return gemm(*arguments)  # the CPU op takes them, and does without

    monkeypatch.setattr(torch.ops.flute, "gemm", Recorder())
    x = torch.randn(3, 64)
    expected = torch.nn.functional.linear(x, rank_weight(layers[0]).float())
    y = layers[0].quant_method.apply(layers[0], x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    layers[1].quant_method.apply(layers[1], x)
    assert seen[0][0] is layers[1].qweight
    assert seen[1][0] is None  # the last
    layers[1].qweight = torch.nn.Parameter(layers[1].qweight.clone(), requires_grad=False)
    layers[0].quant_method.apply(layers[0], x)
    assert seen[2][0] is layers[1].qweight
    layers[0].flute_plan = []  # as on a CPU, where canonical weights follow
    layers[0].quant_method.apply(layers[0], x)
    assert seen[3][0] is None
    assert {next_bytes for _, next_bytes in seen} == {8192}


def test_bytes_asked_ahead_come_from_the_environment():
    assert tuning.ahead_bytes({}) == tuning.AHEAD_BYTES
    assert tuning.ahead_bytes({"FLUTE_AHEAD_BYTES": ""}) == tuning.AHEAD_BYTES
    assert tuning.ahead_bytes({"FLUTE_AHEAD_BYTES": "0"}) == 0
    assert tuning.ahead_bytes({"FLUTE_AHEAD_BYTES": "1048576"}) == 1 << 20


@pytest.mark.parametrize("text", ["4M", "-1", "1e6", "4096.0", "many", "\u00b2"])
def test_a_bad_number_of_bytes_is_named(text, monkeypatch):
    monkeypatch.setenv("FLUTE_AHEAD_BYTES", text)
    with pytest.raises(FluteError) as caught:
        column_layer(native_config())
    check_message(caught.value, "FLUTE_AHEAD_BYTES", text, str(tuning.AHEAD_BYTES))


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


def column_layer(config: FluteConfig, prefix: str = f"{LAYER}.mlp.up_proj"):
    with fake_rank(0, 1):
        return make_layer(
            "ColumnParallelLinear", config, prefix, input_size=64, output_size=8, bias=False
        )


def check_message(error: FluteError, *words: str) -> None:
    assert all((error.what, error.where, error.why, error.fix))
    for word in words:
        assert word in str(error), f"{word!r} not in: {error}"


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
