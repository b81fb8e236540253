"""The pass that makes one op of a gemm and its activation, on graphs of Inductor."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from generators import Problem, make_problem, make_x

from flute_vllm import ops
from flute_vllm.ops import Activation

pytest.importorskip("vllm")
from vllm.compilation.passes.inductor_pass import pass_context  # noqa: E402
from vllm.compilation.passes.pass_manager import PostGradPassManager  # noqa: E402
from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.config.utils import Range  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402

from flute_vllm.plugin import fused_gates, fused_norms  # noqa: E402
from flute_vllm.plugin.fusion import FusionPass  # noqa: E402

ops.load()
current_platform.import_kernels()  # vLLM's pass manager names them
GEMM, GATED = torch.ops.flute.gemm.default, torch.ops.flute.gemm_gated.default
HOOK = "post_grad_custom_post_pass"


class Recorder(FusionPass):
    """The pass, and the graph that it made."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.Graph] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        super().__call__(graph)
        graph.lint()
        self.graphs.append(copy.deepcopy(graph))
        super().__call__(graph)
        assert str(graph) == str(self.graphs[-1])  # nothing is left for a second time

    def count(self, target) -> int:
        (graph,) = self.graphs
        return len(graph.find_nodes(op="call_function", target=target))


def run(function: Callable, *inputs: torch.Tensor, dynamic: bool = True, hook=lambda ours: ours):
    """Results of the graph after Inductor's passes and ours, without its code generation; the
    recorder of the pass. ``hook`` makes of it what Inductor calls."""
    from torch._dynamo.utils import detect_fake_mode
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
    from torch._inductor.virtualized import V

    recorder = Recorder()

    def after_passes(module, examples, **_options):
        view_to_reshape(module)
        with V.set_fake_mode(detect_fake_mode(examples)):
            post_grad_passes(module, is_inference=True)
        return make_boxed_func(module.forward)

    def backend(module, examples):
        return compile_fx(module, examples, inner_compile=after_passes)

    torch._dynamo.reset()
    patches = {HOOK: hook(recorder), "enable_auto_functionalized_v2": False}
    with torch.no_grad(), config.patch(patches):
        result = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*inputs)
    return result, recorder


def vllm_activation(activation: Activation) -> Callable[[torch.Tensor], torch.Tensor]:
    """vLLM's own function, as it leaves it to Inductor."""
    from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul

    with set_current_vllm_config(VllmConfig()):
        if activation == Activation.SILU:
            return SiluAndMul().forward_native
        return GeluAndMul("tanh" if activation == Activation.GELU_TANH else "none").forward_native


def layer(problem: Problem) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: torch.ops.flute.gemm(x, *problem.weight)


def halves(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    half = y.shape[-1] // 2
    return y[..., :half], y[..., half:]


@pytest.fixture
def problem() -> Problem:
    return make_problem([24, 24], 64, 4, 32)


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    eps = torch.finfo(wanted.dtype).eps
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=8 * eps, atol=8 * eps * wanted.abs().max())


# --- what is fused ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("activation", Activation)
def test_activations_of_vllm_become_part_of_the_gemm(problem, activation, dtype):
    act, gemm = vllm_activation(activation), layer(problem)
    x = make_x(5, 64, dtype=dtype)
    result, recorder = run(lambda x: act(gemm(x)), x)
    assert (recorder.count(GEMM), recorder.count(GATED)) == (0, 1)
    assert_close(result, act(gemm(x)))
    (graph,) = recorder.graphs
    (gated,) = graph.find_nodes(op="call_function", target=GATED)
    others = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    assert others == [gated]  # nothing that it does not need
    assert gated.args[4:] == ([24, 24], 4, 32, int(activation), [], None, 0)
    assert gated.meta["val"].shape[1:] == (24,)
    assert gated.meta["val"].dtype == dtype
    assert gated.meta["val"].stride() == (24, 1)


