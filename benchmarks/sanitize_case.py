"""One launch configuration of our kernels in a process of its own, without torch.

    compute-sanitizer python benchmarks/sanitize_case.py LIBRARY '{"kind": "decode", "n": 333, ...}'

Torch's own kernels would be checked too and its allocator hides overruns behind its pools, so the
memory comes from the CUDA driver, one allocation of the exact size for each tensor. Outputs start
as NaN, and one at the end, left there or computed, fails the case: exit code 3. The library is
``nvcc -shared kernels/cuda/*.cu``; the package's extension would need torch.
"""

from __future__ import annotations

import ctypes
import json
import random
import struct
import sys
from array import array
from dataclasses import asdict, dataclass, field

from c_api import MAX_PARTS, Ahead, DecodeConfig, Matrix, Sm90Config, TileConfig, open_library

NAN_LEFT = 3
NAN_BYTE = 0xFF  # 0xFFFF is a NaN in float16 and in bfloat16
DTYPES = {"float16": 0, "bfloat16": 1}
INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80}
CONFIGS = {
    "decode": DecodeConfig, "planes": DecodeConfig, "sm90": Sm90Config, "prefill": Sm90Config,
    "tile": TileConfig,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Repack, then ``kind``: "dequantize", or ``launches`` times "decode", "planes", "sm90",
    "prefill" (the Hopper kernel with 192 or 256 columns) or "tile". Without a matrix: "activate",
    x [m, n], and "norm" with its sum, x [m, k]."""

    kind: str
    n: int
    k: int
    bits: int
    group_size: int
    dtype: str = "bfloat16"
    pair: bool = False
    parts: tuple[int, ...] = ()
    m: int = 1
    config: tuple[int, ...] = field(default=())  # the C struct's fields, in their order
    launches: int = 1
    ahead: int = 0  # bytes that a launch asks for of its own layer, as if that came next
    activation: int = 0  # of a gated product

    def text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Case:
        fields = json.loads(text)
        fields["parts"], fields["config"] = tuple(fields["parts"]), tuple(fields["config"])
        return cls(**fields)

    def matrix(self) -> Matrix:
        parts = self.parts or (self.n,)
        rows = (ctypes.c_int32 * MAX_PARTS)(*parts)
        return Matrix(
            self.n, self.k, self.bits, self.group_size, DTYPES[self.dtype], int(self.pair),
            len(parts), rows, self.activation,
        )  # fmt: skip

    @property
    def values(self) -> int:
        """Of the result."""
        if self.kind in ("dequantize", "norm"):
            return self.k * (self.n if self.kind == "dequantize" else self.m)
        return self.m * self.n // (2 if self.activation else 1)


def half_bits(value: float, dtype: str) -> bytes:
    """Little-endian bytes of a value in a 16-bit dtype, bfloat16 by cutting float32."""
    return struct.pack("<e", value) if dtype == "float16" else struct.pack("<f", value)[2:]


class Gpu:
    """Memory of device 0 through the driver. Raises RuntimeError with the driver's code."""

    def __init__(self) -> None:
        self.driver = ctypes.CDLL("libcuda.so.1")
        context = ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self._call("cuCtxSetCurrent", context)

    def _call(self, name: str, *arguments) -> None:
        code = getattr(self.driver, name)(*arguments)
        if code:
            raise RuntimeError(f"{name} returned {code}")

    def empty(self, nbytes: int) -> ctypes.c_void_p:
        pointer = ctypes.c_void_p()
        self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(nbytes))
        return pointer

    def upload(self, content: bytes) -> ctypes.c_void_p:
        pointer = self.empty(len(content))
        self._call("cuMemcpyHtoD_v2", pointer, content, ctypes.c_size_t(len(content)))
        return pointer

    def download(self, pointer: ctypes.c_void_p, nbytes: int) -> bytes:
        content = ctypes.create_string_buffer(nbytes)
        self._call("cuMemcpyDtoH_v2", content, pointer, ctypes.c_size_t(nbytes))
        return content.raw

    def synchronize(self) -> None:
        self._call("cuCtxSynchronize")


