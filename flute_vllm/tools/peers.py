"""Other weight-only kernels, each behind the same two calls, for side-by-side timing.

    prepared = peer.prepare(weight, bits, group_size)     # weight [N, K] float16 or bfloat16
    y = prepared.call(x, prepared.tensors)                # x [M, K] -> y [M, N]

``tensors`` are those of one copy of the weight: a benchmark clones and rotates them. Quantizing
peers start from ``weight`` rounded by their own rule, and ``dense`` is what they then compute with.
A peer that cannot be used here is reported with the reason (``load``), never left out in silence.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
UINT4B8 = 1125899907892224  # vllm.scalar_type.scalar_types.uint4b8.id: codes are weight + 8
MARLIN_ARGUMENTS = 19  # of vLLM 0.26's op; later ones dropped g_idx, perm and is_k_full
BNB_BLOCK = 64
Shape = tuple[int, int, int, int, torch.dtype]  # n, k, bits, group_size, dtype of activations


@dataclass
class Prepared:
    """A weight as one peer stores it. ``dense`` [N, K]: the values that it multiplies with."""

    tensors: tuple[torch.Tensor, ...]
    call: Callable[[torch.Tensor, tuple[torch.Tensor, ...]], torch.Tensor]
    dense: torch.Tensor

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)


class Peer:
    """One kernel library. ``refusal`` says why it cannot take a layer, or is None."""

    name = ""
    version = ""

    def refusal(self, n: int, k: int, bits: int, group_size: int) -> str | None:
        return None

    def prepare(self, weight: torch.Tensor, bits: int, group_size: int) -> Prepared:
        raise NotImplementedError(f"peer {self.name} does not say how it stores a weight")

    def precompile(self, layers: Iterable[Shape], limit_s: float) -> str | None:
        """Builds what the layers need; the reason where that failed or outlasted the limit."""


def quantize(
    weight: torch.Tensor, bits: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round to nearest, one scale for each group, no zero point.

    Returns codes int32 [N, K] (weight + 2**(bits - 1)), scales [N, K / group_size] and the
    dequantized weight [N, K], the latter two in the dtype of ``weight``.
    """
    n, k = weight.shape
    half = 1 << (bits - 1)
    grouped = weight.float().view(n, k // group_size, group_size)
    scales = (grouped.abs().amax(-1) / (half - 1)).clamp_min(1e-8).to(weight.dtype)
    steps = scales.float().unsqueeze(-1)
    codes = torch.round(grouped / steps).clamp_(-half, half - 1)
    dense = (codes * steps).to(weight.dtype).view(n, k)
    return (codes + half).to(torch.int32).view(n, k), scales, dense


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """codes [N, K] as a stream of little-endian bits along K: int32 [N, K / 32 * bits]."""
    n, k = codes.shape
    words = torch.zeros(n, k // 32, bits, dtype=torch.int64, device=codes.device)
    units = codes.view(n, k // 32, 32)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        value = units[:, :, i].to(torch.int64)
        words[:, :, word] |= (value << shift) & 0xFFFFFFFF
        if shift + bits > 32:  # 3 bits: some codes straddle two words
            words[:, :, word + 1] |= value >> (32 - shift)
    return (words - ((words >> 31) << 32)).to(torch.int32).view(n, k // 32 * bits)


class Cublas(Peer):
    name = "cublas"

    def __init__(self) -> None:
        self.version = torch.__version__

    def prepare(self, weight: torch.Tensor, bits: int, group_size: int) -> Prepared:
        def call(x, tensors):
            return torch.nn.functional.linear(x, tensors[0])

        return Prepared((weight,), call, weight)


class VllmOps(Peer):
    """Kernels of vLLM's library of custom ops, which loads without importing vLLM."""

    groups: tuple[int, ...] = ()
    rows, columns = 1, 1  # N and K must be multiples

    def __init__(self) -> None:
        spec = importlib.util.find_spec("vllm")  # finds the folder, runs no code of the package
        if spec is None or not spec.submodule_search_locations:
            raise ImportError("vllm is not installed")
        library = Path(spec.submodule_search_locations[0]) / "_C_stable_libtorch.abi3.so"
        if not library.is_file():
            raise ImportError(f"this vLLM has no {library.name}; it came with 0.24 for CUDA")
        torch.ops.load_library(str(library))
        self.version = "vllm " + _version("vllm")

    def refusal(self, n: int, k: int, bits: int, group_size: int) -> str | None:
        if bits != 4:
            return "4 bits only"
        if group_size not in self.groups:
            return f"no group_size {group_size}"
        if n % self.rows or k % self.columns:
            return f"needs multiples of {self.rows} x {self.columns}"
        return None


class Marlin(VllmOps):
    name = "marlin"
    groups = (32, 64, 128)
    rows, columns = 64, 128

    def __init__(self) -> None:
        super().__init__()
        arguments = len(torch.ops._C.marlin_gemm.default._schema.arguments)
        if arguments != MARLIN_ARGUMENTS:
            raise ImportError(
                f"marlin_gemm of {self.version} takes {arguments} arguments, "
                f"the known one {MARLIN_ARGUMENTS}"
            )

    def prepare(self, weight: torch.Tensor, bits: int, group_size: int) -> Prepared:
        n, k = weight.shape
        codes, scales, dense = quantize(weight, bits, group_size)
        words = pack(codes, bits).t().contiguous()  # [K / 8, N]
        unordered = torch.empty(0, dtype=torch.int32, device=weight.device)
        ops = torch.ops._C
        tiles = ops.gptq_marlin_repack(words, unordered, k, n, bits, False)
        # Scales in the order in which a warp's threads own columns: an 8 x 8 transpose of each 64.
        ordered = scales.t().reshape(-1, 8, 8).transpose(1, 2).reshape(k // group_size, n)
        processors = torch.cuda.get_device_properties(weight.device).multi_processor_count
        workspace = torch.zeros(4 * processors, dtype=torch.int32, device=weight.device)
        # is_k_full, use_atomic_add, use_fp32_reduce, is_zp_float: the defaults of vLLM's layers
        flags = (True, False, True, False)

        def call(x, tensors):
            return ops.marlin_gemm(
                x, None, tensors[0], None, tensors[1], None, None, None, None, None,
                workspace, UINT4B8, x.shape[0], n, k, *flags,
            )  # fmt: skip

        return Prepared((tiles, ordered.contiguous()), call, dense)


class Machete(VllmOps):
    name = "machete"
    groups = (64, 128)
    rows, columns = 128, 64

    def __init__(self) -> None:
        super().__init__()
        capability = torch.cuda.get_device_capability()
        if capability[0] != 9:
            raise ImportError(f"compiled for sm_90 only, this GPU is sm_{capability[0]}x")
        torch.ops._C.machete_mm.default  # noqa: B018 - raises where this build lacks the op

    def prepare(self, weight: torch.Tensor, bits: int, group_size: int) -> Prepared:
        codes, scales, dense = quantize(weight, bits, group_size)
        column_major = pack(codes, bits).t()  # [K / 8, N] with stride 1 along K
        ops, dtype = torch.ops._C, weight.dtype
        tiles = ops.machete_prepack_B(column_major, dtype, UINT4B8, dtype)

        def call(x, tensors):
            return ops.machete_mm(
                x, tensors[0], UINT4B8, None, tensors[1], None, group_size, None, None, None
            )

        return Prepared((tiles, scales.t().contiguous()), call, dense)


class Humming(Peer):
    """Compiles kernels for each layer shape at its first call, so build them ahead in parallel."""

    name = "humming"

    def __init__(self) -> None:
        from humming.layer import HummingLayer

        self.layer_class = HummingLayer
        self.version = _version("humming-kernels")

    def refusal(self, n: int, k: int, bits: int, group_size: int) -> str | None:
        return None if group_size >= 32 else f"no group_size {group_size} in this comparison"

    def prepare(self, weight: torch.Tensor, bits: int, group_size: int) -> Prepared:
        codes, scales, dense = quantize(weight, bits, group_size)
        (n, k), dtype = weight.shape, weight.dtype
        name = next(name for name, known in DTYPES.items() if known == dtype)
        layer = self.layer_class(
            shape_n=n, shape_k=k, torch_dtype=dtype,
            weight_config={"dtype": f"uint{bits}", "group_size": group_size, "scale_dtype": name},
        ).to(weight.device)  # fmt: skip
        layer.load_from_tensors({"weight": pack(codes, bits), "weight_scale": scales})
        layer.transform()
        parameters = dict(layer.named_parameters())

        def call(x, tensors):
            rotated = dict(zip(parameters, tensors, strict=True))
            return torch.func.functional_call(layer, rotated, (x,))

        return Prepared(tuple(p.data for p in parameters.values()), call, dense)

    def precompile(self, layers: Iterable[Shape], limit_s: float) -> str | None:
        """One process for each shape: kernels land in the library's cache on disk."""
        names = {dtype: name for name, dtype in DTYPES.items()}
        jobs = {(n, k, bits, group, names[dtype]) for n, k, bits, group, dtype in layers}
        deadline = time.monotonic() + limit_s

        def build(job: tuple) -> str | None:
            command = [sys.executable, "-m", __spec__.name, "--compile-humming", *map(str, job)]
            left = deadline - time.monotonic()
            try:
                done = subprocess.run(
                    command,
                    capture_output=True,
                    text=True,
                    timeout=max(left, 1),
                    check=False,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                )
            except subprocess.TimeoutExpired:
                return f"{job}: not compiled within {limit_s:.0f} s"
            tail = done.stderr.strip().splitlines()[-1:]
            return f"{job}: {''.join(tail)}" if done.returncode else None

        with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
            failed = [text for text in pool.map(build, sorted(jobs)) if text]
        return "; ".join(failed) or None


class Bitsandbytes(Peer):
    """NF4 in blocks of 64, whatever the group size of the row; it picks fused or dequantizing."""

    name = "bnb"

    def __init__(self) -> None:
        import bitsandbytes
        import bitsandbytes.functional

        self.functional = bitsandbytes.functional
        self.version = bitsandbytes.__version__
        torch.ops.bitsandbytes.gemm_4bit.default  # noqa: B018 - raises in releases without it

    def refusal(self, n: int, k: int, bits: int, group_size: int) -> str | None:
        return None if bits == 4 else "4 bits only"

    def prepare(self, weight: torch.Tensor, bits: int, group_size: int) -> Prepared:
        codes, state = self.functional.quantize_4bit(
            weight.contiguous(), blocksize=BNB_BLOCK, quant_type="nf4", compress_statistics=False
        )
        dense = self.functional.dequantize_4bit(codes, state).to(weight.dtype)
        shape, gemm = list(weight.shape), torch.ops.bitsandbytes.gemm_4bit.default

        def call(x, tensors):
            return gemm(x, tensors[0], shape, tensors[1], BNB_BLOCK, "nf4")

        return Prepared((codes.view(-1, 1), state.absmax), call, dense)


REGISTRY = {peer.name: peer for peer in (Cublas, Marlin, Machete, Humming, Bitsandbytes)}


def load(names: Iterable[str]) -> tuple[dict[str, Peer], dict[str, str]]:
    """Usable peers by name, and for the others the reason."""
    usable, reasons = {}, {}
    for name in names:
        if name not in REGISTRY:
            reasons[name] = f"unknown; known are {', '.join(REGISTRY)}"
            continue
        try:
            usable[name] = REGISTRY[name]()
        except Exception as error:  # noqa: BLE001 - any failure to load is a reason to report
            reasons[name] = describe(error)
    return usable, reasons


def relative_error(prepared: Prepared, m: int) -> float:
    """Of one call with random x [m, K], against the float64 product with the dense weight."""
    dense = prepared.dense
    x = torch.randn(m, dense.shape[1], device=dense.device).to(dense.dtype)
    y = prepared.call(x, prepared.tensors).double()
    exact = x.double() @ dense.double().t()
    return float((y - exact).norm() / exact.norm())


def describe(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compiles humming's kernels of one layer shape.")
    parser.add_argument("--compile-humming", nargs=5, metavar=("N", "K", "BITS", "GROUP", "DTYPE"))
    n, k, bits, group, dtype = parser.parse_args().compile_humming
    weight = torch.zeros(int(n), int(k), dtype=DTYPES[dtype], device="cuda")
    prepared = Humming().prepare(weight, int(bits), int(group))
    prepared.call(weight[:1], prepared.tensors)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