@pytest.mark.parametrize("activation", Activation)
def test_behind_the_passes_of_vllm(problem, activation):
    """As VllmBackend runs it, which vLLM has on GPUs only."""

    def manage(ours):
        manager = PostGradPassManager()
        manager.configure(config)
        manager.add(ours)
        return manager

    act, gemm, config = vllm_activation(activation), layer(problem), VllmConfig()
    x = make_x(5, 64)
    with set_current_vllm_config(config), pass_context(Range(1, 64)):
        result, recorder = run(lambda x: act(gemm(x)), x, hook=manage)
    assert (recorder.count(GEMM), recorder.count(GATED)) == (0, 1)
    assert_close(result, act(gemm(x)))


def test_any_rank_any_rows_and_what_a_launch_asks_ahead(problem):
    following = torch.zeros(4, dtype=torch.int32)
    act = vllm_activation(Activation.SILU)

    def function(x, following):
        return act(torch.ops.flute.gemm(x, *problem.weight, [0, 1, 2], following, 4096))

    x = make_x(2, 3, 64)
    result, recorder = run(function, x, following, dynamic=False)
    assert result.shape == (2, 3, 24)
    assert_close(result, act(layer(problem)(x)))
    (gated,) = recorder.graphs[0].find_nodes(op="call_function", target=GATED)
    plan, ahead, ahead_bytes = gated.args[8:]
    assert (plan, ahead.op, ahead_bytes) == ([0, 1, 2], "placeholder", 4096)


def test_every_layer_of_a_model_is_fused():
    wide, narrow = make_problem([64, 64], 32, 4, 32), make_problem([32], 64, 3, 32)
    silu, gelu = (vllm_activation(Activation(number)) for number in (1, 2))

    def block(x, act):
        return x + layer(narrow)(act(layer(wide)(x)))

    x = make_x(5, 32, dtype=torch.float32)
    result, recorder = run(lambda x: block(block(x, silu), gelu), x)
    assert (recorder.count(GEMM), recorder.count(GATED)) == (2, 2)
    assert_close(result, block(block(x, silu), gelu))


