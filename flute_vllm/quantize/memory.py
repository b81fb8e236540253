"""How much memory a plan needs, by arithmetic from shapes: what ``--dry-run`` shows.

Counted is what grows with the model. Python, torch and a CUDA context come on top: about 0.5 GB of
host memory on a CPU, 1.5 GB with CUDA. How much there is: :mod:`flute_vllm.quantize.room`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from flute_vllm.checkpoint import Checkpoint
from flute_vllm.quantize.plan import OUTSIDE, Plan, QuantizeSettings, Unit
from flute_vllm.quantize.refit import SYSTEM_VALUES
from flute_vllm.quantize.sensitivity import TOKENS as MEASURED_TOKENS
from flute_vllm.quantize.state import BLOCK_WEIGHTS

OVERHEAD = {"cpu": 500_000_000, "cuda": 1_500_000_000}  # Python, torch, a CUDA context
# Of tuning, which is in float32 up to here: bfloat16 logits are as far off as 4 bits are.
FLOAT32_PARAMETERS = 1 << 30
TOKENS_AT_ONCE = 4096  # of one forward pass of tuning
_TEMPORARIES = 10  # float32 values for each weight of a block of rows in the scale search
# Bytes for each weight of the layer that tuning makes from codes: values, scales, gradient and
# their products in float32, on a CPU also what a table's gradient is summed from.
_MADE = {"cpu": 32, "cuda": 20}
_HEAD_FEATURES = 64  # of an attention head, where config.json does not say how many there are
_ON_ITS_WAY = "whole model on its way to the GPU"


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

    Tuning at the end of a recipe is not among them, as it is left out where it does not fit:
    :func:`tuning_parts`.

    Args:
        checkpoint, plan, settings: of the run.
        device: "cpu" or "cuda".
    """
    phases = []
    if settings.bpw is not None:
        phases.append(_measuring_parts(checkpoint, plan, device))
    has_text = plan.recipe.needs != "nothing" and settings.calib != "none"
    if has_text and plan.recipe.needs == "gradients":
        phases.append(_trained_parts(checkpoint, plan, settings, device))
    is_run = has_text and plan.recipe.needs != "gradients"
    copied = [checkpoint.tensors[n].nbytes for unit in plan.units for n in unit.copied]
    phases.append([
        Part("largest tensor that is only copied", max(copied, default=0), False),
        _group_part(checkpoint, plan, device, has_hessian=is_run),
        *(_calibrated_parts(checkpoint, plan, settings, device) if is_run else ()),
    ])  # fmt: skip
    return _worst(phases, device)


def memory_totals(parts: list[Part], device: str) -> tuple[int, int]:
    """(host, device) bytes; everything is host memory on a CPU."""
    on_device = sum(part.nbytes for part in parts if part.is_on_device)
    on_host = sum(part.nbytes for part in parts if not part.is_on_device) + OVERHEAD[device]
    return (on_host + on_device, 0) if device == "cpu" else (on_host, on_device + OVERHEAD[device])


def _worst(phases: list[list[Part]], device: str) -> list[Part]:
    """Parts of the phase that needs most; on a GPU, host and device each have a worst of theirs."""
    if device == "cpu":
        return max(phases, key=lambda parts: sum(part.nbytes for part in parts))
    return [
        part
        for place in (False, True)
        for part in max(
            ([part for part in parts if part.is_on_device == place] for parts in phases),
            key=lambda parts: sum(part.nbytes for part in parts),
        )
    ]


def _group_part(checkpoint: Checkpoint, plan: Plan, device: str, has_hessian: bool) -> Part:
    temporaries = _TEMPORARIES * 4 * BLOCK_WEIGHTS[device]
    stored = max(checkpoint.tensors[f"{module}.weight"].dtype.itemsize for module in plan.specs)

    def peak(shape: tuple[int, int]) -> int:
        """Of the phase that needs most: search, error feedback, or descent and refits.

        A moment has 4 columns**2 bytes, of which two are always there; a weight takes what it is
        stored in, a byte of codes, and 4 for each float32 copy.
        """
        square, weights = shape[1] ** 2, shape[0] * shape[1]
        codes = (stored + 1) * weights
        if not has_hessian:
            return codes + temporaries
        search = 8 * square + codes + temporaries
        feedback = 20 * square + codes + 6 * weights  # permuted, factor, inverse; the remainder
        descent = 12 * square + codes + 12 * weights + 8 * SYSTEM_VALUES
        return max(search, feedback, descent)

    rows, columns = max((_shape(plan, g) for unit in plan.units for g in unit.groups), key=peak)
    what = "weights, codes, moments, factors of the Hessian" if has_hessian else (
        "weights, codes, blocks of rows of the scale search"
    )  # fmt: skip
    return Part(f"largest group, {rows} x {columns}: {what}", peak((rows, columns)), True)


