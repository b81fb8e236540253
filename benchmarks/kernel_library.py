"""The CUDA kernels through ctypes: the same C functions that the torch ops call.

For benchmarks and checks that must reach a launch's configuration. The library is any shared
object that exports ``launch.h``: the package's extension, or ``nvcc -shared kernels/cuda/*.cu``.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace

import torch
from c_api import MAX_PARTS, Ahead, DecodeConfig, Matrix, Sm90Config, TileConfig, open_library

from flute_vllm import format as flute_format
from flute_vllm import tuning
from flute_vllm.tools.timing import copies_for

DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}  # as in launch.h


def relative_error(y: torch.Tensor, reference: torch.Tensor) -> float:
    """||y - reference|| / ||reference||; infinite for a NaN in y."""
    error = ((y.double() - reference).norm() / reference.norm()).item()
    return error if error == error else float("inf")


def device() -> tuning.Device:
    return tuning.device_of(torch.device("cuda", 0))


@dataclass
class Layer:
    """A layer in the canonical format and in the internal layout."""

    matrix: Matrix
    qweight: torch.Tensor
    scales: torch.Tensor
    table: torch.Tensor  # [parts, ...]
    records: torch.Tensor
    next: torch.Tensor | None = None  # records of the layer that runs after this one
    next_bytes: int = 0  # of them, asked for ahead

    def ahead(self) -> ctypes.c_void_p:
        """For the kernels' argument of that name; it lives as long as the layer."""
        if self.next is None or not self.next_bytes:
            return ctypes.c_void_p(None)
        self._ahead = Ahead(self.next.data_ptr(), self.next.numel() * 4, self.next_bytes)
        return ctypes.cast(ctypes.pointer(self._ahead), ctypes.c_void_p)

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        sizes = self.matrix.part_rows[: self.matrix.parts]
        parts = zip(self.qweight.split(sizes), self.scales.split(sizes), self.table, strict=True)
        return torch.cat(
            [flute_format.dequantize(q, s, t, self.matrix.bits, dtype) for q, s, t in parts]
        )


def in_rotation(layer: Layer) -> list[Layer]:
    """Copies of a layer that no cache holds; each asks for some of the next, as the plugin does."""
    count = copies_for(layer.records.numel() * 4)
    copies = [layer] + [replace(layer, records=layer.records.clone()) for _ in range(count - 1)]
    for copy, after in zip(copies, [*copies[1:], layer], strict=True):
        copy.next, copy.next_bytes = after.records, tuning.AHEAD_BYTES
    return copies


