"""The CUDA kernels against the canonical format, on a GPU.

The wide grid is ``benchmarks/gpu_check.py``; here is one case of each kind. The library is the one
that ``FLUTE_CUDA_LIBRARY`` names, or the package's extension.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from flute_vllm import tuning

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def kernels():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import kernel_library

    found = [os.environ.get("FLUTE_CUDA_LIBRARY"), *map(str, (ROOT / "flute_vllm").glob("*.so"))]
    path = next((name for name in found if name), None)
    if path is None:
        pytest.skip("no CUDA library is built")
    return kernel_library.Library(path), kernel_library.device()


def decode(kernels, layer, m, config=None):
    library, gpu = kernels
    matrix = layer.matrix
    parts = tuple(matrix.part_rows[: matrix.parts])
    problem = tuning.Problem(matrix.n, matrix.k, m, matrix.bits, matrix.group_size, parts)
    config = config or tuning.select(problem, gpu, environment={})
    x = torch.randn(m, matrix.k, device="cuda").to(layer.scales.dtype)
    y = x.new_full((m, matrix.n), float("nan"))
    library.decode(layer, config, x, y)
    exact = x.double() @ layer.dense(torch.float32).double().t()
    dense = (x @ layer.dense().t()).double()
    return (y - exact).norm() / exact.norm(), (dense - exact).norm() / exact.norm()


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("pair", [False, True], ids=["scalar", "pair"])
@pytest.mark.parametrize("group", [32, 64, 128, 256, -1])
def test_repack_and_dequantize_are_exact(kernels, bits, pair, group):
    layer = kernels[0].random_layer(
        100, 1280, bits, group, torch.bfloat16, pair=pair, parts=(37, 63)
    )
    assert torch.equal(kernels[0].dequantize(layer), layer.dense())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("m", [1, 8, 16, 32])
def test_decode_is_as_accurate_as_dense(kernels, bits, dtype, m):
    layer = kernels[0].random_layer(333, 1152, bits, 64, dtype)
    error, bound = decode(kernels, layer, m)
    assert error <= 1.5 * bound


@pytest.mark.parametrize("m", [1, 32])
def test_split_over_a_cluster(kernels, m):
    if kernels[1].capability < 90:
        pytest.skip("clusters need sm_90")
    layer = kernels[0].random_layer(256, 4096, 4, 128, torch.bfloat16)
    error, bound = decode(kernels, layer, m, tuning.Config(4, 4, 4, 3))
    assert error <= 1.5 * bound


def test_illegal_config_is_an_error_not_a_crash(kernels):
    layer = kernels[0].random_layer(256, 4096, 4, 128, torch.bfloat16)
    with pytest.raises(RuntimeError, match="configuration"):
        decode(kernels, layer, 1, tuning.Config(128, 1, 1, 16))