def _measuring_parts(checkpoint: Checkpoint, plan: Plan, device: str) -> list[Part]:
    model = _parameters(checkpoint) * _itemsize(device)
    rows, columns = max((_shape(plan, g) for unit in plan.units for g in unit.groups),
                        key=lambda shape: shape[0] * shape[1])  # fmt: skip
    return [
        Part(f"whole model, {8 * _itemsize(device)} bits, while --bpw measures", model, True),
        Part("log-probabilities of its tokens, dense and found, float32",
             5 * 4 * MEASURED_TOKENS * _vocabulary(checkpoint), True),
        Part(f"largest group, {rows} x {columns}: as it was, codes and rounded",
             (_itemsize(device) + 9) * rows * columns, True),
        *([Part(_ON_ITS_WAY, model, False)] if device != "cpu" else ()),
    ]  # fmt: skip


def _trained_parts(
    checkpoint: Checkpoint, plan: Plan, settings: QuantizeSettings, device: str
) -> list[Part]:
    _, length = _windows(checkpoint, plan, settings)
    model = _parameters(checkpoint) * _itemsize(device)
    block = max(sum(torch.Size(plan.shapes[m]).numel() for m in unit.modules)
                for unit in plan.units)  # fmt: skip
    return [
        Part(f"whole model, {8 * _itemsize(device)} bits", model, True),
        Part("scales with Adam's state, float32", 16 * _scales(plan), True),
        Part("weights that the scales of one block mean, float32", 12 * block, True),
        Part(f"logits of {length} tokens and their gradients, float32",
             16 * length * _vocabulary(checkpoint), True),
        *([Part(_ON_ITS_WAY, model, False)] if device != "cpu" else ()),
    ]  # fmt: skip


def _calibrated_parts(
    checkpoint: Checkpoint, plan: Plan, settings: QuantizeSettings, device: str
) -> list[Part]:
    is_sequential = plan.recipe.propagation == "sequential"
    samples, length = _windows(checkpoint, plan, settings)
    widths = {group: _shape(plan, group)[1] for unit in plan.units for group in unit.groups}
    widest = max(widths.values())
    hidden = _text(checkpoint).get("hidden_size", widest)
    paths = 2 if is_sequential else 1
    stored = {i.dtype for i in checkpoint.tensors.values() if i.dtype.is_floating_point}
    itemsize = 4 if stored == {torch.float32} else _itemsize(device)  # as BlockRunner decides
    # Every block is run, also one whose modules stay dense.
    inside = [unit for unit in plan.units if unit.name != OUTSIDE]
    block = itemsize * max((_values(checkpoint, unit) for unit in inside), default=0)
    moments = max(sum(widths[g] ** 2 for g in unit.groups) for unit in plan.units if unit.groups)
    held = 3 * widest**2 if is_sequential else 2 * moments
    activations = samples * length * hidden * itemsize
    return [
        # A block is run for the last time: what went in, and what came out in parts and as one.
        Part(f"activations, {samples} x {length} x {hidden}, {8 * itemsize} bits",
             (paths + 2) * activations, False),
        Part("second moments of the inputs, float32", 4 * held, False),
        Part(f"decoder block, {8 * itemsize} bits" + (", twice" if is_sequential else ""),
             paths * block, True),
    ]  # fmt: skip


