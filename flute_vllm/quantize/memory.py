"""How much memory a plan needs, by arithmetic from shapes: what ``--dry-run`` shows.

Counted is what grows with the model. Python, torch and a CUDA context come on top: about 0.5 GB of
host memory on a CPU, 1.5 GB with CUDA.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flute_vllm.checkpoint import Checkpoint
from flute_vllm.quantize.plan import OUTSIDE, Plan, QuantizeSettings, Unit
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
    copied = max(checkpoint.tensors[n].nbytes for unit in plan.units for n in unit.copied)
    groups = [_shape(plan, group) for unit in plan.units for group in unit.groups]
    whole = []
    if settings.bpw is not None:
        whole = [Part("whole model, while --bpw measures", checkpoint.nbytes, True)]
    temporaries = _TEMPORARIES * 4 * BLOCK_WEIGHTS[device]
    read = Part("largest tensor that is only copied", copied, False)
    if plan.recipe.needs == "nothing" or settings.calib == "none":
        rows, columns = max(groups, key=lambda shape: shape[0] * shape[1])
        return [
            *whole,
            read,
            Part(f"largest fused group, {rows} x {columns}: 16 bits and codes",
                 3 * rows * columns, True),
            Part("blocks of rows of the scale search", temporaries, True),
        ]  # fmt: skip
    if plan.recipe.needs == "gradients":
        return [*whole, read, *_trained_parts(checkpoint, plan)]
    rows, columns = max(groups, key=lambda shape: _group_peak(*shape, temporaries))
    peak = Part(
        f"largest group, {rows} x {columns}: weights, codes, moments, factors of the Hessian",
        _group_peak(rows, columns, temporaries), True,
    )  # fmt: skip
    return [*whole, read, peak, *_calibrated_parts(checkpoint, plan, settings)]


def _group_peak(rows: int, columns: int, temporaries: int) -> int:
    """Bytes of the phase that needs most: search, error feedback, or descent and refits.

    A moment has 4 columns**2 bytes, of which two are always there; weight and codes take 3 bytes
    a weight, each float32 copy 4.
    """
    square, weights = columns**2, rows * columns
    search = 8 * square + 3 * weights + temporaries
    feedback = 20 * square + 9 * weights  # permuted, factor, inverse; the remainder in float32
    descent = 12 * square + 15 * weights + 8 * SYSTEM_VALUES
    return max(search, feedback, descent)


def _trained_parts(checkpoint: Checkpoint, plan: Plan) -> list[Part]:
    layouts = (spec.num_groups(plan.shapes[m][1]) * plan.shapes[m][0] for m, spec in
               plan.specs.items())  # fmt: skip
    scales = sum(layouts)
    return [
        Part("whole model, 16 bits", checkpoint.nbytes, True),
        Part("scales with Adam's state, float32", 16 * scales, True),
    ]


def _calibrated_parts(checkpoint: Checkpoint, plan: Plan, settings: QuantizeSettings) -> list[Part]:
    is_sequential = plan.recipe.propagation == "sequential"
    samples = settings.samples or plan.recipe.calibration.samples
    length = settings.length or plan.recipe.calibration.length
    widths = {group: _shape(plan, group)[1] for unit in plan.units for group in unit.groups}
    widest = max(widths.values())
    text = checkpoint.config.get("text_config", checkpoint.config)
    hidden = text.get("hidden_size", widest)
    paths = 2 if is_sequential else 1
    inside = [unit for unit in plan.units if unit.groups and unit.name != OUTSIDE]
    block = max(_block_nbytes(checkpoint, unit) for unit in inside)
    moments = max(sum(widths[g] ** 2 for g in unit.groups) for unit in plan.units if unit.groups)
    held = 3 * widest**2 if is_sequential else 2 * moments
    activations = samples * length * hidden * 2
    return [
        # Old and new activations are live while a block is run for the last time.
        Part(f"activations, {samples} x {length} x {hidden}", (paths + 1) * activations, False),
        Part("second moments of the inputs, float32", 4 * held, False),
        Part("decoder block" + (", twice" if is_sequential else ""), paths * block, True),
    ]


def _shape(plan: Plan, group: tuple[str, ...]) -> tuple[int, int]:
    return sum(plan.shapes[module][0] for module in group), plan.shapes[group[0]][1]


def _block_nbytes(checkpoint: Checkpoint, unit: Unit) -> int:
    names = (*unit.copied, *(f"{module}.weight" for module in unit.modules))
    return sum(2 * torch.Size(checkpoint.tensors[name].shape).numel() for name in names)
