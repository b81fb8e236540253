"""flute_vllm: serve LUT-quantized language models with vLLM.

Importing the package is cheap: no torch, no vLLM, no compiled code. vLLM calls
:func:`register` in each of its processes through the ``vllm.general_plugins`` entry point;
transformers finds the quantizer ``flute`` once this package was imported.
"""

from __future__ import annotations

from typing import Any

from flute_vllm.hf import register_when_imported

__version__ = "0.1.0"

_LAZY = {
    "FluteError": "flute_vllm.errors",
    "LayerSpec": "flute_vllm.format",
    "pack": "flute_vllm.format",
    "unpack": "flute_vllm.format",
    "dequantize": "flute_vllm.format",
    "Checkpoint": "flute_vllm.checkpoint",
    "gemm": "flute_vllm.ops",
}
__all__ = [*_LAZY, "register", "__version__"]


register_when_imported()


def register() -> None:
    """Entry point of vLLM's plugin loader: adds the quantization method ``flute``."""
    from flute_vllm.plugin import register as register_plugin

    register_plugin()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'flute_vllm' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
