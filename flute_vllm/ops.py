"""The ops ``flute::gemm``, ``flute::gemm_gated`` and ``flute::dequantize``: loading, fake kernels,
public wrappers.

The compiled library ``_C.abi3.so`` holds the ops for CPU and, when built for it, CUDA. Without the
library (``FLUTE_BUILD=none``) the same ops are defined in plain torch, with one warning.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from flute_vllm import format as fmt
from flute_vllm import norms
from flute_vllm.errors import FluteError

logger = logging.getLogger(__name__)

LIBRARY = Path(__file__).with_name("_C.abi3.so")
ISAS = ("portable", "avx2", "avx512", "avx512_bf16")  # levels of kernels/cpu/kernels.h
_IN_USE, _BEST = -1, -2

_SCHEMAS = (
    "gemm(Tensor x, Tensor qweight, Tensor scales, Tensor table, int[] part_sizes, int bits, "
    "int group_size, int[] plan=[], Tensor? next=None, int next_bytes=0) -> Tensor",
    "gemm_gated(Tensor x, Tensor qweight, Tensor scales, Tensor table, int[] part_sizes, int bits, "
    "int group_size, int activation, int[] plan=[], Tensor? next=None, int next_bytes=0) -> Tensor",
    "dequantize(Tensor qweight, Tensor scales, Tensor table, int[] part_sizes, int bits, "
    "int group_size, ScalarType? dtype=None, int in_features=0) -> Tensor",
)


class Activation(enum.IntEnum):
    """What :func:`gemm_gated` makes of the gate. kernels/cpu/gated.h has the same numbers."""

    SILU = 1
    GELU_TANH = 2  # torch's gelu with approximate="tanh"
    GELU = 3  # by the error function


_compiled: bool | None = None  # what load() found


def load() -> bool:
    """Makes the ops of the namespace ``flute`` available; later calls do nothing.

    Call it before torch.compile meets :func:`gemm`: a file cannot be loaded while tracing.

    Returns:
        True with the compiled library, False with the pure-torch ops.

    Raises:
        FluteError: the library exists, but cannot be loaded.
    """
    global _compiled
    if _compiled is not None:
        return _compiled
    compiled = LIBRARY.exists()
    if compiled:
        try:
            torch.ops.load_library(str(LIBRARY))
        except OSError as error:
            raise FluteError(
                "cannot load the compiled kernels",
                where=str(LIBRARY),
                why=str(error),
                fix="rebuild with the installed torch: pip install --no-build-isolation -e .",
            ) from error
    else:
        logger.warning(
            "flute: the compiled kernels are missing (%s does not exist, built with "
            "FLUTE_BUILD=none?); plain torch decodes the whole weight at every call, which is "
            "tens of times slower and needs memory for the dense weight; fix: FLUTE_BUILD=auto "
            "pip install --no-build-isolation -e .",
            LIBRARY,
        )
        _define_reference()
    torch.library.register_fake("flute::gemm", _fake_gemm)
    torch.library.register_fake("flute::gemm_gated", _fake_gemm_gated)
    torch.library.register_fake("flute::dequantize", _fake_dequantize)
    norms.register(device_kernels=compiled and _registered_on_cuda())
    if compiled and not _registered_on_cuda():
        for name in ("gemm", "gemm_gated", "dequantize", "repack"):
            torch.library.impl(f"flute::{name}", "CUDA", _no_cuda)
    _compiled = compiled
    return compiled


def gemm(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    part_sizes: Sequence[int],
    bits: int,
    group_size: int,
) -> torch.Tensor:
    """Product of activations with a quantized weight: ``x @ W.T``, summed in float32.

    Args:
        x: [..., K] float32, float16 or bfloat16.
        qweight: int32 [N, K / 32 * bits], contiguous.
        scales: float16 or bfloat16 [N, K / group_size], or [N, 1] for group_size -1.
        table: [S, 2**bits], or [S, 2**(2 * bits), 2] for pairs, in the dtype of ``scales``.
        part_sizes: rows of each of the S matrices that are fused in N; they sum to N.
        bits: 2, 3 or 4.
        group_size: 32, 64, 128, 256, or -1 for one scale for each row.

    Returns:
        [..., N] in the dtype of ``x``. W is what :func:`flute_vllm.format.dequantize` gives.

    Raises:
        RuntimeError: arguments do not fit together; the message names the argument and numbers.
    """
    if _compiled is None:
        load()
    return torch.ops.flute.gemm(x, qweight, scales, table, part_sizes, bits, group_size)


def gemm_gated(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    part_sizes: Sequence[int],
    bits: int,
    group_size: int,
    activation: Activation | int,
) -> torch.Tensor:
    """A decoder's gated layer: ``act(gate) * up`` of the two halves of :func:`gemm`'s result.

    Args:
        x, qweight, scales, table, bits, group_size: as for :func:`gemm`.
        part_sizes: two equal numbers, the rows of gate and of up: [N / 2, N / 2].
        activation: one of :class:`Activation`.

    Returns:
        [..., N / 2] in the dtype of ``x``. Whether gate and up are rounded to it before the
        activation is left to the device; the activation is computed in float32.

    Raises:
        RuntimeError: arguments do not fit together; the message names the argument and numbers.
    """
    if _compiled is None:
        load()
    return torch.ops.flute.gemm_gated(
        x, qweight, scales, table, part_sizes, bits, group_size, activation
    )


def dequantize(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    part_sizes: Sequence[int],
    bits: int,
    group_size: int,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Dense weight [N, K] of :func:`gemm`'s arguments, rounded once to ``dtype``.

    ``dtype`` is the dtype of ``scales`` when None; float32 keeps the exact product. Raises
    RuntimeError like :func:`gemm`.
    """
    if _compiled is None:
        load()
    return torch.ops.flute.dequantize(qweight, scales, table, part_sizes, bits, group_size, dtype)


