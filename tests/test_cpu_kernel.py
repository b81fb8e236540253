"""The compiled ops on CPU against an fp64 oracle built on flute_vllm.format."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from generators import errors, make_problem, make_x

from flute_vllm import format as fmt
from flute_vllm import ops
from flute_vllm.errors import FluteError

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROOT = Path(__file__).resolve().parent.parent
HAS_LIBRARY = ops.load()
pytestmark = pytest.mark.skipif(not HAS_LIBRARY, reason="needs the compiled library")
ISAS = ops.cpu_isas()
# Long enough for groups of 256, odd multiples of 32, and blocks that a row does not fill.
LENGTHS = {32: (32, 96, 160), 64: (64, 192), 128: (128, 384), 256: (256, 4096 + 256)}
LENGTHS[-1] = (32, 96, 160, 4096 + 32)


@pytest.fixture(params=ISAS)
def isa(request):
    ops.cpu_isa(request.param)
    yield request.param
    ops.cpu_isa("auto")


@pytest.fixture
def problem():
    return make_problem([5, 12], 256, 4, 64)


def gemm(x, problem):
    return torch.ops.flute.gemm(x, *problem.weight)


def check(x, problem):
    y = gemm(x, problem)
    assert y.shape == (*x.shape[:-1], problem.qweight.shape[0])
    assert y.dtype == x.dtype
    ours, dense = errors(y, x, problem)
    # fp32 sums of up to 4352 products in any order; vdpbf16ps rounds each of its two additions.
    assert ours <= 1.5 * dense + 1e-6
    return y


@pytest.mark.parametrize("scale_dtype", [BF16, FP16])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
@pytest.mark.parametrize("bits", fmt.BITS)
def test_gemm(isa, bits, group_size, scale_dtype):
    rows = {32: [1], 64: [3], 128: [9, 8], 256: [65], -1: [17, 1, 7]}[group_size]
    for k in LENGTHS[group_size]:
        problem = make_problem(rows, k, bits, group_size, scale_dtype)
        for m in (1, 2, 3, 8, 17, 128) if k < 256 else (1, 3):
            for dtype in (BF16, FP16, FP32) if m in (1, 3, 128) else (BF16,):
                check(make_x(m, k, dtype=dtype), problem)


@pytest.mark.parametrize("out_dtype", [None, BF16, FP16, FP32])
@pytest.mark.parametrize("scale_dtype", [BF16, FP16])
@pytest.mark.parametrize("bits", fmt.BITS)
def test_dequantize_is_bit_exact(isa, bits, scale_dtype, out_dtype):
    for group_size, lengths in LENGTHS.items():
        for pair in (False, True):
            problem = make_problem([2, 15], lengths[1], bits, group_size, scale_dtype, pair)
            weight = torch.ops.flute.dequantize(*problem.weight, out_dtype)
            expected = problem.dense(out_dtype)
            assert weight.dtype == expected.dtype
            view = torch.int32 if weight.dtype == FP32 else torch.int16
            assert torch.equal(weight.view(view), expected.view(view))  # zeros keep their sign


@pytest.mark.parametrize("scale_dtype", [BF16, FP16])
def test_dequantize_keeps_subnormals_and_infinities(isa, scale_dtype):
    problem = make_problem([4], 64, 4, 32, scale_dtype)
    problem.scales[:2] = torch.finfo(scale_dtype).tiny / 4
    problem.scales[2:] = torch.finfo(scale_dtype).max
    for dtype in (None, FP16, BF16, FP32):
        weight = torch.ops.flute.dequantize(*problem.weight, dtype)
        torch.testing.assert_close(weight, problem.dense(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bits", fmt.BITS)
def test_pair_tables(isa, bits):
    for group_size, dtype in ((32, BF16), (128, FP16), (-1, BF16)):
        problem = make_problem([7, 2], 384, bits, group_size, dtype, pair=True)
        for m in (1, 5, 64):
            check(make_x(m, 384, dtype=dtype), problem)


@pytest.mark.parametrize("bits", fmt.BITS)
def test_every_code_at_every_position(isa, bits):
    """One code everywhere, then one row of a unit matrix: the exact table value must come out."""
    k = 192
    for code in range(2**bits):
        problem = make_problem([3], k, bits, 64)
        codes = torch.full((3, k), code, dtype=torch.uint8)
        problem.qweight.copy_(fmt.pack(codes, bits))
        assert torch.equal(gemm(torch.eye(k, dtype=FP32), problem), problem.dense().float().T)
        picked = gemm(torch.eye(k, dtype=BF16)[-2:], problem)
        assert torch.equal(picked, problem.dense().T[-2:])


def test_shapes_and_strides(isa, problem):
    x = make_x(2, 3, 256)
    flat = check(x.view(6, 256), problem)
    assert torch.equal(check(x, problem), flat.view(2, 3, 17))
    assert torch.equal(check(x[0, 0], problem), flat[0])
    wide = make_x(6, 512)[:, ::2]
    assert torch.equal(check(wide, problem), gemm(wide.contiguous(), problem))
    turned = make_x(256, 6).T
    assert torch.equal(check(turned, problem), gemm(turned.contiguous(), problem))
    for shape in ((0, 256), (4, 0, 256)):
        assert gemm(make_x(*shape), problem).shape == (*shape[:-1], 17)


def test_no_rows_and_empty_parts(isa):
    problem = make_problem([0, 5, 0], 64, 3, 32)
    check(make_x(3, 64), problem)
    nothing = (problem.qweight[:0], problem.scales[:0], problem.table[:1], [0], 3, 32)
    assert torch.ops.flute.gemm(make_x(3, 64), *nothing).shape == (3, 0)
    assert torch.ops.flute.dequantize(*nothing).shape == (0, 64)


def test_result_is_written_everywhere(isa, problem):
    """Freed NaNs come back from the allocator as the memory of the result and of scratch."""
    for m in (1, 3, 64):
        x = make_x(m, 256)
        for numel in (m * 17, m * 256, 17 * 256):
            for dtype in (BF16, FP32):
                del_me = torch.full((numel,), float("nan"), dtype=dtype)
                del del_me
        assert gemm(x, problem).isfinite().all()


def test_rows_of_x_do_not_mix(isa, problem):
    x = make_x(9, 256)
    alone = gemm(x, problem)
    x[4] = float("nan")
    y = gemm(x, problem)
    assert y[4].isnan().all()
    keep = torch.arange(9) != 4
    assert torch.equal(y[keep], alone[keep])


@pytest.mark.parametrize("m", [1, 8, 64])
def test_deterministic_for_any_thread_count(isa, m):
    problem = make_problem([300, 211], 1024, 3, 128)
    x = make_x(m, 1024)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append((gemm(x, problem), torch.ops.flute.dequantize(*problem.weight)))
    finally:
        torch.set_num_threads(before)
    if m < 12:  # above, torch's own GEMM decides; it is only repeatable
        assert all(torch.equal(y, results[0][0]) for y, _ in results)
    assert torch.equal(results[1][0], results[3][0])
    assert all(torch.equal(w, results[0][1]) for _, w in results)


class GuardedBytes:
    """Memory that ends where the process may not read."""

    def __init__(self, size: int) -> None:
        page = mmap.PAGESIZE
        self.pages = (size + page - 1) // page
        self.map = mmap.mmap(-1, (self.pages + 1) * page)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(self.base + self.pages * page), page, 0):
            pytest.skip(f"mprotect: {os.strerror(ctypes.get_errno())}")
        self.size = size

    def copy_of(self, tensor: torch.Tensor) -> torch.Tensor:
        offset = self.pages * mmap.PAGESIZE - self.size
        raw = (ctypes.c_char * self.size).from_address(self.base + offset)
        copy = torch.frombuffer(raw, dtype=tensor.dtype).view(tensor.shape)
        return copy.copy_(tensor)


def guarded(tensor: torch.Tensor, keep: list) -> torch.Tensor:
    keep.append(GuardedBytes(tensor.numel() * tensor.element_size()))
    return keep[-1].copy_of(tensor)


@pytest.mark.parametrize("bits", fmt.BITS)
def test_reads_nothing_beyond_the_tensors(isa, bits):
    for group_size, k in ((32, 32), (32, 96), (64, 64), (128, 128), (-1, 160)):
        for dtype in (BF16, FP16):
            problem = make_problem([3], k, bits, group_size, dtype)
            keep: list = []  # a read beyond ends the process with SIGSEGV
            weight = [guarded(t, keep) for t in (problem.qweight, problem.scales, problem.table)]
            for m in (1, 3, 64):
                x = make_x(m, k, dtype=dtype)
                rest = (problem.part_sizes, bits, group_size)
                y = torch.ops.flute.gemm(guarded(x, keep), *weight, *rest)
                assert torch.equal(y, gemm(x, problem))
            torch.ops.flute.dequantize(*weight, *rest)


def test_opcheck(problem):
    for m in (0, 1, 3):
        torch.library.opcheck(torch.ops.flute.gemm.default, (make_x(m, 256), *problem.weight))
    torch.library.opcheck(torch.ops.flute.dequantize.default, problem.weight)
    torch.library.opcheck(torch.ops.flute.dequantize.default, (*problem.weight, FP32))


def test_compile_with_any_batch(problem):
    class Layer(torch.nn.Module):
        def forward(self, x):
            return torch.relu(ops.gemm(x * 2, *problem.weight)) + 1

    compiled = torch.compile(Layer(), fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (2, 3, 5):
        x = make_x(m, 256)
        torch.testing.assert_close(compiled(x), Layer()(x))


def message_of(*args) -> str:
    with pytest.raises(RuntimeError) as caught:
        torch.ops.flute.gemm(*args)
    message = str(caught.value)
    assert all(part in message for part in ("flute: cannot run", "where:", "why:", "fix:"))
    return message


def test_messages_name_argument_and_numbers(problem):
    x = make_x(2, 256)
    q, s, t, parts, bits, group = problem.weight
    cases = [
        ((x[:, :128], q, s, t, parts, bits, group), "argument x", "[2, 128]", "256"),
        ((x.double(), q, s, t, parts, bits, group), "argument x", "Double"),
        ((x, q, s, t, parts, 5, group), "argument bits", "5"),
        ((x, q, s, t, parts, bits, 48), "argument group_size", "48"),
        ((x, q, s, t, parts, bits, 128), "argument scales", "[17, 4]", "[17, 2]"),
        ((x, q, s, t, [5, 11], bits, group), "argument part_sizes", "16", "17"),
        ((x, q, s, t, [-1, 18], bits, group), "argument part_sizes", "-1"),
        ((x, q, s, t[:1], parts, bits, group), "argument table", "[1, 16]"),
        ((x, q, s, t.half(), parts, bits, group), "argument table", "Half", "BFloat16"),
        ((x, q, s.float(), t, parts, bits, group), "argument scales", "Float"),
        ((x, q.long(), s, t, parts, bits, group), "argument qweight", "Long"),
        ((x, q[:, :31], s, t, parts, bits, group), "argument qweight", "31"),
        ((x, q.T.contiguous().T, s, t, parts, bits, group), "argument qweight", "contiguous"),
        ((x, q[:, :0], s, t, parts, bits, group), "argument qweight", "0 words"),
        ((torch.tensor(1.0), q, s, t, parts, bits, group), "argument x", "[]"),
    ]
    for args, *expected in cases:
        message = message_of(*args)
        assert all(part in message for part in expected), (expected, message)


def test_isa_names():
    assert ops.cpu_isa() == ops.cpu_isas()[-1]
    assert ops.cpu_isa("portable") == "portable" == ops.cpu_isa()
    assert ops.cpu_isa("auto") == ops.cpu_isas()[-1]
    with pytest.raises(FluteError, match="neon"):
        ops.cpu_isa("neon")
    with pytest.raises(RuntimeError, match="not in 0..3"):
        torch.ops.flute.cpu_isa(7)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


WITH_LIBRARY = """
import pathlib
from flute_vllm import ops
ops.LIBRARY = pathlib.Path({!r})
"""
ONE_CALL = """
from generators import make_problem, make_x
from flute_vllm import ops
p = make_problem([5, 12], 256, 3, 64)
print(ops.cpu_isa(), ops.gemm(make_x(2, 256), *p.weight).double().sum().item())
"""


def test_isa_from_the_environment():
    assert run_python(ONE_CALL, FLUTE_CPU_ISA="portable").stdout.startswith("portable ")
    unknown = run_python(ONE_CALL, FLUTE_CPU_ISA="sse9")
    assert unknown.returncode != 0
    assert "FLUTE_CPU_ISA=sse9" in unknown.stderr
    assert "portable" in unknown.stderr


def test_without_library(tmp_path):
    again = "ops.gemm(make_x(2, 256), *p.weight)"
    done = run_python(WITH_LIBRARY.format(str(tmp_path / "no.so")) + ONE_CALL + again)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("reference ")
    assert done.stderr.count("flute:") == 1  # one warning, with cost and fix
    assert "slower" in done.stderr
    assert "fix:" in done.stderr
    ours = float(run_python(ONE_CALL).stdout.split()[1])
    assert float(done.stdout.split()[1]) == pytest.approx(ours, rel=1e-2)


def test_unloadable_library_is_an_error(tmp_path):
    broken = tmp_path / "_C.abi3.so"
    broken.write_bytes(b"not a library")
    code = WITH_LIBRARY.format(str(broken)) + "ops.load()"
    done = run_python(code)
    assert done.returncode != 0
    assert "FluteError" in done.stderr
    assert str(broken) in done.stderr


def test_constants_mirror_format():
    header = (ROOT / "kernels/include/flute/format.h").read_text()

    def constant(name: str) -> list[int]:
        text = re.search(rf"{name}(?:\[\])? = ([^;]*);", header).group(1)
        return [int(number) for number in re.findall(r"-?\d+", text)]

    assert constant("kUnit") == [fmt.UNIT]
    assert constant("kGroupSizes") == list(fmt.GROUP_SIZES)
    assert constant("kPerRow") == [fmt.PER_ROW]
    assert constant("kMinBits") + constant("kMaxBits") == [min(fmt.BITS), max(fmt.BITS)]