def tuning_parts(checkpoint: Checkpoint, plan: Plan, length: int, device: str) -> list[Part]:
    """What tuning scales and tables of the whole model needs, roughly; see ``finetune``.

    Of a block's activations those are counted that linear layers read and write and that
    attention weighs tokens with; where blocks are run again for the gradients, of one block.

    Args:
        checkpoint, plan: of the run, whose recipe tunes.
        length: tokens of a window.
        device: "cpu" or "cuda".
    """
    itemsize = tuning_dtype(checkpoint, device).itemsize
    model = _parameters(checkpoint) * itemsize
    judged, learnt = (max(1, tokens // length) * length for tokens in (
        TOKENS_AT_ONCE, min(TOKENS_AT_ONCE, plan.recipe.finetuning.tokens)
    ))  # fmt: skip
    text = _text(checkpoint)
    hidden = text.get("hidden_size", max(columns for _, columns in plan.shapes.values()))
    attention = 2 * text.get("num_attention_heads", hidden // _HEAD_FEATURES) * length
    blocks = [
        attention + sum(_shape(plan, g)[0] + _shape(plan, g)[1] for g in unit.groups)
        for unit in plan.units if unit.name != OUTSIDE
    ]  # fmt: skip
    is_again = is_run_again(checkpoint)
    kept = len(blocks) * hidden + max(blocks, default=0) if is_again else sum(blocks)
    # Of both models, and what a divergence is summed from; of a step also gradients.
    logits = _vocabulary(checkpoint) * 4
    passed = max(5 * logits * judged, 7 * logits * learnt + itemsize * kept * learnt)
    rows, columns = max(map(plan.shapes.__getitem__, plan.specs), key=lambda s: s[0] * s[1])
    return [
        Part(f"whole model, {8 * itemsize} bits", model, True),
        Part("its codes", plan.weights, True),
        Part("scales, factors, gradients and Adam's state, float32", 20 * _scales(plan), True),
        Part(f"largest layer made from codes, {rows} x {columns}", _MADE[device] * rows * columns,
             True),
        Part(f"logits of {judged} tokens, or, of {learnt}, with gradients and activations", passed,
             True),
        *([Part(_ON_ITS_WAY, model, False)] if device != "cpu" else ()),
    ]  # fmt: skip


def tuning_dtype(checkpoint: Checkpoint, device: str) -> torch.dtype:
    """Of the weights of a model that is tuned."""
    is_narrow = is_run_again(checkpoint) and device != "cpu"
    return torch.bfloat16 if is_narrow else torch.float32


def is_run_again(checkpoint: Checkpoint) -> bool:
    """Whether a model is so large that tuning runs blocks again for their gradients."""
    return _parameters(checkpoint) > FLOAT32_PARAMETERS


def _parameters(checkpoint: Checkpoint) -> int:
    return sum(torch.Size(info.shape).numel() for info in checkpoint.tensors.values())


def _itemsize(device: str) -> int:
    """Of a weight of a model that is run: float32 on a CPU, 16 bits elsewhere."""
    return 4 if device == "cpu" else 2


def _text(checkpoint: Checkpoint) -> dict[str, Any]:
    return checkpoint.config.get("text_config", checkpoint.config)


def _vocabulary(checkpoint: Checkpoint) -> int:
    largest = max(info.shape[0] for info in checkpoint.tensors.values() if len(info.shape) == 2)
    return _text(checkpoint).get("vocab_size", largest)


def _windows(checkpoint: Checkpoint, plan: Plan, settings: QuantizeSettings) -> tuple[int, int]:
    """Windows of text and tokens in each."""
    samples = settings.samples or plan.recipe.calibration.samples
    return samples, window_length(checkpoint, plan, settings)


def window_length(checkpoint: Checkpoint, plan: Plan, settings: QuantizeSettings) -> int:
    """Tokens of a window of calibration text, if the text is long enough."""
    length = settings.length or plan.recipe.calibration.length
    return min(length, _text(checkpoint).get("max_position_embeddings") or length)


def _scales(plan: Plan) -> int:
    return sum(spec.num_groups(plan.shapes[m][1]) * plan.shapes[m][0]
               for m, spec in plan.specs.items())  # fmt: skip


def _shape(plan: Plan, group: tuple[str, ...]) -> tuple[int, int]:
    return sum(plan.shapes[module][0] for module in group), plan.shapes[group[0]][1]


def _values(checkpoint: Checkpoint, unit: Unit) -> int:
    names = (*unit.copied, *(f"{module}.weight" for module in unit.modules))
    return sum(torch.Size(checkpoint.tensors[name].shape).numel() for name in names)
