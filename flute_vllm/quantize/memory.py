"""How much memory a plan needs, by arithmetic from shapes: what ``--dry-run`` shows.

Counted is what grows with the model. Python, torch and a CUDA context come on top: about 0.5 GB of
host memory on a CPU, 1.5 GB with CUDA.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flute_vllm.checkpoint import Checkpoint
from flute_vllm.quantize.plan import Plan, QuantizeSettings, Unit
from flute_vllm.quantize.refit import SYSTEM_VALUES
from flute_vllm.quantize.state import BLOCK_WEIGHTS

_TEMPORARIES = 10  # float32 values for each weight of a block of rows in the scale search


@dataclass(frozen=True)
class Part:
    """One term of the sum: what it is, and bytes on the host or on the device."""

    what: str
    nbytes: int
    is_on_device: bool


def memory_parts(
    checkpoint: Checkpoint, plan: Plan, settings: QuantizeSettings, device: str
) -> list[Part]:
    """The terms that are live at the worst moment; on a CPU "device" terms are host memory too.

    Args:
        checkpoint, plan, settings: of the run.
        device: "cpu" or "cuda".
    """
    groups = [group for unit in plan.units for group in unit.groups]
    rows, columns = max((_shape(plan, g) for g in groups), key=lambda shape: shape[0] * shape[1])
    largest = rows * columns
    width = plan.recipe.needs != "nothing" and settings.calib != "none"
    copied = max(checkpoint.tensors[n].nbytes for unit in plan.units for n in unit.copied)
    parts = [
        Part(f"largest tensor, read to be copied or quantized ({copied:,} bytes)", copied, False),
        Part(f"largest fused group, {rows} x {columns}, 16 bits and codes", 3 * largest, True),
        Part("blocks of rows of the scale search",
             _TEMPORARIES * 4 * BLOCK_WEIGHTS[device], True),
    ]  # fmt: skip
    if not width:
        return parts
    return parts + _calibrated_parts(checkpoint, plan, settings, largest)


def _calibrated_parts(
    checkpoint: Checkpoint, plan: Plan, settings: QuantizeSettings, largest: int
) -> list[Part]:
    is_sequential = plan.recipe.propagation == "sequential"
    samples = settings.samples or plan.recipe.calibration.samples
    length = settings.length or plan.recipe.calibration.length
    widths = {group: _shape(plan, group)[1] for unit in plan.units for group in unit.groups}
    widest = max(widths.values())
    text = checkpoint.config.get("text_config", checkpoint.config)
    hidden = text.get("hidden_size", widest)
    paths = 2 if is_sequential else 1
    block = max(_block_nbytes(checkpoint, unit) for unit in plan.units if unit.groups)
    moments = max(sum(widths[g] ** 2 for g in unit.groups) for unit in plan.units if unit.groups)
    held = 3 * widest**2 if is_sequential else 2 * moments
    activations = samples * length * hidden * 2
    return [
        # Old and new activations are live while a block is run for the last time.
        Part(f"activations, {samples} x {length} x {hidden}", (paths + 1) * activations, False),
        Part("second moments of the inputs, float32", 4 * held, False),
        Part("decoder block" + (", twice" if is_sequential else ""), paths * block, True),
        Part(f"Hessian of {widest} features: two moments, inverse, factors", 20 * widest**2, True),
        Part("largest group in float32: weights, remainder, values", 12 * largest, True),
        Part("systems of the scale refit", 8 * SYSTEM_VALUES, True),
    ]


def _shape(plan: Plan, group: tuple[str, ...]) -> tuple[int, int]:
    return sum(plan.shapes[module][0] for module in group), plan.shapes[group[0]][1]


def _block_nbytes(checkpoint: Checkpoint, unit: Unit) -> int:
    names = (*unit.copied, *(f"{module}.weight" for module in unit.modules))
    return sum(2 * torch.Size(checkpoint.tensors[name].shape).numel() for name in names)
