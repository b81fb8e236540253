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
    return (records, scales.new_zeros(1), table, *settings, plan)


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


@pytest.mark.parametrize("m", [1, 8, 16, 32, 64, 128, 256, 1000])
def test_a_head_has_more_rows_than_any_other_layer(m):
    problem = make_problem((128256,), 512, 4, 128, torch.bfloat16)
    arguments = internal(problem)
    x = make_x(3, m, 512, dtype=torch.bfloat16).cuda()[2]
    dense = problem.dense().cuda()
    exact = x.double() @ problem.dense(torch.float32).double().cuda().T
    y = torch.ops.flute.gemm(x, *arguments)
    assert relative_error(y, exact) <= 1.5 * relative_error(x @ dense.T, exact)
    for rows in (slice(64), slice(-64, None)):  # the norm of all hides a few rows
        there = relative_error(x @ dense[rows].T, exact[:, rows])
        assert relative_error(y[:, rows], exact[:, rows]) <= 2 * there


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


def test_sums_spread_over_blocks_are_the_same_on_two_streams_at_once():
    """In graphs, whose first call is inside the capture, and eagerly; 200 times."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90")
    *arguments, plan = internal(make_problem((2560,), 2048, 4, 128))
    config = tuning.sm90.Config(256, 2, 8, 2, tuning.sm90.SPREAD, 2, 5, 1)
    spread = tuning.Entry(0, tuning.SM90, config.numbers).numbers
    x = make_x(300, 2048).cuda()
    whole = torch.ops.flute.gemm(x, *arguments, plan)
    graphs, outputs, streams = [], [], [torch.cuda.Stream() for _ in range(4)]
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(3):
                y = torch.ops.flute.gemm(x, *arguments, spread)
        graphs.append(graph)
        outputs.append(y)
    expected = torch.ops.flute.gemm(x, *arguments, spread)
    assert relative_error(expected, whole.double()) < 0.01
    for _ in range(200):
        for y in outputs:
            y.fill_(float("nan"))
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        for stream in streams[2:]:
            with torch.cuda.stream(stream):
                outputs.append(torch.ops.flute.gemm(x, *arguments, spread))
        torch.cuda.synchronize()
        assert all(torch.equal(y, expected) for y in outputs)
        del outputs[2:]


@pytest.mark.parametrize("m", [1, 16, 100, 300, 1000])
def test_a_call_takes_the_memory_that_its_plan_says(m):
    problem = make_problem((2560,), 2048, 4, 128)
    *arguments, plan = internal(problem)
    x, device = make_x(m, 2048).cuda(), tuning.device_of(torch.device("cuda", 0))
    shape = (2560, 2048, m, 4, 128, (2560,), False)
    entry = tuning.entry_of(tuning.entries(*shape[:2], 4, 128, (2560,), device), m)
    expected = tuning.workspace_bytes(entry, shape, device)
    torch.ops.flute.gemm(x, *arguments, plan)  # a library of torch's may take memory once
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = torch.ops.flute.gemm(x, *arguments, plan)
    taken = torch.cuda.max_memory_allocated() - before - y.numel() * 2
    assert expected <= taken <= expected + 2 * 512  # the allocator's grain


def plan_of_one_kernel(arguments: tuple, m: int, kernel: int) -> tuple:
    """``internal``'s arguments with only the entry for m rows, which must be of this kernel."""
    if kernel == tuning.SM90 and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90")
    *rest, plan = arguments
    entry = tuning.single(tuning.by_rows(plan), m)
    assert entry[1] == kernel
    return (*rest, entry)


# Of three layers: less than a request of 4096 bytes, some requests, more than 1 MiB.
NEXT_LAYERS = {"tiny": ((16,), 128), "odd": ((333,), 1184), "large": ((700, 500), 4096)}


@pytest.mark.parametrize("following", NEXT_LAYERS)
@pytest.mark.parametrize("next_bytes", [0, 4095, 4096, 1 << 20, 1 << 40])
@pytest.mark.parametrize(
    ("m", "kernel"),
    [(1, tuning.DECODE), (8, tuning.DECODE), (33, tuning.SM90), (100, tuning.SM90),
     (300, tuning.SM90)],
)  # fmt: skip
def test_asking_for_the_next_layer_changes_no_bit(m, kernel, next_bytes, following):
    """Eagerly, as the last of several launches, and in a graph; the layer may be its own next."""
    parts, k = NEXT_LAYERS[following]
    records = internal(make_problem(parts, k, 4, 32))[0]
    arguments = plan_of_one_kernel(internal(make_problem((333,), 1184, 3, 32)), m, kernel)
    x = make_x(m, 1184).cuda()
    expected = torch.ops.flute.gemm(x, *arguments)
    for follower in (records, arguments[0]):
        before = follower.clone()
        for _ in range(3):
            y = torch.ops.flute.gemm(x, *arguments, follower, next_bytes)
        assert torch.equal(y, expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(3):
                y = torch.ops.flute.gemm(x, *arguments, follower, next_bytes)
        y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, expected)
        assert torch.equal(follower, before)