@pytest.mark.parametrize("name", fused_gates.VLLM_KERNELS)
def test_kernels_of_vllm_are_replaced(problem, name):
    """Where vLLM's custom ops are on, the graph has its kernel, which writes to a new tensor."""
    if not hasattr(torch.ops._C, name):
        pytest.skip(f"vLLM has no kernel {name} here")
    kernel = getattr(torch.ops._C, name)

    def function(x):
        y = torch.ops.flute.gemm(x, *problem.weight)
        out = torch.empty((*y.shape[:-1], y.shape[-1] // 2), dtype=y.dtype, device=y.device)
        kernel(out, y)
        return out * 2

    x = make_x(5, 64)
    result, recorder = run(function, x)
    assert (recorder.count(GEMM), recorder.count(GATED)) == (0, 1)
    assert recorder.count(torch.ops.higher_order.auto_functionalized) == 0
    act = vllm_activation(fused_gates.VLLM_KERNELS[name])
    assert_close(result, act(layer(problem)(x)) * 2)


def test_inductor_compiles_the_fused_graph(problem):
    """The whole way, and again from Inductor's cache, whose key the pass is part of."""
    act, gemm = vllm_activation(Activation.SILU), layer(problem)
    options = {HOOK: FusionPass(), "enable_auto_functionalized_v2": False}
    x = make_x(5, 64)
    for rows in (5, 1, 50):
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: act(gemm(x)) + 1, dynamic=True, options=options)
        x = make_x(rows, 64)
        assert_close(compiled(x), act(gemm(x)) + 1)


@pytest.mark.parametrize("kind", ["RMSNorm", "GemmaRMSNorm"])
def test_norms_of_vllm_become_ours(problem, kind, monkeypatch):
    """As vLLM's modules call them and Inductor's passes leave them, for any number of rows."""
    from vllm import ir
    from vllm.model_executor.layers import layernorm

    replace = functools.partial(fused_norms.replace_norms, is_wanted=lambda device: True)
    monkeypatch.setattr(fused_norms, "replace_norms", replace)  # on a CPU, too
    with set_current_vllm_config(VllmConfig()):
        first, second = (getattr(layernorm, kind)(64, eps).bfloat16() for eps in (1e-5, 1e-6))
    for norm in (first, second):
        torch.nn.init.normal_(norm.weight)
    gemm = layer(problem)

    def function(x):
        h = gemm(first.forward_native(x))
        return gemm(second.forward_native(x + h[..., :1])), h

    x = make_x(5, 64)
    with ir.enable_torch_wrap(True):
        result, recorder = run(function, x)
    assert recorder.count(torch.ops.flute.rms_norm.default) == 2
    assert not any("vllm_ir" in str(node.target) for node in recorder.graphs[0].nodes)
    for found, wanted in zip(result, function(x), strict=True):
        assert_close(found, wanted.detach())


# --- what is left alone -------------------------------------------------------------------------


@torch.library.custom_op("flute_test::add_adapter", mutates_args=("y",), device_types="cpu")
def add_adapter(y: torch.Tensor, x: torch.Tensor) -> None:
    """What vLLM's LoRA ops do to the result of a layer."""
    y.add_(x.sum(-1, keepdim=True))


@add_adapter.register_fake
def _(y, x):
    return None


silu = torch.nn.functional.silu
# Of the gemm's halves.
NO_ACTIVATIONS = {
    "swapped halves": lambda gate, up: silu(up) * gate,
    "only the gate": lambda gate, up: silu(gate) * gate,
    "the gate is used": lambda gate, up: (silu(gate) * up, silu(gate)),
    "clamped": lambda gate, up: silu(gate.clamp(max=0.1)) * up.clamp(-0.1, 0.1),
    "another silu": lambda gate, up: gate * torch.sigmoid(1.702 * gate) * up,
    "another one": lambda gate, up: torch.relu(gate) * up,
}


def with_third_user(gemm, x):
    y = gemm(x)
    gate, up = halves(y)
    return silu(gate) * up, y.sum()


def with_bias(gemm, x):
    gate, up = halves(gemm(x).add_(torch.ones(48, dtype=x.dtype)))
    return silu(gate) * up


def with_other_cuts(gemm, x):
    y = gemm(x)
    return silu(y[..., :20]) * y[..., 20:40]


def with_cuts_of_rows(gemm, x):
    y = gemm(x)
    return silu(y[:24]) * y[24:]


def with_adapter(gemm, x):
    y = gemm(x)
    add_adapter(y, x)
    gate, up = halves(y)
    return silu(gate) * up


def with_another_gate(gemm, x):
    gate, up = halves(gemm(x))[0], halves(gemm(x + 1))[1]
    return silu(gate) * up


OTHERS = {
    **{name: lambda gemm, x, f=f: f(*halves(gemm(x))) for name, f in NO_ACTIVATIONS.items()},
    "a third user": with_third_user,
    "bias": with_bias,
    "other cuts": with_other_cuts,
    "cuts of rows": with_cuts_of_rows,
    "LoRA": with_adapter,
    "another gate": with_another_gate,
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_graphs_stay_as_they_are(problem, name):
    gemm, function, x = layer(problem), OTHERS[name], make_x(48, 64, dtype=torch.float32)
    result, recorder = run(lambda x: function(gemm, x), x)
    assert recorder.count(GATED) == 0
    assert recorder.count(GEMM) >= 1
    torch.testing.assert_close(result, function(gemm, x))


@pytest.mark.parametrize("parts", [[20, 28], [48], [16, 16, 16], [24, 24, 0]])
def test_other_parts_stay_as_they_are(parts):
    gemm, x = layer(make_problem(parts, 64, 4, 32)), make_x(5, 64)
    act = vllm_activation(Activation.SILU)
    result, recorder = run(lambda x: act(gemm(x)), x)
    assert (recorder.count(GEMM), recorder.count(GATED)) == (1, 0)
    assert_close(result, act(gemm(x)))
