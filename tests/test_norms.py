"""Our norms without a GPU: their formula, and where the pass puts them into a graph."""

from __future__ import annotations

import operator
from dataclasses import replace

import pytest
import torch
from torch import fx

from flute_vllm import ops, tuning

pytest.importorskip("vllm")
import vllm.ir.ops  # noqa: E402, F401 - defines the ops that are replaced

from flute_vllm.plugin.fused_norms import begins_early, replace_norms  # noqa: E402

N = 64


@pytest.fixture(autouse=True)
def _loaded():
    ops.load()


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_formula(dtype, offset):
    x, residual = (torch.randn(3, N, dtype=dtype) for _ in range(2))
    weight = torch.randn(N, dtype=dtype)
    exact = torch.nn.functional.rms_norm(x.double(), (N,), weight.double() + offset, 1e-5)
    y = torch.ops.flute.rms_norm(x, weight, 1e-5, offset)
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    both, total = torch.ops.flute.add_rms_norm(x, residual, weight, 1e-5, offset)
    assert torch.equal(total, (x.float() + residual.float()).to(dtype))
    wide = x.double() + residual.double()
    exact = torch.nn.functional.rms_norm(wide, (N,), weight.double() + offset, 1e-5)
    torch.testing.assert_close(both.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_fake_kernels_give_shapes():
    x = torch.empty(2, 3, N, device="meta", dtype=torch.bfloat16)
    weight = torch.empty(N, device="meta", dtype=torch.bfloat16)
    assert torch.ops.flute.rms_norm(x, weight, 1e-5).shape == x.shape
    assert [y.shape for y in torch.ops.flute.add_rms_norm(x, x, weight, 1e-5)] == 2 * [x.shape]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_opcheck(dtype):
    """Strides and aliases of the results, too: of x that lies row by row, or column by column."""
    weight = torch.randn(N, dtype=dtype)
    for x in (torch.randn(3, N, dtype=dtype), torch.randn(N, 3, dtype=dtype).t()):
        torch.library.opcheck(torch.ops.flute.rms_norm.default, (x, weight, 1e-5))
        arguments = (x, x.clone(), weight, 1e-5, 1.0)
        torch.library.opcheck(torch.ops.flute.add_rms_norm.default, arguments)


class Builder:
    """A graph as vLLM hands it to the pass: norms of its IR around one of our GEMMs."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, n: int = N) -> None:
        self.graph = fx.Graph()
        self.x, self.residual = (self.input(name, (4, n), dtype) for name in ("x", "residual"))
        self.weight = self.input("weight", (n,), dtype)
        self.qweight = self.input("qweight", (n, n // 8), torch.int32)

    def input(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = torch.empty(shape, dtype=dtype)
        return node

    def lay(self, node: fx.Node, *strides: int) -> None:
        value = node.meta["val"]
        node.meta["val"] = torch.empty_strided(value.shape, strides, dtype=value.dtype)

    def call(self, target, *arguments, like: fx.Node | None = None) -> fx.Node:
        node = self.graph.call_function(target, arguments)
        if like is not None:
            node.meta["val"] = like.meta["val"]
        return node

    def norm(self, *, weight: fx.Node | None = None, variance: int | None = None):
        node = self.call(
            torch.ops.vllm_ir.fused_add_rms_norm.default, self.x, self.residual,
            weight or self.weight, 1e-5, variance,
        )  # fmt: skip
        return [self.call(operator.getitem, node, i, like=self.x) for i in range(2)]

    def gemm(self, x: fx.Node) -> fx.Node:
        settings = ([N], 4, 64)
        return self.call(
            torch.ops.flute.gemm.default, x, self.qweight, self.weight, self.weight, *settings,
            like=self.x,
        )  # fmt: skip

    def targets(self, *outputs: fx.Node) -> list[str]:
        """After the pass, which must leave a graph that is whole."""
        self.graph.output(outputs)
        self.replaced = replace_norms(self.graph, lambda device: True)
        assert replace_norms(self.graph, lambda device: True) == 0  # nothing left to do
        self.graph.lint()
        return [str(node.target) for node in self.graph.nodes if node.op == "call_function"]


def test_norm_before_a_gemm_is_replaced():
    graph = Builder()
    normed, total = graph.norm()
    targets = graph.targets(graph.gemm(normed), total)
    assert graph.replaced == 1
    assert "flute.add_rms_norm.default" in targets
    assert not any("vllm_ir" in target for target in targets)


def test_norm_behind_a_gemm_is_replaced():
    graph = Builder()
    y = graph.call(
        torch.ops.vllm_ir.rms_norm.default, graph.gemm(graph.x), graph.weight, 1e-6, None,
        like=graph.x,
    )  # fmt: skip
    assert "flute.rms_norm.default" in graph.targets(y)
    assert graph.replaced == 1


def test_norm_far_from_our_gemms_stays():
    graph = Builder()
    targets = graph.targets(*graph.norm())
    assert graph.replaced == 0
    assert "vllm_ir.fused_add_rms_norm.default" in targets


def test_gemmas_weight_is_taken_without_its_offset():
    graph = Builder()
    wide = graph.call(torch.ops.prims.convert_element_type.default, graph.weight, torch.float32)
    normed, total = graph.norm(weight=graph.call(torch.ops.aten.add.Tensor, wide, 1.0))
    targets = graph.targets(graph.gemm(normed), total)
    assert graph.replaced == 1
    assert not any("convert_element_type" in target or "aten.add" in target for target in targets)
    (ours,) = graph.graph.find_nodes(
        op="call_function", target=torch.ops.flute.add_rms_norm.default
    )
    assert ours.args[2:] == (graph.weight, 1e-5, 1.0)


@pytest.mark.parametrize("alias", ["detach", "alias"])
def test_a_weight_may_be_seen_through_an_alias(alias):
    graph = Builder()
    target = getattr(torch.ops.aten, alias).default  # vLLM's norms take ``weight.data``
    seen = graph.call(target, graph.weight, like=graph.weight)
    normed, total = graph.norm(weight=seen)
    graph.targets(graph.gemm(normed), total)
    assert graph.replaced == 1


@pytest.mark.parametrize(
    ("capability", "has_kernels", "wanted"),
    [(90, True, True), (100, True, True), (89, True, False), (80, True, False), (90, False, False)],
)
def test_only_kernels_that_begin_early_replace_norms(capability, has_kernels, wanted, monkeypatch):
    """Of the code that runs: a newer GPU without code of its own runs PTX of 8.9."""
    device = replace(tuning.H200, capability=capability)
    monkeypatch.setattr(tuning, "device_of", lambda place: device)
    monkeypatch.setattr(ops, "has_cuda_kernels", lambda: has_kernels)
    assert begins_early(torch.device("cuda", 0)) is wanted
    assert not begins_early(torch.device("cpu"))


@pytest.mark.parametrize("results", [1, 2])
def test_other_users_get_ours_too(results):
    graph = Builder()
    if results == 1:
        normed = graph.call(
            torch.ops.vllm_ir.rms_norm.default, graph.x, graph.weight, 1e-6, like=graph.x
        )  # fmt: skip
        others = [normed]
    else:
        normed, total = graph.norm()
        others = [normed, total, graph.call(torch.ops.aten.neg.default, total)]
    targets = graph.targets(graph.gemm(normed), graph.gemm(normed), *others)
    assert graph.replaced == 1
    assert not any("vllm_ir" in target for target in targets)


def test_a_shared_weight_keeps_what_others_need():
    """Two of Gemma's norms with one weight, of which one touches no gemm."""
    graph = Builder()
    wide = graph.call(torch.ops.prims.convert_element_type.default, graph.weight, torch.float32)
    weight = graph.call(torch.ops.aten.add.Tensor, wide, 1.0)
    (near, _), far = graph.norm(weight=weight), graph.norm(weight=weight)
    targets = graph.targets(graph.gemm(near), *far)
    assert graph.replaced == 1
    assert {"aten.add.Tensor", "vllm_ir.fused_add_rms_norm.default"} <= set(targets)


@pytest.mark.parametrize("why", [
    "float32", "odd", "variance", "no weight", "computed weight", "computed stored weight",
    "one weight for all", "x askew", "residual askew", "named arguments", "tuple returned",
])  # fmt: skip
def test_what_our_norm_cannot_compute_stays(why):
    dtype = torch.float32 if why == "float32" else torch.bfloat16
    graph = Builder(dtype, n=20 if why == "odd" else N)
    weight = None
    if why == "one weight for all":
        weight = graph.input("one", (1,), dtype)
    elif why.startswith("computed"):  # ours would read it before it is written
        weight = graph.call(torch.ops.aten.neg.default, graph.weight, like=graph.weight)
        if why == "computed stored weight":
            wide = graph.call(torch.ops.prims.convert_element_type.default, weight, torch.float32)
            weight = graph.call(torch.ops.aten.add.Tensor, wide, 1.0)
    if why.endswith("askew"):  # ours would copy it first
        graph.lay(graph.x if why == "x askew" else graph.residual, 3 * N, 1)
    normed, total = graph.norm(weight=weight, variance=32 if why == "variance" else None)
    node = normed.args[0]
    if why == "no weight":
        node.update_arg(2, None)
    elif why == "named arguments":
        node.args, node.kwargs = node.args[:2], {"weight": graph.weight, "epsilon": 1e-5}
    graph.targets(graph.gemm(normed), total, *([node] if why == "tuple returned" else []))
    assert graph.replaced == 0
