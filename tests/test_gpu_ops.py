"""The torch ops on a GPU: canonical and internal layout, against the format's own definition."""

from __future__ import annotations

import pytest
import torch
from generators import make_problem, make_x

from flute_vllm import format as fmt
from flute_vllm import ops, tuning

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(problem):
    tensors = (problem.qweight.cuda(), problem.scales.cuda(), problem.table.cuda())
    return (*tensors, problem.part_sizes, problem.bits, problem.group_size)


def internal(problem):
    """Arguments after x of ``flute::gemm`` in the internal layout."""
    qweight, scales, table, *settings = on_gpu(problem)
    records = ops.repack(qweight, scales, table, *settings)
    plan = tuning.plan(
        sum(problem.part_sizes), problem.in_features, problem.bits, problem.group_size,
        tuple(problem.part_sizes), tuning.device_of(records.device),
    )  # fmt: skip
    return (records, scales.new_empty(0), table, *settings, plan)


def relative_error(y: torch.Tensor, exact: torch.Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("pair", [False, True], ids=["scalar", "pair"])
@pytest.mark.parametrize("group", [32, 64, 128, 256, -1])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_dequantize_is_exact_in_both_layouts(dtype, bits, group, pair):
    problem = make_problem((37, 63), 768, bits, group, dtype, pair)
    expected = problem.dense()
    assert torch.equal(ops.dequantize(*on_gpu(problem)).cpu(), expected)
    records, scales, table, *settings, _ = internal(problem)
    dense = torch.ops.flute.dequantize(
        records, scales, table, *settings, in_features=problem.in_features
    )
    assert torch.equal(dense.cpu(), expected)


@pytest.mark.parametrize("m", [0, 1, 3, 8, 9, 16, 17, 32, 33, 130])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_gemm_is_as_accurate_as_dense(dtype, bits, m):
    problem = make_problem((48, 17, 100), 1184, bits, 32, dtype)
    arguments = internal(problem)
    x = make_x(2, m, 1184, dtype=dtype).cuda()[1]
    y = torch.ops.flute.gemm(x, *arguments)
    assert y.shape == (m, 165)
    exact = x.double() @ problem.dense(torch.float32).double().cuda().T
    if m:
        bound = relative_error(x @ problem.dense().cuda().T, exact)
        assert relative_error(y, exact) <= 1.5 * bound


def test_fp32_activations_use_the_canonical_layout():
    problem = make_problem((64,), 256, 4, 64, torch.float16)
    x = make_x(5, 256, dtype=torch.float32).cuda()
    y = torch.ops.flute.gemm(x, *on_gpu(problem))
    exact = x.double() @ problem.dense().double().cuda().T
    assert relative_error(y, exact) < 1e-6


def test_captured_graph_repeats_the_bits_on_two_streams():
    arguments = internal(make_problem((256,), 4096, 4, 128))
    x = make_x(4, 4096).cuda()
    expected = torch.ops.flute.gemm(x, *arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.ops.flute.gemm(x, *arguments)
    for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
        y.fill_(float("nan"))
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, expected)


def test_misaligned_activations_are_copied():
    problem = make_problem((32,), 128, 4, 32)
    flat = make_x(128 * 2 + 1).cuda()
    x = flat[1:257].view(2, 128)
    arguments = internal(problem)
    assert torch.equal(
        torch.ops.flute.gemm(x, *arguments), torch.ops.flute.gemm(x.clone(), *arguments)
    )


def test_a_tensor_of_another_layer_is_refused():
    records, *rest = internal(make_problem((64,), 256, 4, 64))
    with pytest.raises(RuntimeError, match="internal layout of 64 x 512"):
        torch.ops.flute.gemm(make_x(1, 512).cuda(), records, *rest)


def test_importer_decodes_on_the_gpu():
    codes = torch.randint(0, 16, (64, 96), dtype=torch.uint8)
    packed = fmt.pack(codes, 4)
    assert torch.equal(fmt.unpack(packed.cuda(), 4).cpu(), codes)
