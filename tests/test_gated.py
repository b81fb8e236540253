"""``flute::gemm_gated`` on CPU, compiled and in plain torch, against an fp64 oracle."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from generators import Problem, make_problem, make_x, oracle

from flute_vllm import ops
from flute_vllm.errors import FluteError
from flute_vllm.ops import Activation

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROOT = Path(__file__).resolve().parent.parent
HAS_LIBRARY = ops.load()
# The op, and its stand-in without a library; without one they are the same.
WAYS = [torch.ops.flute.gemm_gated, ops._reference_gemm_gated]


def check(y: torch.Tensor, x: torch.Tensor, problem: Problem, activation: Activation) -> None:
    """Accepts gate and up in float32 as well as rounded to the dtype of x."""
    exact = oracle(x, problem)
    half = exact.shape[-1] // 2
    gate, up = exact[..., :half], exact[..., half:]
    wanted = ops.activate(gate, activation) * up
    assert y.shape == wanted.shape
    assert y.dtype == x.dtype
    if not y.numel():
        return
    # Each of gate, up and the result may be rounded; no activation is steeper than 1.2. Beside it
    # the order of float32 sums, and subnormal results.
    eps = torch.finfo(x.dtype).eps / 2
    sums = 1e-5 * gate.abs().max() * up.abs().max() + torch.finfo(x.dtype).tiny
    allowed = 1.1 * eps * (1.2 * (gate * up).abs() + 2 * wanted.abs()) + sums
    worst = ((y.double() - wanted).abs() / allowed).max()
    assert worst <= 1


@pytest.mark.parametrize("run", WAYS, ids=["op", "reference"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("activation", Activation)
def test_gated_product(run, activation, dtype):
    for rows, k, bits, group, scales in (
        (1, 32, 2, 32, BF16),
        (7, 96, 3, 32, FP16),
        (33, 128, 4, 64, BF16),
        (300, 64, 4, -1, FP16),
    ):
        problem = make_problem([rows, rows], k, bits, group, scales)
        for m in (0, 1, 7, 50):
            x = make_x(m, k, dtype=dtype) * 8
            check(run(x, *problem.weight, activation), x, problem, activation)


@pytest.mark.parametrize("activation", Activation)
def test_gates_of_every_size(activation):
    """Where exponentials overflow, a gate of a million included; on both sides of zero."""
    problem = make_problem([1, 1], 32, 4, 32)
    for scale in 10.0 ** torch.arange(-6, 7).double():
        x = make_x(64, 32, dtype=FP32) * scale
        for run in WAYS:
            y = run(x, *problem.weight, activation)
            assert y.isfinite().all()
            check(y, x, problem, activation)


@pytest.mark.parametrize("activation", Activation)
def test_gates_that_are_no_numbers(activation):
    problem = make_problem([3, 3], 32, 4, 32)
    x = torch.full((2, 32), float("nan"))
    assert torch.ops.flute.gemm_gated(x, *problem.weight, activation).isnan().all()


def test_shapes_and_strides():
    problem = make_problem([5, 5], 64, 4, 32)
    x = make_x(2, 3, 64)
    flat = ops.gemm_gated(x.view(6, 64), *problem.weight, Activation.SILU)
    assert torch.equal(ops.gemm_gated(x, *problem.weight, 1), flat.view(2, 3, 5))
    assert torch.equal(ops.gemm_gated(x[0, 0], *problem.weight, 1), flat[0])
    wide = make_x(6, 128)[:, ::2]
    again = ops.gemm_gated(wide.contiguous(), *problem.weight, 1)
    assert torch.equal(ops.gemm_gated(wide, *problem.weight, 1), again)
    assert ops.gemm_gated(make_x(4, 0, 64), *problem.weight, 1).shape == (4, 0, 5)
    nothing = make_problem([1, 1], 64, 4, 32)
    empty = (nothing.qweight[:0], nothing.scales[:0], nothing.table, [0, 0], 4, 32)
    assert ops.gemm_gated(make_x(3, 64), *empty, 1).shape == (3, 0)


def test_results_do_not_depend_on_threads():
    problem = make_problem([5000, 5000], 32, 4, 32)
    x, threads = make_x(9, 32), torch.get_num_threads()
    many = ops.gemm_gated(x, *problem.weight, Activation.GELU_TANH)
    try:
        torch.set_num_threads(1)
        assert torch.equal(ops.gemm_gated(x, *problem.weight, Activation.GELU_TANH), many)
    finally:
        torch.set_num_threads(threads)
    one_by_one = [ops.gemm_gated(row, *problem.weight, Activation.GELU_TANH) for row in x]
    assert torch.equal(torch.stack(one_by_one), many)


def test_opcheck():
    problem = make_problem([6, 6], 64, 4, 32)
    for m in (0, 1, 50):
        arguments = (make_x(m, 64), *problem.weight, 2)
        torch.library.opcheck(torch.ops.flute.gemm_gated.default, arguments)


@pytest.mark.parametrize("run", WAYS, ids=["op", "reference"])
def test_bad_arguments_are_named(run):
    def message(x, problem: Problem, activation: int) -> str:
        with pytest.raises((RuntimeError, FluteError)) as caught:
            run(x, *problem.weight, activation)
        return str(caught.value)

    equal, x = make_problem([8, 8], 64, 4, 32), make_x(3, 64)
    for activation in (-1, 0, 4):
        assert f"{activation} is not 1 (silu)" in message(x, equal, activation)
    for parts in ([8, 7], [16], [4, 4, 4], [0, 8]):
        assert "argument part_sizes" in message(x, make_problem(parts, 64, 4, 32), 1)
    assert "does not end in the 64 input features" in message(make_x(3, 32), equal, 1)


@pytest.mark.skipif(not HAS_LIBRARY, reason="needs the compiled library")
def test_constants_and_schema_are_those_of_the_library():
    header = (ROOT / "kernels/cpu/gated.h").read_text()
    found = dict(re.findall(r"k(\w+) = (\d)", header))
    wanted = {a.name.title().replace("_", ""): str(int(a)) for a in Activation}
    assert found == wanted
    schemas = {text.partition("(")[0]: text for text in ops._SCHEMAS}
    for name, text in schemas.items():
        assert str(getattr(torch.ops.flute, name).default._schema) == f"flute::{text}"
