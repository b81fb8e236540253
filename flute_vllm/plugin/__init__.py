"""vLLM plugin: registers the quantization method ``flute``."""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm.flute")

SUPPORTED_VLLM = ((0, 26), (0, 33))  # first and last minor release whose plugin surface was read


def register() -> None:
    """Adds ``flute`` to vLLM's quantization methods.

    vLLM calls it once in each process (API server, engine core, every worker, model inspection),
    so it imports no kernel, touches no device and may be called any number of times.
    """
    from vllm.model_executor.layers.quantization import register_quantization_config

    from flute_vllm.plugin.config import FluteConfig

    _warn_outside_tested_versions()
    register_quantization_config("flute")(FluteConfig)


def _warn_outside_tested_versions() -> None:
    from vllm import __version__ as found

    try:
        minor = tuple(int(part) for part in found.split(".")[:2])
    except ValueError:
        return  # a source build without a release number; nothing to compare
    first, last = SUPPORTED_VLLM
    if not first <= minor <= last:
        logger.warning(
            "flute: written against vLLM %d.%d to %d.%d, found %s; if loading fails, install one "
            "of these",
            *first, *last, found,
        )  # fmt: skip