def repack(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    part_sizes: Sequence[int],
    bits: int,
    group_size: int,
) -> torch.Tensor:
    """Canonical CUDA tensors of :func:`gemm` in the layout of the GPU kernels, codes and scales.

    Returns:
        int32 [words]: ``qweight`` for :func:`gemm`, whose ``scales`` then only tells the dtype.
        K is padded to 128 and each part to 16 rows. ``kernels/cuda/layout.cuh`` has the layout.
    """
    load()
    return torch.ops.flute.repack(qweight, scales, table, part_sizes, bits, group_size)


def cpu_isa(name: str | None = None) -> str:
    """Instruction set of the CPU kernels in use, for this process.

    Args:
        name: set this one from now on ("auto": the best of this machine); only look when None.
            The environment variable ``FLUTE_CPU_ISA`` gives the value at the start.

    Raises:
        FluteError: ``name`` is unknown, or this machine or this build cannot run it.
    """
    usable = cpu_isas()
    if name is None:
        return ISAS[torch.ops.flute.cpu_isa(_IN_USE)] if usable else "reference"
    if name != "auto" and name not in usable:
        raise FluteError(
            f"cannot use the instruction set {name!r}",
            where="ops.cpu_isa",
            why=f"this machine and build run: {', '.join(usable) or 'no compiled kernels'}",
            fix=f"use one of {', '.join(('auto', *usable))}",
        )
    if not usable:
        return "reference"
    level = torch.ops.flute.cpu_isa(_BEST) if name == "auto" else ISAS.index(name)
    return ISAS[torch.ops.flute.cpu_isa(level)]


def cpu_isas() -> tuple[str, ...]:
    """Instruction sets that :func:`cpu_isa` accepts here, slowest first; empty without library."""
    if not load():
        return ()
    best = torch.ops.flute.cpu_isa(_BEST)
    x86_only = ISAS[1 : best + 1]
    return (ISAS[0], *x86_only)


def has_cuda_kernels() -> bool:
    """Whether the loaded library was built with its CUDA kernels."""
    return load() and _cuda_is_ours


_cuda_is_ours = False


def _registered_on_cuda() -> bool:
    global _cuda_is_ours
    _cuda_is_ours = torch._C._dispatch_has_kernel_for_dispatch_key("flute::gemm", "CUDA")
    return _cuda_is_ours


def _no_cuda(*_args: object, **_options: object) -> torch.Tensor:
    raise FluteError(
        "cannot run on a CUDA tensor",
        where=str(LIBRARY),
        why="the kernels were built with FLUTE_BUILD=cpu",
        fix="install the CUDA toolkit, then FLUTE_BUILD=cuda pip install --no-build-isolation -e .",
    )


def _fake_gemm(
    x, qweight, scales, table, part_sizes, bits, group_size, plan=(), next=None, next_bytes=0
):
    return x.new_empty((*x.shape[:-1], sum(part_sizes)))


