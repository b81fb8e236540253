"""What changes in the graphs that vLLM compiles around our GEMMs: one pass, and its installation.

An activation behind a gemm becomes part of it (``fused_gates.py``), and norms between two gemms our
own, which let the next one begin early (``fused_norms.py``).

The pass runs wherever vLLM hands a graph to Inductor: behind its own passes in VllmBackend on a
GPU, as Inductor's own ``post_grad_custom_post_pass`` on a CPU. Its uuid enters the hash of vLLM's
config, which names the folders of its two compile caches, and Inductor's keys: so the variable or
another version of these files lead to another graph. A stale one would be slower, not wrong: all
ops stay.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import fx
from vllm.compilation.passes.inductor_pass import InductorPass
from vllm.config import CompilationMode, get_current_vllm_config_or_none
from vllm.logger import init_logger

from flute_vllm import norms, ops
from flute_vllm.errors import FluteError
from flute_vllm.plugin import fused_gates, fused_norms

logger = init_logger("vllm.flute")

ENVIRONMENT = "FLUTE_FUSION"


def is_wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment leaves fusion on. Raises FluteError for other values than 0 and 1."""
    text = environment.get(ENVIRONMENT, "")
    if text not in ("", "0", "1"):
        raise FluteError(
            "cannot read an environment variable", where=ENVIRONMENT,
            why=f"{text!r} is neither 0 nor 1",
            fix="unset it (then activations and norms are fused), or set 0 to leave them to vLLM",
        )  # fmt: skip
    return text != "0"


def install() -> None:
    """Adds the pass to the vLLM config of the model under construction, once.

    Does nothing where vLLM compiles nothing with Inductor, or the environment says so. A pass of
    the user's at the same hook stays, as there is room for one.
    """
    from vllm.platforms import current_platform

    wanted = is_wanted()
    config = get_current_vllm_config_or_none()
    if not wanted or config is None:
        return
    compilation = config.compilation_config
    if compilation.mode in (None, CompilationMode.NONE) or compilation.backend != "inductor":
        return
    present = compilation.inductor_compile_config.setdefault(
        current_platform.pass_key, FusionPass()
    )
    if not isinstance(present, FusionPass):
        logger.warning_once(
            "flute: activations and norms stay kernels of their own, at batch 1 up to a seventh of "
            "the time of a block's linear layers: %s of the compilation config holds %s, and takes "
            "one pass",
            current_platform.pass_key, type(present).__name__,
        )  # fmt: skip


class FusionPass(InductorPass):
    """The pass. It has no state, so it survives the copies that vLLM makes of its config."""

    def __call__(self, graph: fx.Graph) -> None:
        target = torch.ops.flute.gemm.default
        gemms = graph.find_nodes(op="call_function", target=target)
        fused = sum(fused_gates.fuse_gate(graph, gemm) for gemm in gemms)
        replaced = fused_norms.replace_norms(graph)
        if fused or replaced:
            logger.info_once(
                "flute: in a compiled graph, %d of %d gemms compute their activation, too; "
                "%d norms let the next gemm begin early",
                fused, len(gemms), replaced,
            )  # fmt: skip

    def uuid(self) -> str:
        # What is matched, and the schemas of what replaces it.
        sources = (__file__, *(m.__file__ for m in (fused_gates, fused_norms, ops, norms)))
        return self.hash_source(*(Path(file).read_text() for file in sources))
