"""Which bits, group size and kind of table each group of modules gets, for ``--bpw``.

The loss of a model is close to linear in the relative errors of its layers (the linearity theorem
of HIGGS, arXiv 2411.17525), so it is enough to know what an error costs in each group
(:mod:`flute_vllm.quantize.sensitivity`) and what error each option makes
(``configs/allocation.json``). Bits then go where they buy most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flute_vllm.checkpoint import read_json
from flute_vllm.errors import FluteError
from flute_vllm.format import LayerSpec
from flute_vllm.resources import data_path

Group = tuple[str, ...]


@dataclass(frozen=True)
class Option:
    """A way to store a group, and the relative squared error that it makes on Gaussian weights."""

    bits: int
    group_size: int
    table_kind: str
    error: float

    def spec(self, like: LayerSpec) -> LayerSpec:
        return like.with_changes(
            bits=self.bits, group_size=self.group_size, table_kind=self.table_kind
        )


def shipped_options() -> list[Option]:
    """The options of ``configs/allocation.json``."""
    return [Option(**entry) for entry in read_json(data_path("configs", "allocation.json"))["rows"]]


def error_of(spec: LayerSpec, options: Sequence[Option]) -> float:
    """The error of a spec, or of the option of its bits whose group size is nearest."""
    same = [o for o in options if o.bits == spec.bits]
    wanted = (spec.table_kind, spec.group_size)
    return min(same, key=lambda o: (o.table_kind != wanted[0], abs(o.group_size - wanted[1]))).error


def allocate(
    shapes: Mapping[Group, Sequence[tuple[int, int]]],
    losses: Mapping[Group, float],
    base: LayerSpec,
    options: Sequence[Option],
    budget: float,
) -> dict[Group, LayerSpec]:
    """The spec of each group: least sum of predicted losses within ``budget`` bits in all.

    Greedy: each group starts with its cheapest option; the step that lowers the loss most for
    each bit is taken again and again while it fits. The last steps may not fit well, so the
    result is compared with ``base`` for all groups, where that fits.

    Args:
        shapes: [N, K] of the modules of each group.
        losses: of the model when only this group is quantized, as ``base``.
        base: spec in which the losses were measured.
        options: to choose from; those whose group size does not divide K are left out.
        budget: bits of all codes, scales and tables.

    Raises:
        FluteError: the cheapest options do not fit, or none does.
    """
    unit = error_of(base, options)
    choices = {group: _choices(group, shapes[group], base, options) for group in shapes}
    chosen = {group: 0 for group in shapes}
    left = budget - sum(choices[group][0][0] for group in shapes)
    if left < 0:
        weights = sum(n * k for parts in shapes.values() for n, k in parts)
        raise FluteError(
            "too few bits per weight", where="--bpw",
            why=f"{budget / weights:.4f} asked for, the smallest options take "
            f"{(budget - left) / weights:.4f}",
            fix="ask for more, or leave --bpw out",
        )  # fmt: skip
    while True:
        best: tuple[float, Group, int] | None = None
        for group, at in chosen.items():
            bits, error, _ = choices[group][at]
            for place in range(at + 1, len(choices[group])):
                more_bits, less_error, _ = choices[group][place]
                cost = more_bits - bits
                if cost > left:
                    break
                rate = losses[group] / unit * (error - less_error) / cost
                if best is None or rate > best[0]:
                    best = (rate, group, place)
        if best is None:
            break
        _, group, place = best
        left -= choices[group][place][0] - choices[group][chosen[group]][0]
        chosen[group] = place
    predicted = sum(losses[group] * choices[group][at][1] for group, at in chosen.items())
    alike = sum(_stored_bits(base, parts) for parts in shapes.values())
    if alike <= budget and unit * sum(losses[group] for group in shapes) <= predicted:
        return dict.fromkeys(shapes, base)
    return {group: choices[group][at][2] for group, at in chosen.items()}


def _stored_bits(spec: LayerSpec, parts: Sequence[tuple[int, int]]) -> float:
    return sum(spec.bits_per_weight(n, k) * n * k for n, k in parts)


def _choices(
    group: Group, parts: Sequence[tuple[int, int]], base: LayerSpec, options: Sequence[Option]
) -> list[tuple[float, float, LayerSpec]]:
    """(bits, error, spec) of a group's options, dearer ones only where they err less."""
    found = []
    for option in options:
        spec = option.spec(base)
        if any(k % option.group_size for _, k in parts):
            continue
        found.append((_stored_bits(spec, parts), option.error, spec))
    if not found:
        raise FluteError(
            "no option fits this module", where=group[0],
            why=f"no group size of configs/allocation.json divides in_features {parts[0][1]}",
            fix="leave it dense with --skip, or give its bits with --override",
        )  # fmt: skip
    found.sort(key=lambda choice: choice[:2])
    kept = found[:1]
    for choice in found[1:]:
        if choice[1] < kept[-1][1]:
            kept.append(choice)
    return kept
