"""The ops ``flute::rms_norm`` and ``flute::add_rms_norm``: norms next to our GEMMs on a GPU.

The CUDA kernel lets the GEMM behind it begin at once, and is itself launched while the kernel ahead
of it still runs (kernels/cuda/norm.cu). It reads its weight meanwhile, which the kernel ahead must
therefore not write. On a CPU the ops are plain torch: for tests, and for the graphs of other
devices.
"""

from __future__ import annotations

import torch

SCHEMAS = (
    "rms_norm(Tensor x, Tensor weight, float epsilon, float weight_offset=0.) -> Tensor",
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float epsilon, "
    "float weight_offset=0.) -> (Tensor, Tensor)",
)
LARGEST, MULTIPLE = 32768, 8  # of the last dimension, as launch.h has them
DTYPES = (torch.float16, torch.bfloat16)


def register(device_kernels: bool) -> None:
    """Kernels in torch for CPUs, and fake ones. ``device_kernels``: CUDA has its own, compiled."""
    devices = ("CPU",) if device_kernels else ("CPU", "CUDA")
    torch.library.impl("flute::rms_norm", devices, rms_norm)
    torch.library.impl("flute::add_rms_norm", devices, add_rms_norm)
    torch.library.register_fake("flute::rms_norm", _fake_rms_norm)
    torch.library.register_fake("flute::add_rms_norm", _fake_add_rms_norm)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, weight_offset: float = 0.0
) -> torch.Tensor:
    """``x / sqrt(mean(x ** 2) + epsilon) * (weight + weight_offset)`` over the last dimension.

    Computed in float32 and rounded once, to the dtype of ``x`` [..., N]; ``weight`` [N].
    """
    return _scaled(x.float(), weight, epsilon, weight_offset).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of ``x + residual``, taken from the sum before its rounding, and that sum."""
    total = (x.float() + residual.float()).contiguous()
    return _scaled(total, weight, epsilon, weight_offset).to(x.dtype), total.to(x.dtype)


def _scaled(
    wide: torch.Tensor, weight: torch.Tensor, epsilon: float, weight_offset: float
) -> torch.Tensor:
    wide = wide.contiguous()  # as the results are, whatever the strides of x
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return wide * scale * (weight.float() + weight_offset)


def _fake_rms_norm(x, weight, epsilon, weight_offset=0.0):
    return x.new_empty(x.shape)


def _fake_add_rms_norm(x, residual, weight, epsilon, weight_offset=0.0):
    return x.new_empty(x.shape), x.new_empty(x.shape)
