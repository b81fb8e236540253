"""What quantizing one group of modules costs the model: KL divergence on calibration text.

The whole model is on the device and each group is rounded to nearest in turn, all others dense.
The differences are those of the same tokens, so a few thousand tokens order the groups well.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flute_vllm.checkpoint import Checkpoint
from flute_vllm.errors import FluteError
from flute_vllm.quantize.allocate import Group
from flute_vllm.quantize.codebooks import Codebook
from flute_vllm.quantize.lloyd import learn_table
from flute_vllm.quantize.names import find_linears
from flute_vllm.quantize.room import is_out_of_memory
from flute_vllm.quantize.state import Statistics
from flute_vllm.quantize.tensor import start_state
from flute_vllm.writer import whole_file

TOKENS = 2048
_LENGTH = 256  # short windows: what errors cost depends little on it, attention's memory does


@torch.no_grad()
def measure_losses(
    checkpoint: Checkpoint,
    groups: Collection[Group],
    spec: Any,
    codebook: Codebook,
    ids: torch.Tensor,
    device: torch.device,
) -> dict[Group, float]:
    """KL(dense || only this group quantized) in nats a token, by group.

    Args:
        checkpoint: dense.
        groups: of module names as in the checkpoint.
        spec: LayerSpec in which every group is rounded, learned tables included.
        codebook: start of its table.
        ids: int64 [windows, length] of calibration text.
        device: must hold the whole model.

    Raises:
        FluteError: a module is not found, or the device's memory is too small.
    """
    from flute_vllm.evaluate import load_dense

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    try:
        model = load_dense(checkpoint.folder, dtype).eval().to(device)
        linears = _linears(model, checkpoint, {module for group in groups for module in group})
        tokens = ids[:, :_LENGTH][: -(-TOKENS // _LENGTH)].to(device)
        dense = _log_probabilities(model, tokens)
        losses = {}
        for group in groups:
            layers = [linears[module] for module in group]
            before = [layer.weight.data for layer in layers]
            weight = torch.cat(before)
            start = start_state(spec, codebook.values.to(device), codebook.is_fixed, group[0])
            rounded = learn_table(weight, Statistics(), start).dense()
            parts = rounded.split([len(part) for part in before])
            for layer, part in zip(layers, parts, strict=True):
                layer.weight.data = part.to(dtype)
            found = _log_probabilities(model, tokens)
            losses[group] = float((dense.exp() * (dense - found)).sum(-1).mean())
            for layer, part in zip(layers, before, strict=True):
                layer.weight.data = part
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise FluteError(
            "not enough memory to measure what each layer needs", where="--bpw",
            why=str(error).splitlines()[0],
            fix="leave --bpw out: recipes then need one block at a time; or use --override",
        ) from error  # fmt: skip
    return losses


def _log_probabilities(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """float32 [windows, length, vocabulary]; 1 GB at 2048 tokens of a vocabulary of 128k."""
    parts = [model(input_ids=row[None], use_cache=False).logits for row in tokens]
    return torch.cat(parts).float().log_softmax(-1)


def _linears(
    model: nn.Module, checkpoint: Checkpoint, modules: Collection[str]
) -> dict[str, nn.Linear]:
    found = {}
    for stored, name in find_linears(model, checkpoint, modules).items():
        found[stored] = module = model.get_submodule(name)
        # A head that was tied to the embeddings must not change them.
        module.weight = nn.Parameter(module.weight.data, requires_grad=False)
    return found


def load_or_measure(path: Path, measure: Callable[[], dict[Group, float]]) -> dict[Group, float]:
    """Losses from the file that an earlier run left, else measured and written there."""
    if path.is_file():
        return {tuple(entry["group"]): entry["loss"] for entry in json.loads(path.read_text())}
    losses = measure()
    listed = [{"group": list(group), "loss": loss} for group, loss in losses.items()]
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(listed))
    return losses
