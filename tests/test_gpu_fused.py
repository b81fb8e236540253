"""Ops that stand for two kernels of a decoder, on a GPU: gated products, and norms with a sum."""

from __future__ import annotations

import pytest
import torch
from generators import make_problem, make_x
from test_gpu_ops import internal, on_gpu, relative_error

from flute_vllm import norms, ops, tuning
from flute_vllm.errors import FluteError
from flute_vllm.ops import Activation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


def gated(y: torch.Tensor, activation: Activation) -> torch.Tensor:
    gate, up = y.chunk(2, dim=-1)
    return ops.activate(gate, activation) * up


def exact_and_bound(problem, x: torch.Tensor, activation: Activation) -> tuple[torch.Tensor, float]:
    """The gated product in float64, and the error of torch with 16 bits between its steps."""
    weight = problem.dense(torch.float32).cuda().double()
    exact = gated(x.double() @ weight.t(), activation)
    dense = gated(x @ problem.dense().cuda().to(x.dtype).t(), activation)
    return exact, max(relative_error(dense, exact), relative_error(exact.to(x.dtype), exact))


@pytest.mark.parametrize("m", [0, 1, 8, 13, 32, 64, 128, 300])
@pytest.mark.parametrize("activation", list(Activation), ids=lambda a: a.name.lower())
@DTYPES
def test_gated_gemm_is_as_accurate_as_dense(dtype, activation, m):
    problem = make_problem((408, 408), 1184, 4, 32, dtype)
    x = make_x(m, 1184, dtype=dtype).cuda() / 1184**0.5
    *arguments, plan = internal(problem)
    y = torch.ops.flute.gemm_gated(x, *arguments, int(activation), plan)
    assert y.shape == (m, 408)
    if m:
        exact, bound = exact_and_bound(problem, x, activation)
        assert relative_error(y, exact) <= 1.5 * bound


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("pair", [False, True], ids=["scalar", "pair"])
def test_both_ways_of_a_gated_gemm(bits, pair):
    """A launch that ends with the activation, and one that leaves it to the next."""
    problem = make_problem((1024, 1024), 1152, bits, 128, torch.bfloat16, pair)
    x = make_x(24, 1152, dtype=torch.bfloat16).cuda() / 1152**0.5
    *arguments, plan = internal(problem)
    gates = [plan[at + 1] >= tuning.GATES for at in range(0, len(plan), tuning.ENTRY_NUMBERS)]
    if tuning.device_of(x.device).capability == 90:
        assert any(gates)
    two_steps = list(plan)
    two_steps[1 :: tuning.ENTRY_NUMBERS] = [
        kernel % tuning.GATES for kernel in plan[1 :: tuning.ENTRY_NUMBERS]
    ]
    dense = [
        0,
        tuning.DENSE + tuning.GATES,
        *[0] * 8,
    ]  # no plan says so; torch's product never gates
    exact, bound = exact_and_bound(problem, x, Activation.SILU)
    for numbers in (plan, two_steps, dense):
        y = torch.ops.flute.gemm_gated(x, *arguments, int(Activation.SILU), numbers)
        assert relative_error(y, exact) <= 1.5 * bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gated_gemm_of_canonical_tensors(dtype):
    problem = make_problem((40, 40), 256, 3, 64, torch.bfloat16)
    x = make_x(5, 256, dtype=dtype).cuda() / 16
    y = ops.gemm_gated(x, *on_gpu(problem), Activation.GELU_TANH)
    exact = gated(x.double() @ problem.dense(torch.float32).cuda().double().t(),
                  Activation.GELU_TANH)  # fmt: skip
    assert relative_error(y, exact) < 0.02


def test_equal_bits_from_a_graph():
    problem = make_problem((1024, 1024), 2048, 4, 128, torch.bfloat16)
    *arguments, plan = internal(problem)
    x = make_x(8, 2048, dtype=torch.bfloat16).cuda() / 45
    first = torch.ops.flute.gemm_gated(x, *arguments, 1, plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(5):
            y = torch.ops.flute.gemm_gated(x, *arguments, 1, plan)
    for _ in range(100):
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, first)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("m", [0, 1, 7, 300])
@pytest.mark.parametrize("n", [8, 264, 4096, 8200, 32768])
@DTYPES
def test_norms(dtype, n, m, offset):
    x, residual = (torch.randn(m, n, device="cuda").to(dtype) for _ in range(2))
    weight = torch.randn(n, device="cuda").to(dtype)
    y = torch.ops.flute.rms_norm(x, weight, 1e-5, offset)
    wanted = norms.rms_norm(x.double().float(), weight, 1e-5, offset)
    both, total = torch.ops.flute.add_rms_norm(x, residual, weight, 1e-5, offset)
    wide = x.double() + residual.double()
    wanted_both = norms.rms_norm(wide.float(), weight, 1e-5, offset)
    assert y.shape == both.shape == total.shape == (m, n)
    if m:
        step = torch.finfo(dtype).eps
        assert torch.equal(total, (x.float() + residual.float()).to(dtype))
        torch.testing.assert_close(y.float(), wanted, rtol=step, atol=1e-6)
        torch.testing.assert_close(both.float(), wanted_both, rtol=step, atol=1e-6)


def test_norm_of_what_lies_askew():
    x = torch.randn(6, 4097, device="cuda").bfloat16()[:, 1:]  # rows 2 bytes off, not contiguous
    weight = torch.randn(4097, device="cuda").bfloat16()[1:]
    torch.testing.assert_close(
        torch.ops.flute.rms_norm(x, weight, 1e-5), norms.rms_norm(x, weight, 1e-5)
    )


def test_norms_refuse_what_they_cannot_compute():
    x, weight = torch.randn(2, 12, device="cuda").half(), torch.randn(12, device="cuda").half()
    for case in (
        (x, weight),
        (x[:, :8], weight),
        (x[:, :8], weight[:8].bfloat16()),
        (x[:, :8].float(), weight[:8].float()),
    ):
        with pytest.raises((RuntimeError, FluteError), match="rms_norm"):
            torch.ops.flute.rms_norm(*case, 1e-5)


def test_norm_and_gemm_in_a_row_keep_their_order():
    """Each launch may begin before the one ahead has ended: results are those of one by one."""
    problem = make_problem((4096,), 4096, 4, 128, torch.bfloat16)
    *arguments, _ = internal(problem)
    plan = tuning.plan(4096, 4096, 4, 128, (4096,), tuning.device_of(torch.device("cuda", 0)),
                       overlap=1)  # fmt: skip
    weight = torch.ones(4096, device="cuda").bfloat16()
    x = make_x(4, 4096, dtype=torch.bfloat16).cuda()

    def chain(wait: bool) -> torch.Tensor:
        hidden, residual = x, x
        for _ in range(12):
            hidden, residual = torch.ops.flute.add_rms_norm(hidden, residual, weight, 1e-5)
            if wait:
                torch.cuda.synchronize()
            hidden = torch.ops.flute.gemm(hidden, *arguments, plan)
            if wait:
                torch.cuda.synchronize()
        return hidden

    wanted = chain(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain(False)
    for _ in range(50):
        graph.replay()
        assert torch.equal(found, wanted)
