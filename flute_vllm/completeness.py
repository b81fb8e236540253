"""Whether a checkpoint has every tensor that its architecture needs, from headers alone.

vLLM checks this for dense models only: in a quantized one, an embedding, a norm, a bias or a dense
linear that the checkpoint lacks would be served as uninitialised memory.
"""

from __future__ import annotations

import logging

import torch

from flute_vllm.checkpoint import Checkpoint
from flute_vllm.errors import FluteError

logger = logging.getLogger(__name__)


def check_complete(checkpoint: Checkpoint, quantized: set[str]) -> None:
    """Raises FluteError that names the first missing tensor.

    The needed names are the parameters of transformers' model of the same config, built without
    memory; a module in ``quantized`` counts as having its ``weight``. Nothing is checked, with one
    WARNING, for architectures that transformers does not know or stores under other names.
    """
    needed, prefix = _parameter_names(checkpoint)
    if needed is None:
        return
    present = {*checkpoint.tensors, *(f"{module}.weight" for module in quantized)}
    stripped = {name.removeprefix(prefix) for name in present}
    missing = [name for name in needed if name.removeprefix(prefix) not in stripped]
    if not missing:
        return
    if 2 * len(missing) > len(needed):
        _warn(checkpoint, f"{len(missing)} of {len(needed)} parameters have other names there")
        return
    raise FluteError(
        "missing tensor",
        where=f"{checkpoint.folder}: {missing[0]}",
        why=f"the architecture has it, the checkpoint does not ({len(missing)} missing in all)",
        fix="download the checkpoint again, or convert or quantize it again",
    )


def _parameter_names(checkpoint: Checkpoint) -> tuple[list[str] | None, str]:
    from transformers import AutoConfig

    from flute_vllm.quantize.names import model_class

    fields = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    try:
        config = AutoConfig.for_model(fields.pop("model_type", ""), **fields)
        with torch.device("meta"):
            model = model_class(config).from_config(config)
    except Exception as error:  # noqa: BLE001 - many kinds; what vLLM can serve is not decided here
        _warn(checkpoint, f"transformers cannot build the model ({type(error).__name__}: {error})")
        return None, ""
    if _is_renamed(model):
        _warn(checkpoint, "transformers renames this architecture's tensors when loading")
        return None, ""
    # Tied parameters are one object, which named_parameters gives once.
    model.tie_weights()
    return [name for name, _ in model.named_parameters()], f"{model.base_model_prefix}."


def _is_renamed(model: torch.nn.Module) -> bool:
    """Whether files of this architecture have other names than the model, or other tensors."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # transformers 4 renames nothing that matters here
        return False
    return bool(get_model_conversion_mapping(model, add_legacy=False))


def _warn(checkpoint: Checkpoint, why: str) -> None:
    logger.warning(
        "flute: %s is not checked for missing tensors: %s; quantized layers still are",
        checkpoint.folder, why,
    )  # fmt: skip
