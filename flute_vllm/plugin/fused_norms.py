"""RMS norms next to our GEMMs become our own, in the graphs that vLLM compiles.

Between two GEMMs the norm of a few rows is a matter of launches: ours lets the next GEMM load its
table and its first weights meanwhile, and begins itself before the one ahead has ended. On an H200
the linear layers of a LLaMA-3-8B block with the kernels between them then take 46.9 us at batch 1,
not 53.8 (results/h200/block.json). Until after our pass vLLM has norms as ops of its IR,
``vllm_ir::rms_norm`` and ``vllm_ir::fused_add_rms_norm``; where it compiles for a CPU it has none.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from flute_vllm import ops, tuning
from flute_vllm.norms import DTYPES, LARGEST, MULTIPLE

# Each with the number of its results.
IR_NORMS = {"rms_norm": 1, "fused_add_rms_norm": 2}


def begins_early(device: torch.device) -> bool:
    """Whether our kernels can begin before the one ahead has ended, which our norm is faster by.

    Not those of a library without CUDA, nor the PTX of 8.9 that newer GPUs run without code of
    their own.
    """
    return (
        device.type == "cuda"
        and ops.has_cuda_kernels()
        and tuning.device_of(device).capability >= 90
    )


def replace_norms(graph: fx.Graph, is_wanted: Callable[[torch.device], bool] = begins_early) -> int:
    """Puts our norm in the place of each that touches one of our GEMMs; returns how many."""
    replaced = 0
    for name, results in IR_NORMS.items():
        target = _ir_op(name)
        nodes = graph.find_nodes(op="call_function", target=target) if target else ()
        for node in nodes:
            replaced += _replace(graph, node, results, is_wanted)
    return replaced


def _ir_op(name: str):
    """vLLM's op, None where this vLLM has none of the name."""
    packet = getattr(torch.ops.vllm_ir, name, None)
    return None if packet is None else packet.default


def _replace(graph: fx.Graph, node: fx.Node, results: int, is_wanted: Callable) -> bool:
    if node.kwargs or len(node.args) < results + 2:
        return False
    *inputs, weight, epsilon = node.args[: results + 2]
    variance_size = node.args[results + 2] if len(node.args) > results + 2 else None
    if variance_size is not None or not isinstance(weight, fx.Node):
        return False
    value = _value(inputs[0])
    if (
        value is None
        or value.dtype not in DTYPES
        or not is_wanted(value.device)
        or any(_value(other) is None or _value(other).dtype != value.dtype for other in inputs)
        or not all(_is_dense(_value(other)) for other in inputs)
        or value.shape[-1] > LARGEST
        or value.shape[-1] % MULTIPLE
    ):
        return False
    plain, offset = _without_offset(weight)
    if not _is_stored(plain) or _value(plain) is None:
        return False
    if _value(plain).dtype != value.dtype or tuple(_value(plain).shape) != (value.shape[-1],):
        return False
    outputs = [node] if results == 1 else list(node.users)
    if results == 2 and not all(use.target is operator.getitem for use in outputs):
        return False
    normed = [use for use in outputs if results == 1 or use.args[1] == 0]
    if not (any(map(_feeds_ours, normed)) or any(map(_is_ours, inputs))):
        return False
    ours = torch.ops.flute.rms_norm if results == 1 else torch.ops.flute.add_rms_norm
    with graph.inserting_before(node):
        new = graph.call_function(ours.default, (*inputs, plain, epsilon, offset))
    new.meta = dict(node.meta)
    new.meta.pop("eager_input_vals", None)  # of the other op's arguments
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    if plain is not weight:
        _erase_unused(graph, weight)
    return True


def _value(node) -> torch.Tensor | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def _is_dense(value: torch.Tensor) -> bool:
    """Whether the values lie one behind another, for any number of rows. Others cost our norm a
    copy, a launch more than vLLM's norm takes."""
    step = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if not statically_known_true(stride == step):
            return False
        step = step * size
    return True


def _is_stored(node: fx.Node) -> bool:
    """Whether a weight comes from outside the graph. Our norm reads its weight before the kernels
    ahead of it have ended (kernels/cuda/norm.cu): one of them must not be what computes it."""
    aten = torch.ops.aten
    while node.target in (aten.detach.default, aten.alias.default):  # of ``weight.data``
        node = node.args[0]
    return node.op in ("placeholder", "get_attr")


def _is_ours(node: fx.Node) -> bool:
    flute = torch.ops.flute
    return node.target in (flute.gemm.default, flute.gemm_gated.default)


def _feeds_ours(node: fx.Node) -> bool:
    return any(_is_ours(user) and user.args[0] is node for user in node.users)


def _without_offset(weight: fx.Node) -> tuple[fx.Node, float]:
    """Gemma's ``weight.float() + 1`` as the stored weight and the offset, else as it is."""
    if weight.target is torch.ops.aten.add.Tensor and not weight.kwargs:
        wide, offset = weight.args
        if (
            isinstance(offset, int | float)
            and isinstance(wide, fx.Node)
            and wide.target is torch.ops.prims.convert_element_type.default
            and wide.args[1] == torch.float32
        ):
            return wide.args[0], float(offset)
    return weight, 0.0


def _erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    """The node and what only it needed, where nothing needs it any more."""
    while isinstance(node, fx.Node) and not node.users and node.op == "call_function":
        before = node.args[0]
        graph.erase_node(node)
        node = before