def test_more_blocks_than_multiprocessors_ask_in_the_last_round():
    wide = plan_of_one_kernel(internal(make_problem((40000,), 256, 4, 128)), 1, tuning.DECODE)
    # A 16-row tile a block: thousands of blocks.
    wide[-1][2:8] = tuning.Config(1, 1, 1, 0, overlap=1).numbers
    follower = internal(make_problem((1024,), 4096, 4, 128))[0]
    x = make_x(1, 256).cuda()
    expected = torch.ops.flute.gemm(x, *wide)
    assert torch.equal(torch.ops.flute.gemm(x, *wide, follower, 4 << 20), expected)


@pytest.mark.parametrize("m", [1, 33])
@pytest.mark.parametrize("kind", ["canonical", "misaligned", "with gaps"])
def test_a_next_that_no_kernel_could_read_is_refused(kind, m):
    problem = make_problem((64,), 256, 4, 64)
    arguments = internal(problem)
    wrong = {
        "canonical": problem.qweight.cuda(),
        "misaligned": arguments[0][1:],
        "with gaps": arguments[0][::2],
    }[kind]
    x = make_x(m, 256).cuda()
    with pytest.raises(RuntimeError, match="(?s)next.*repacked qweight of the next layer"):
        torch.ops.flute.gemm(x, *arguments, wrong, 1 << 20)
    # Nothing is asked for: nothing is looked at.
    y = torch.ops.flute.gemm(x, *arguments, wrong, 0)
    assert torch.equal(y, torch.ops.flute.gemm(x, *arguments))


@pytest.mark.parametrize("m", [1, 33, 300])
def test_a_next_that_lies_elsewhere_is_passed_over(m):
    """Where vLLM offloads weights, the next layer may wait on the host: a hint fails no call."""
    arguments = internal(make_problem((64,), 256, 4, 64))
    waiting = arguments[0].cpu()
    elsewhere = [waiting, waiting.pin_memory(), arguments[0].new_empty(4, 8).cpu()]
    if torch.cuda.device_count() > 1:
        elsewhere.append(waiting.to("cuda:1"))
    x = make_x(m, 256).cuda()
    expected = torch.ops.flute.gemm(x, *arguments)
    for following in elsewhere:
        assert torch.equal(torch.ops.flute.gemm(x, *arguments, following, 1 << 20), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = torch.ops.flute.gemm(x, *arguments, following, 1 << 20)
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


def test_records_that_begin_within_a_line_are_refused():
    records, *rest = internal(make_problem((64,), 256, 4, 64))
    behind = torch.cat([records.new_zeros(4), records])[4:]  # 16 bytes on
    with pytest.raises(RuntimeError, match="16 bytes behind a multiple of 128"):
        torch.ops.flute.gemm(make_x(1, 256).cuda(), behind, *rest)


def test_a_tensor_of_another_layer_is_refused():
    records, *rest = internal(make_problem((64,), 256, 4, 64))
    with pytest.raises(RuntimeError, match="internal layout of 64 x 512"):
        torch.ops.flute.gemm(make_x(1, 512).cuda(), records, *rest)


def test_tensors_that_the_kernels_cannot_read_are_refused():
    records, scales, table, *rest = internal(make_problem((64,), 256, 4, 64))
    x = make_x(3, 256).cuda()
    with pytest.raises(RuntimeError, match="argument scales"):  # 32 bits would be read as 16
        torch.ops.flute.gemm(x.float(), records, scales.float(), table.float(), *rest)
    for wrong in (records.cpu(), records.float(), torch.stack([records, records], 1)[:, 0]):
        with pytest.raises(RuntimeError, match="argument qweight"):
            torch.ops.flute.gemm(x.to(scales.dtype), wrong, scales, table, *rest)


def test_importer_decodes_on_the_gpu():
    codes = torch.randint(0, 16, (64, 96), dtype=torch.uint8)
    packed = fmt.pack(codes, 4)
    assert torch.equal(fmt.unpack(packed.cuda(), 4).cpu(), codes)
