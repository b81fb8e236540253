"""Which layer runs after which, and what a call asks for ahead; no engine and no GPU."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch

from flute_vllm import tuning
from flute_vllm.errors import FluteError
from flute_vllm.format import LayerSpec

pytest.importorskip("vllm")
from fake_vllm import finish, load  # noqa: E402
from native_layers import (  # noqa: E402
    LAYER,
    check_message,
    column_layer,
    native_config,
    random_matrix,
    rank_weight,
)

from flute_vllm.plugin.order import LayerOrder, next_weight  # noqa: E402


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


def test_a_model_of_many_layers_compiles():
    """320 layers of a 70B model: a link from each to the next was too deep for torch.compile."""
    config = native_config()
    layers = [column_layer(config, f"{LAYER}.mlp.up_proj{i}") for i in range(320)]
    matrix = random_matrix(8, 64, LayerSpec(4, 32), seed=0)
    plan = tuning.plan(8, 64, 4, 32, (8,), tuning.H200)
    for layer in layers:
        load(layer, matrix)
        finish(layer)
        layer.flute_plan = list(plan)  # a list of its own, as in a model
        config.order.append(layer)
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
