"""``act(gemm(x))`` as one op, in a graph: how the activation behind a gemm is found and replaced.

vLLM calls the linear layer and then a SwiGLU or GeGLU module, so the two only meet in the graph.
There ``flute::gemm``, whose two halves go into an activation and nowhere else, becomes
``flute::gemm_gated``: one launch less, and the wide result is never written. With LoRA the
adapters' op changes the result of the gemm in between, so nothing matches.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import fx
from vllm.compilation.passes.inductor_pass import enable_fake_mode

from flute_vllm import ops
from flute_vllm.ops import Activation

# vLLM's own kernels, in graphs where they are not left to Inductor: op(result, input) -> ().
VLLM_KERNELS = {
    "silu_and_mul": Activation.SILU,
    "gelu_tanh_and_mul": Activation.GELU_TANH,
    "gelu_and_mul": Activation.GELU,
}


def fuse_gate(graph: fx.Graph, gemm: fx.Node) -> bool:
    """Replaces one gemm and its activation. False, and nothing changed, where they do not fit."""
    parts, value = _by_name(gemm.args, gemm.kwargs)["part_sizes"], gemm.meta.get("val")
    if len(parts) != 2 or parts[0] != parts[1] or value is None:
        return False
    found = _vllm_kernel(gemm) or _traced(gemm, parts[0])
    if found is None:
        return False
    activation, last, matched = found
    result = last.meta.get("val")
    if result is None or result.dtype != value.dtype:
        return False
    with graph.inserting_before(gemm):
        arguments = _gated_arguments(gemm.args, gemm.kwargs, activation)
        gated = graph.call_function(torch.ops.flute.gemm_gated.default, arguments)
    gated.meta = {**gemm.meta, "val": value.new_empty((*value.shape[:-1], parts[0]))}
    gated.meta.pop("tensor_meta", None)
    if "eager_input_vals" in gemm.meta:  # the strides that Inductor must give to the inputs
        eager = _gated_arguments(*gemm.meta["eager_input_vals"], activation)
        gated.meta["eager_input_vals"] = (eager, {})
    last.replace_all_uses_with(gated)
    for node in sorted(matched, reverse=True):
        graph.erase_node(node)
    return True


def _by_name(args: tuple, kwargs: dict) -> dict[str, Any]:
    """Arguments of ``flute::gemm`` as a graph has them, without those left at their defaults."""
    schema = torch.ops.flute.gemm.default._schema
    return {**dict(zip((a.name for a in schema.arguments), args, strict=False)), **kwargs}


def _gated_arguments(args: tuple, kwargs: dict, activation: Activation) -> tuple:
    schema = torch.ops.flute.gemm_gated.default._schema
    given = {**_by_name(args, kwargs), "activation": int(activation)}
    return tuple(given.get(a.name, a.default_value) for a in schema.arguments)


# What was found: the activation, the node of the result, and all nodes that it makes needless.
_Found = tuple[Activation, fx.Node, set[fx.Node]]


def _vllm_kernel(gemm: fx.Node) -> _Found | None:
    """The gemm's only user is an activation kernel of vLLM, made functional by torch."""
    call = next(iter(gemm.users), None)
    is_functional = torch.ops.higher_order.auto_functionalized
    if call is None or call.target is not is_functional or len(gemm.users) > 1:
        return None
    if not isinstance(call.args[0], torch._ops.OpOverload):
        return None
    schema = call.args[0]._schema
    namespace, _, name = schema.name.partition("::")
    if namespace != "_C" or name not in VLLM_KERNELS or len(schema.arguments) != 2:
        return None
    result, source = (call.kwargs.get(argument.name) for argument in schema.arguments)
    results = list(call.users)
    # The tuple has what the op returns, nothing, and then the changed tensor.
    is_read = [use.target is operator.getitem and use.args[1] == 1 for use in results]
    if source is not gemm or len(results) != 1 or not all(is_read):
        return None
    matched = {gemm, call, results[0]}
    if isinstance(result, fx.Node) and len(result.users) == 1 and not result.is_impure():
        matched.add(result)  # its memory
    return VLLM_KERNELS[name], results[0], matched


def _traced(gemm: fx.Node, rows: int) -> _Found | None:
    """The gemm's halves go into the formula of an activation, as Inductor's decompositions have it.

    Nodes are compared as expressions: shared subexpressions may be one node here and two there.
    """
    value = gemm.meta["val"]
    candidates = _computed_from(gemm)
    for activation in Activation:
        *inputs, wanted = _formula(activation, value.dtype, value.device.type)
        halves = {inputs[0]: _half(gemm, 0, rows), inputs[1]: _half(gemm, rows, rows)}
        for last in candidates:
            matched: set[fx.Node] = {gemm}
            if _equal(wanted, last, halves, matched) and _is_closed(matched, last):
                return activation, last, matched
    return None


@functools.cache
@enable_fake_mode
def _formula(activation: Activation, dtype: torch.dtype, device: str) -> tuple[fx.Node, ...]:
    """The nodes gate, up and result of ``act(gate) * up``, after Inductor's decompositions."""
    from torch._inductor.pattern_matcher import fwd_only

    gate, up = (torch.empty(4, 8, dtype=dtype, device=device) for _ in range(2))
    graph = fwd_only(lambda gate, up: ops.activate(gate, activation) * up, [gate, up]).graph
    (result,) = graph.output_node().all_input_nodes
    return (*graph.find_nodes(op="placeholder"), result)


def _computed_from(gemm: fx.Node) -> list[fx.Node]:
    """Nodes that are functions of the gemm's result alone; an activation is one of them."""
    found, waiting = {gemm}, [gemm]
    while waiting:
        for user in waiting.pop().users:
            is_new = user not in found and user.op == "call_function"
            if is_new and found.issuperset(user.all_input_nodes):
                found.add(user)
                waiting.append(user)
    return sorted(found - {gemm})


def _half(gemm: fx.Node, begin: int, rows: int):
    """Whether a node is ``gemm[..., begin : begin + rows]``, for one half of the columns."""
    last_dim = gemm.meta["val"].dim() - 1

    def check(node: fx.Node) -> bool:
        if (
            node.target is not torch.ops.aten.slice.Tensor
            or node.kwargs
            or node.args[0] is not gemm
        ):
            return False
        dim, start, end, step = (*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :])
        start, end = start or 0, 2 * rows if end is None else end
        if not all(isinstance(number, int) for number in (dim, start, end, step)):
            return False
        end = min(end, 2 * rows)  # a slice to the end says 2^63 - 1
        return dim in (last_dim, -1) and (start, end, step) == (begin, begin + rows, 1)

    return check


def _equal(wanted, found, halves: dict, matched: set[fx.Node]) -> bool:
    """Whether two arguments are the same expression; its nodes are added to ``matched``."""
    if isinstance(wanted, list | tuple):
        return (
            isinstance(found, list | tuple)
            and len(wanted) == len(found)
            and all(_equal(*pair, halves, matched) for pair in zip(wanted, found, strict=True))
        )
    if not isinstance(wanted, fx.Node):
        return type(wanted) is type(found) and wanted == found
    if not isinstance(found, fx.Node):
        return False
    matched.add(found)
    if wanted in halves:
        return halves[wanted](found)
    return (
        wanted.target is found.target
        and wanted.kwargs == found.kwargs
        and _equal(wanted.args, found.args, halves, matched)
    )


def _is_closed(matched: set[fx.Node], last: fx.Node) -> bool:
    """Whether nothing outside needs a matched node but the last."""
    return all(matched.issuperset(node.users) for node in matched if node is not last)