class Library:
    def __init__(self, path: str) -> None:
        torch.cuda.init()
        self.c = open_library(path)

    def _call(self, function, matrix: Matrix, *arguments) -> None:
        self._launch(function, ctypes.byref(matrix), *arguments)

    def _launch(self, function, *arguments) -> None:
        """On the current stream; tensors are passed as pointers."""
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        pointers = [
            ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments
        ]
        error = function(*pointers, stream)
        if error:
            raise RuntimeError(self.c.flute_error_text(error).decode())

    def random_layer(
        self,
        n: int,
        k: int,
        bits: int,
        group_size: int,
        dtype: torch.dtype,
        *,
        pair: bool = False,
        parts: tuple[int, ...] = (),
        seed: int = 0,
    ) -> Layer:
        generator = torch.Generator(device="cuda").manual_seed(seed)
        parts = parts or (n,)
        groups = 1 if group_size < 0 else k // group_size
        # Every word is a legal run of codes, at each bit width.
        words = torch.randint(
            -(2**31),
            2**31,
            (n, k // 32 * bits),
            dtype=torch.int64,
            device="cuda",
            generator=generator,
        )
        scales = torch.rand(n, groups, device="cuda", generator=generator) * 0.02 + 0.01
        shape = (len(parts), 4**bits, 2) if pair else (len(parts), 2**bits)
        table = torch.randn(shape, device="cuda", generator=generator)
        is_bfloat16, rows = int(dtype == torch.bfloat16), (ctypes.c_int32 * MAX_PARTS)(*parts)
        matrix = Matrix(n, k, bits, group_size, is_bfloat16, int(pair), len(parts), rows)
        size = self.c.flute_record_words(ctypes.byref(matrix))
        if size < 0:
            raise RuntimeError(f"no internal layout for {n} x {k}")
        records = torch.empty(size, dtype=torch.int32, device="cuda")
        layer = Layer(matrix, words.to(torch.int32), scales.to(dtype), table.to(dtype), records)
        self._call(self.c.flute_repack, matrix, layer.qweight, layer.scales, records)
        return layer

    def dequantize(self, layer: Layer, *, poison: bool = True) -> torch.Tensor:
        """Dense [N, K]. ``poison`` fills it with NaN first; a benchmark does without."""
        shape, dtype = (layer.matrix.n, layer.matrix.k), layer.scales.dtype
        w = torch.empty(shape, dtype=dtype, device="cuda")
        if poison:
            w.fill_(float("nan"))
        self._call(self.c.flute_dequantize, layer.matrix, layer.records, layer.table, w)
        return w

    def decode(
        self,
        layer: Layer,
        config: tuning.Config,
        x: torch.Tensor,
        y: torch.Tensor,
        records: torch.Tensor | None = None,
        *,
        planes: bool = False,
    ) -> torch.Tensor:
        """``records`` replaces those of the layer: a copy, in rotation. ``planes``: by the kernel
        of bit planes. Raises RuntimeError for a library without it."""
        function = getattr(self.c, "flute_planes" if planes else "flute_decode", None)
        if function is None:
            raise RuntimeError("the library has no such kernel")
        c = DecodeConfig(*config.numbers)
        records = layer.records if records is None else records
        arguments = (ctypes.byref(c), x.shape[0], x, records, layer.table, y, layer.ahead())
        self._call(function, layer.matrix, *arguments)
        return y

    def sm90_gemm(
        self,
        layer: Layer,
        config: tuple[int, ...],
        x: torch.Tensor,
        y: torch.Tensor,
        records: torch.Tensor | None = None,
    ) -> torch.Tensor:
        records = layer.records if records is None else records
        c = Sm90Config(*config)
        size = self.c.flute_sm90_workspace(ctypes.byref(c))
        workspace = torch.empty(size // 4, device="cuda") if size else ctypes.c_void_p(None)
        arguments = (
            ctypes.byref(c),
            x.shape[0],
            x,
            records,
            layer.table,
            y,
            workspace,
            layer.ahead(),
        )
        self._call(self.c.flute_sm90_gemm, layer.matrix, *arguments)
        return y

    def tile_workspace(self, layer: Layer, config: tuning.tile.Config, m: int) -> torch.Tensor:
        c = TileConfig(config.tokens, config.splits, config.x_slots, config.record_slots)
        size = self.c.flute_tile_workspace(ctypes.byref(layer.matrix), ctypes.byref(c), m)
        return torch.full((size // 4,), float("nan"), device="cuda")

    def tile(
        self,
        layer: Layer,
        config: tuning.tile.Config,
        x: torch.Tensor,
        y: torch.Tensor,
        workspace: torch.Tensor | None = None,
        records: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``workspace`` is made here where it is not given; ``records`` as in ``decode``."""
        c = TileConfig(config.tokens, config.splits, config.x_slots, config.record_slots)
        if workspace is None:
            workspace = self.tile_workspace(layer, config, x.shape[0])
        records = layer.records if records is None else records
        arguments = (ctypes.byref(c), x.shape[0], x, records, layer.table, y, workspace)
        self._call(self.c.flute_tile, layer.matrix, *arguments)
        return y

    def activate(self, x: torch.Tensor, activation: int, y: torch.Tensor) -> torch.Tensor:
        """y [m, n] = act(x[:, :n]) * x[:, n:] of contiguous x [m, 2 n]."""
        sizes = [ctypes.c_int64(size) for size in y.shape]
        self._launch(self.c.flute_activate, int(activation), DTYPES[x.dtype], *sizes, x, y)
        return y

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of x + residual, and the sum."""
        y, total = torch.empty_like(x), torch.empty_like(x)
        numbers = (DTYPES[x.dtype], *x.shape, ctypes.c_float(epsilon), ctypes.c_float(0))
        self._launch(self.c.flute_rms_norm, *numbers, x, residual, weight, y, total)
        return y, total

    def run(
        self,
        layer: Layer,
        entry: tuning.Entry,
        x: torch.Tensor,
        y: torch.Tensor,
        records: torch.Tensor | None = None,
        activation: int = 0,
    ) -> torch.Tensor:
        """What the op does with an entry of a plan; gated, for entries that can, y is half as
        wide."""
        if activation:
            matrix = Matrix.from_buffer_copy(layer.matrix)
            matrix.activation = activation
            layer = replace(layer, matrix=matrix)
        if entry.kernel in (tuning.DECODE, tuning.PLANES):
            config, planes = tuning.Config(*entry.config), entry.kernel == tuning.PLANES
            return self.decode(layer, config, x, y, records, planes=planes)
        if entry.kernel == tuning.SM90:
            return self.sm90_gemm(layer, entry.config, x, y, records)
        if entry.kernel == tuning.TILE:
            config = tuning.tile.Config(*entry.config)
            return self.tile(layer, config, x, y, records=records)
        return torch.mm(x, self.dequantize(layer, poison=False).t(), out=y)
