"""NFL: scales trained through straight-through estimation (FLUTE, arXiv 2407.10960, section 3.3).

The whole model is on the device, its linear layers computing with the weights that their present
scales mean. Codes are looked up anew in every forward pass and count as constants in the backward
pass, so a scale's gradient is ``sum over its group of dL/dW' * table[code]``. Nothing else is
trained. Defaults are upstream's: Adam with rate 1e-4, one window a step, each window once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from flute_vllm.checkpoint import Checkpoint
from flute_vllm.errors import FluteError
from flute_vllm.quantize.calibration import Windows
from flute_vllm.quantize.names import find_linears
from flute_vllm.quantize.plan import Plan
from flute_vllm.quantize.recipes import Training
from flute_vllm.quantize.room import is_out_of_memory
from flute_vllm.quantize.scales import Quantizer, round_scales
from flute_vllm.quantize.state import State, Statistics, row_blocks
from flute_vllm.writer import whole_file

logger = logging.getLogger(__name__)


class StraightThroughLinear(nn.Module):
    """A linear layer with frozen weights [N, K] that computes with their quantized values.

    ``scales`` float32 [N, K / group_size] is its only parameter that is trained.
    """

    def __init__(self, linear: nn.Linear, quantizer: Quantizer, group: int) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.quantizer, self.group = quantizer, group
        grouped = self.weight.detach().float().reshape(-1, group)
        start = grouped.abs().amax(1) / quantizer.largest
        self.scales = nn.Parameter(start.view(self.weight.shape[0], -1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grouped = self.weight.detach().float().reshape(-1, self.group)
        with torch.no_grad():
            codes = self.quantizer.codes(grouped, self.scales.reshape(-1))
            values = self.quantizer.values(codes)
        dense = (values * self.scales.reshape(-1, 1)).view(self.weight.shape)
        return functional.linear(x, dense.to(x.dtype), self.bias)


def train_scales(
    folder: Path,
    plan: Plan,
    windows: Windows,
    training: Training,
    device: torch.device,
    on_step: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> dict[str, torch.Tensor]:
    """Scales by checkpoint module, float32 [N, K / group_size] on the CPU.

    Args:
        folder: the dense model.
        plan: which modules, with which tables.
        windows: of the calibration text; held-out ones are left out.
        training: rate and epochs.
        device: where the whole model must fit, with activations for a backward pass.
        on_step: called with the step, their number and the loss in nats a token.

    Raises:
        FluteError: the loss is not finite, or the device's memory is too small.
    """
    from flute_vllm.evaluate import load_model

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    try:
        model, _ = load_model(folder, dtype, str(device))
        model.requires_grad_(False)
        layers = _replace_linears(model, Checkpoint(folder), plan)
        if hasattr(model, "gradient_checkpointing_enable"):
            # Non-reentrant: with every weight frozen no input of a block requires a gradient.
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        optimizer = torch.optim.Adam([layer.scales for layer in layers.values()], lr=training.rate)
        ids = windows.ids[: len(windows.ids) - windows.heldout]
        steps = training.epochs * len(ids)
        for step in range(steps):
            window = ids[step % len(ids)][None].to(device)
            logits = model(input_ids=window, use_cache=False).logits[0, :-1].float()
            loss = functional.cross_entropy(logits, window[0, 1:])
            if not bool(loss.isfinite()):
                raise FluteError(
                    "training the scales diverged", where=f"step {step} of {steps}",
                    why=f"the loss is {float(loss)}", fix="use --recipe balanced, or a lower rate",
                )  # fmt: skip
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            on_step(step + 1, steps, float(loss.detach()))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise FluteError(
            "not enough memory to train scales", where=str(device),
            why=(str(error).splitlines() or [type(error).__name__])[0],
            fix="use a smaller --length, or --recipe best, which needs one block at a time",
        ) from error  # fmt: skip
    return {name: layer.scales.detach().cpu() for name, layer in layers.items()}


def _replace_linears(
    model: nn.Module, checkpoint: Checkpoint, plan: Plan
) -> dict[str, StraightThroughLinear]:
    layers = {}
    for stored, name in find_linears(model, checkpoint, plan.specs).items():
        module, spec = model.get_submodule(name), plan.specs[stored]
        table = plan.codebooks[spec.bits].values.to(spec.torch_scale_dtype)
        quantizer = Quantizer(table.to(module.weight.device), spec.bits)
        group = module.in_features if spec.group_size == -1 else spec.group_size
        layers[stored] = StraightThroughLinear(module, quantizer, group)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layers[stored])
    return layers


def with_scales(
    weight: torch.Tensor, statistics: Statistics, state: State, scales: torch.Tensor
) -> State:
    """Rounds to nearest with given scales, float32 [N, K / group_size]; a step like the others."""
    stored = round_scales(scales.to(weight.device), state.spec.torch_scale_dtype, state.where)
    group, quantizer = state.group(weight.shape[1]), state.quantizer()
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for block in row_blocks(weight):
        grouped = weight[block].float().reshape(-1, group)
        found = quantizer.codes(grouped, stored[block].reshape(-1).float())
        codes[block] = found.view(-1, weight.shape[1])
    return state.with_changes(codes=codes, scales=stored)


def load_or_train(path: Path, train: Callable[[], dict[str, torch.Tensor]]) -> dict:
    """Trained scales from the file that an earlier run left, else trained and written there."""
    if path.is_file():
        return load_file(path)
    scales = train()
    with whole_file(path) as unfinished:
        save_file({name: value.contiguous() for name, value in scales.items()}, unfinished)
    return scales