def _fake_gemm_gated(
    x, qweight, scales, table, part_sizes, bits, group_size, activation, plan=(), next=None,
    next_bytes=0,
):  # fmt: skip
    return x.new_empty((*x.shape[:-1], sum(part_sizes) // 2))


def _fake_dequantize(
    qweight, scales, table, part_sizes, bits, group_size, dtype=None, in_features=0
):
    columns = in_features or qweight.shape[1] // bits * fmt.UNIT
    return qweight.new_empty((sum(part_sizes), columns), dtype=dtype or scales.dtype)


def _define_reference() -> None:
    for schema in (*_SCHEMAS, *norms.SCHEMAS):
        torch.library.define(f"flute::{schema.partition('(')[0]}", schema[schema.index("(") :])
    torch.library.impl("flute::gemm", ("CPU", "CUDA"), _reference_gemm)
    torch.library.impl("flute::gemm_gated", ("CPU", "CUDA"), _reference_gemm_gated)
    torch.library.impl("flute::dequantize", ("CPU", "CUDA"), _reference_dequantize)


def _reference_dequantize(
    qweight, scales, table, part_sizes, bits, group_size, dtype=None, in_features=0
):
    _check_reference(qweight, scales, table, part_sizes, bits, group_size)
    rows = zip(qweight.split(part_sizes), scales.split(part_sizes), table, strict=True)
    return torch.cat([fmt.dequantize(*tensors, bits, dtype) for tensors in rows])


def _reference_gemm(
    x, qweight, scales, table, part_sizes, bits, group_size, plan=(), next=None, next_bytes=0
):
    return _reference_product(x, qweight, scales, table, part_sizes, bits, group_size).to(x.dtype)


def _reference_gemm_gated(
    x, qweight, scales, table, part_sizes, bits, group_size, activation, plan=(), next=None,
    next_bytes=0,
):  # fmt: skip
    if activation not in tuple(Activation):
        raise _misfit("activation", f"{activation} is not 1 (silu), 2 (gelu with tanh) or 3 (gelu)")
    if len(part_sizes) != 2 or part_sizes[0] != part_sizes[1]:
        raise _misfit("part_sizes", f"{list(part_sizes)} are not two equal numbers of rows")
    product = _reference_product(x, qweight, scales, table, part_sizes, bits, group_size)
    gate, up = product.chunk(2, -1)
    return (activate(gate, Activation(activation)) * up).to(x.dtype)


def activate(gate: torch.Tensor, activation: Activation) -> torch.Tensor:
    """The activation alone, in torch, in the shape and dtype of ``gate``."""
    if activation == Activation.SILU:
        return torch.nn.functional.silu(gate)
    approximate = "tanh" if activation == Activation.GELU_TANH else "none"
    return torch.nn.functional.gelu(gate, approximate=approximate)


def _reference_product(x, qweight, scales, table, part_sizes, bits, group_size):
    weight = _reference_dequantize(qweight, scales, table, part_sizes, bits, group_size)
    if x.shape[-1] != weight.shape[1]:
        raise _misfit("x", f"{list(x.shape)} does not end in the {weight.shape[1]} input features")
    return x.float() @ weight.float().T


def _check_reference(qweight, scales, table, part_sizes, bits, group_size) -> None:
    kind = "pair" if table.dim() == 3 else "scalar"
    names = {dtype: name for name, dtype in fmt.SCALE_DTYPES.items()}
    if scales.dtype not in names or table.dtype != scales.dtype:
        raise _misfit("scales", f"dtypes {scales.dtype}, {table.dtype} are not one of fp16, bf16")
    spec = fmt.LayerSpec(bits, group_size, names[scales.dtype], kind)
    if qweight.dim() != 2 or qweight.dtype != torch.int32 or qweight.shape[1] % bits:
        raise _misfit(
            "qweight", f"{qweight.dtype} {list(qweight.shape)} is not [N, K / 32 * {bits}]"
        )
    columns = qweight.shape[1] // bits * fmt.UNIT
    spec.check_in_features(columns, "flute::gemm")
    layout = spec.tensor_layout(qweight.shape[0], columns)
    if tuple(scales.shape) != layout["scales"][0]:
        raise _misfit("scales", f"{list(scales.shape)} is not {list(layout['scales'][0])}")
    if tuple(table.shape) != (len(part_sizes), *spec.table_shape):
        raise _misfit("table", f"{list(table.shape)} is not {[len(part_sizes), *spec.table_shape]}")
    if sum(part_sizes) != qweight.shape[0] or min(part_sizes) < 0:
        raise _misfit("part_sizes", f"{list(part_sizes)} do not sum to {qweight.shape[0]} rows")


def _misfit(argument: str, why: str) -> FluteError:
    return FluteError(
        "cannot run the pure-torch ops",
        where=f"argument {argument}",
        why=why,
        fix="pass the tensors as the checkpoint stores them",
    )
