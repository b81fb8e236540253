"""The tile kernel (more than 32 rows of x): on a GPU, and its source emulated on the CPU.

The GPU library is the one that ``FLUTE_CUDA_LIBRARY`` names, or the package's extension.
``FLUTE_CUDA_CAPABILITY`` (for example 86) plans as for an older device.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flute_vllm.tuning import tile as tile_plan

ROOT = Path(__file__).resolve().parent.parent
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
COUNTS = (33, 48, 64, 65, 100, 128, 129, 257, 1000)
# Odd rows, parts that end within a tile, columns that are no multiple of 128.
SHAPES = {
    32: (((333,), 1056), ((37, 63), 160), ((16,), 32)),
    64: (((333,), 1088), ((37, 63), 192), ((1,), 64)),
    128: (((333,), 1152), ((130, 255, 16), 640), ((17,), 128)),
    256: (((333,), 2304), ((37, 63), 256)),
    -1: (((333,), 1952), ((37, 63), 416), ((129,), 32)),
}


@pytest.fixture(scope="module")
def kernels():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import kernel_library

    found = [os.environ.get("FLUTE_CUDA_LIBRARY"), *map(str, (ROOT / "flute_vllm").glob("*.so"))]
    path = next((name for name in found if name), None)
    if path is None:
        pytest.skip("no CUDA library is built")
    library = kernel_library.Library(path)
    if not hasattr(library.c, "flute_tile"):
        pytest.skip("the library has no tile kernels")
    device = kernel_library.device()
    if forced := os.environ.get("FLUTE_CUDA_CAPABILITY"):
        limit = 101376 if forced in ("86", "89", "120") else device.shared_bytes
        device = replace(device, name="forced", capability=int(forced), shared_bytes=limit)
    return library, device


def any_config(problem, device, rng):
    """Results must not depend on the choice."""
    while True:
        config = tile_plan.Config(
            rng.choice(tile_plan.TOKENS), rng.randint(1, 5), rng.randint(2, 5), rng.randint(1, 5)
        )
        if tile_plan.launch(problem, config, device) is not None:
            return config


def relative_error(y: torch.Tensor, exact: torch.Tensor) -> float:
    """Infinite where y is not finite."""
    error = ((y.double() - exact).norm() / exact.norm()).item()
    return error if error == error else float("inf")


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("pair", [False, True], ids=["scalar", "pair"])
@pytest.mark.parametrize("group", list(SHAPES))
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_as_accurate_as_dense(kernels, bits, group, pair, dtype):
    library, device = kernels
    rng = random.Random(bits * 1000 + group)
    for parts, k in SHAPES[group]:
        n = sum(parts)
        layer = library.random_layer(n, k, bits, group, dtype, pair=pair, parts=parts)
        w = layer.dense()
        for m in COUNTS:
            x = torch.randn(m, k, device="cuda").to(dtype)
            exact = x.double() @ w.double().t()
            bound = relative_error(x @ w.t(), exact)
            problem = tile_plan.Problem(n, k, m, bits, group, parts)
            for config in (tile_plan.select(problem, device), any_config(problem, device, rng)):
                # One element further than memory is aligned, between two that must stay.
                store = x.new_full((m * n + 2,), float("nan"))
                y = library.tile(layer, config, x, store[1:-1].view(m, n))
                assert relative_error(y, exact) <= 1.5 * bound, (parts, k, m, config)
                assert store[[0, -1]].isnan().all(), (parts, k, m, config)


@gpu
@needs_gpu
@pytest.mark.parametrize("m", [1, 16, 32])
def test_few_rows_work_too(kernels, m):
    library, device = kernels
    layer = library.random_layer(512, 1024, 4, 128, torch.bfloat16)
    x = torch.randn(m, 1024, device="cuda").bfloat16()
    config = tile_plan.select(tile_plan.Problem(512, 1024, m, 4, 128), device)
    y = library.tile(layer, config, x, x.new_full((m, 512), float("nan")))
    exact = x.double() @ layer.dense().double().t()
    assert relative_error(y, exact) <= 1.5 * relative_error(x @ layer.dense().t(), exact)


@gpu
@needs_gpu
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("splits", [1, 5])
def test_repeats_give_equal_bits(kernels, bits, splits):
    library, device = kernels
    layer = library.random_layer(1024, 4096, bits, 64, torch.float16)
    problem = tile_plan.Problem(1024, 4096, 200, bits, 64)
    x = torch.randn(200, 4096, device="cuda").half()
    for tokens in tile_plan.TOKENS:
        chosen = next(c for c in tile_plan.candidates(problem, device) if c.tokens == tokens)
        config = replace(chosen, splits=splits)
        first = library.tile(layer, config, x, x.new_empty(200, 1024))
        for _ in range(50):
            assert torch.equal(library.tile(layer, config, x, x.new_empty(200, 1024)), first)


@gpu
@needs_gpu
def test_what_is_not_legal_is_an_error_not_a_crash(kernels):
    library, device = kernels
    layer = library.random_layer(256, 4096, 4, 128, torch.bfloat16)
    problem = tile_plan.Problem(256, 4096, 64, 4, 128)
    x = torch.randn(64, 4096, device="cuda").bfloat16()
    for config in (
        tile_plan.Config(32),
        tile_plan.Config(64, 33),
        tile_plan.Config(128, 1, 4, 2),
    ):
        assert tile_plan.launch(problem, config, device) is None
        with pytest.raises(RuntimeError, match="configuration"):
            library.tile(layer, config, x, x.new_empty(64, 256))


def cuda_include() -> Path | None:
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", *Path("/usr/local").glob("cuda-*")]
    folders = [Path(home) / "include" for home in homes if home]
    return next((folder for folder in folders if (folder / "cuda_fp16.h").is_file()), None)


def run_emulated(folder: Path, headers: list[str], program: str, *arguments: str) -> None:
    """tests/emulation: the kernels' own sources, all but ptx.cuh, compiled for the CPU."""
    sources = [ROOT / "kernels" / "cuda" / f"{name}.cuh" for name in headers]
    for source in [*sources, *(ROOT / "tests" / "emulation").iterdir()]:
        shutil.copy(source, folder)
    includes = [f"-I{ROOT}/kernels/include", f"-I{cuda_include()}"]
    command = ["g++", "-std=c++17", "-O1", "-w", *includes, f"{program}.cpp", "-o", program]
    subprocess.run(command, cwd=folder, check=True)
    result = subprocess.run(
        [f"./{program}", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


needs_compiler = pytest.mark.skipif(
    not shutil.which("g++") or not cuda_include(), reason="no g++ or CUDA headers"
)


@needs_compiler
def test_emulated_kernel_agrees_with_plain_loops(tmp_path):
    headers = ["layout", "lut", "tile", "tile_operands", "tile_supply"]
    run_emulated(tmp_path, headers, "tile", "0", "40")


@needs_compiler
def test_records_decode_to_the_values_of_their_codes(tmp_path):
    run_emulated(tmp_path, ["layout", "lut", "register_lut"], "codes")


@needs_compiler
def test_table_in_registers_decodes_every_code(tmp_path):
    run_emulated(tmp_path, ["layout", "lut", "register_lut"], "register_lut")


@needs_compiler
def test_products_of_bit_planes_are_those_of_the_values(tmp_path):
    run_emulated(tmp_path, ["layout", "lut", "planes_operands"], "planes")


@needs_compiler
def test_spread_k_is_computed_once_and_every_partial_sum_is_taken(tmp_path):
    run_emulated(tmp_path, ["layout", "sm90_prefill_work"], "prefill_work")


@needs_compiler
def test_blocks_of_a_cluster_send_each_sum_once_and_expect_what_comes(tmp_path):
    run_emulated(tmp_path, ["layout", "cluster_sums"], "cluster_sums")