def halves(count: int, dtype: str, scale: float, rng: random.Random) -> bytes:
    """``count`` random values, drawn from a pool: Python is slow and the values do not matter."""
    pool = b"".join(half_bits(rng.uniform(-scale, scale), dtype) for _ in range(257))
    return (pool * (count // 257 + 1))[: 2 * count]


def has_nan(content: bytes, dtype: str) -> bool:
    infinity = INFINITY[dtype]
    return any(value & 0x7FFF > infinity for value in set(array("H", content)))


def run(library, case: Case, gpu: Gpu) -> int:
    rng = random.Random(0)
    matrix = case.matrix()
    at = ctypes.byref(matrix)

    def check(code: int) -> None:
        if code:
            raise RuntimeError(library.flute_error_text(code).decode())

    groups = 1 if case.group_size < 0 else case.k // case.group_size
    entries = matrix.parts * (4**case.bits * 2 if case.pair else 2**case.bits)
    words = library.flute_record_words(at)
    if words < 0:
        raise RuntimeError(f"no internal layout for {case.n} x {case.k}")
    codes = gpu.upload(rng.randbytes(case.n * case.k // 8 * case.bits))
    scales = gpu.upload(halves(case.n * groups, case.dtype, 0.02, rng))
    table = gpu.upload(halves(entries, case.dtype, 1.0, rng))
    records = gpu.empty(words * 4)
    check(library.flute_repack(at, codes, scales, records, None))
    out = gpu.upload(bytes([NAN_BYTE]) * (2 * case.values))
    if case.kind == "norm":
        sums = gpu.upload(bytes([NAN_BYTE]) * (2 * case.values))
        x, residual = (gpu.upload(halves(case.values, case.dtype, 1.0, rng)) for _ in range(2))
        weight = gpu.upload(halves(case.k, case.dtype, 1.0, rng))
        numbers = (DTYPES[case.dtype], case.m, case.k, ctypes.c_float(1e-5), ctypes.c_float(1.0))
        for _ in range(case.launches):
            check(library.flute_rms_norm(*numbers, x, residual, weight, out, sums, None))
    elif case.kind == "activate":
        x = gpu.upload(halves(case.m * case.n, case.dtype, 1.0, rng))
        sizes = (ctypes.c_int64(case.m), ctypes.c_int64(case.n // 2))
        for _ in range(case.launches):
            check(library.flute_activate(case.activation, DTYPES[case.dtype], *sizes, x, out, None))
    elif case.kind == "dequantize":
        check(library.flute_dequantize(at, records, table, out, None))
    else:
        content = halves(case.m * case.k, case.dtype, 1.0, rng)
        if case.kind == "planes" and case.launches == 1:  # so that a row takes two numbers
            blocks = range(0, len(content), 256)
            small = [halves(120, case.dtype, 0.01, rng) for _ in blocks]
            whole = zip(blocks, small, strict=True)
            content = b"".join(content[at : at + 16] + rest for at, rest in whole)[: len(content)]
        x = gpu.upload(content)
        if len(case.config) != len(CONFIGS[case.kind]._fields_):  # ctypes would fill up with zeros
            raise ValueError(f"a launch of {case.kind} has other numbers than {case.config}")
        config = ctypes.byref(CONFIGS[case.kind](*case.config))
        arguments = (config, case.m, x, records, table, out)
        if case.kind == "tile":
            size = library.flute_tile_workspace(at, config, case.m)
            # Not filled: initcheck then tells of a share of a sum that nobody wrote.
            launch, last = library.flute_tile, gpu.empty(size) if size else None
        else:
            ahead = Ahead(records, words * 4, case.ahead)
            launch, last = library.flute_decode, ctypes.byref(ahead) if case.ahead else None
            if case.kind == "planes":
                launch = library.flute_planes
            elif case.kind != "decode":
                size = library.flute_sm90_workspace(config)
                launch, workspace = library.flute_sm90_gemm, gpu.empty(size) if size else None
                arguments = (*arguments, workspace)
        gpu.synchronize()  # with overlap a launch reads records before earlier kernels have ended
        for _ in range(case.launches):
            check(launch(at, *arguments, last, None))
    gpu.synchronize()
    return NAN_LEFT if has_nan(gpu.download(out, 2 * case.values), case.dtype) else 0


def main() -> int:
    path, text = sys.argv[1:3]
    return run(open_library(path), Case.parse(text), Gpu())


if __name__ == "__main__":
    sys.exit(main())
