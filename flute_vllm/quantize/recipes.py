"""Recipes: lists of steps, as data in ``configs/recipes``, and the loop that runs one.

A step is ``f(weight, statistics, state, **options) -> state``. After each step the result is
judged on what the step did not see (held-out activations where there are any) and dropped when
it is worse: layer errors that fall on calibration data may rise elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flute_vllm.checkpoint import read_json
from flute_vllm.errors import FluteError
from flute_vllm.quantize.feedback import descend, error_feedback
from flute_vllm.quantize.lloyd import as_pairs, learn_pairs, learn_table
from flute_vllm.quantize.refit import refit_scales, refit_table
from flute_vllm.quantize.rounding import absmax, search
from flute_vllm.quantize.state import State, Statistics, energy, relative_error
from flute_vllm.resources import data_path

STEPS: dict[str, Callable[..., State]] = {
    step.__name__: step
    for step in (
        absmax, search, learn_table, learn_pairs,
        error_feedback, descend, refit_scales, refit_table,
    )
}  # fmt: skip
NEED_HESSIAN = {"error_feedback", "descend", "refit_scales", "refit_table"}


class Calibration(BaseModel):
    """How much a recipe reads: ``samples`` windows of ``length`` tokens.

    ``prior`` is added to the diagonal of the mean-normalised Hessian: how little random tokens
    are trusted to say what text does.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples: int = Field(default=128, ge=2)
    length: int = Field(default=2048, ge=8)
    heldout_share: float = Field(default=0.125, gt=0, lt=1)
    prior: float = Field(default=0.0, ge=0)


class Training(BaseModel):
    """How scales are trained: Adam's rate, and how often each window is seen."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rate: float = Field(default=1e-4, gt=0)
    epochs: int = Field(default=1, ge=1)


class Finetuning(BaseModel):
    """How scales and tables are tuned for the whole model once every block is quantized.

    Attributes:
        rate: Adam's, of the factors on the scales.
        table_rate: of table values, the largest of which begins near 1.
        epochs: how often each window is seen.
        tokens: of one step.
        text: share of the text's own loss that is added to the KL divergence. More than a little
            fits the model to the text (benchmarks/NOTES.md).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rate: float = Field(default=3e-3, gt=0)
    table_rate: float = Field(default=7.5e-4, gt=0)
    epochs: int = Field(default=4, ge=1)
    tokens: int = Field(default=2048, ge=1)
    text: float = Field(default=0.03, ge=0)


class Recipe(BaseModel):
    """One file of ``configs/recipes``.

    ``needs`` "random tokens" is activations without any text: tokens are drawn from the
    vocabulary. ``propagation`` says what a matrix sees: "dense": the inputs that it has in the
    dense model; "block": the input of a block is that of the quantized blocks before it;
    "sequential": matrices before it in its block are quantized too, and its target is the output
    of the dense model (arXiv 2504.02692).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    summary: str
    needs: Literal["nothing", "random tokens", "activations", "gradients"]
    steps: tuple[dict[str, Any], ...]
    calibration: Calibration = Calibration()
    training: Training | None = None
    finetuning: Finetuning | None = None
    propagation: Literal["dense", "block", "sequential"] = "block"


@dataclass(frozen=True)
class Trace:
    """What one step did: its error on held-out data (on the weights, without data)."""

    step: str
    error: float
    is_kept: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in data_path("configs", "recipes").glob("*.json"))


def load_recipe(name: str) -> Recipe:
    """A shipped recipe by name, or one from a file that ends in ``.json``. Raises FluteError."""
    path = Path(name) if name.endswith(".json") else None
    if path is None:
        if name not in recipe_names():
            raise FluteError(
                f"unknown recipe {name!r}",
                where="--recipe",
                why=f"there are {', '.join(recipe_names())}",
                fix="choose one of them, or pass a JSON file like those in configs/recipes",
            )
        path = data_path("configs", "recipes", f"{name}.json")
    try:
        recipe = Recipe.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise _bad_recipe(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    for call in recipe.steps:
        if call.get("step") not in STEPS:
            raise _bad_recipe(path, f"unknown step {call.get('step')!r}; steps: {', '.join(STEPS)}")
    if not recipe.steps or recipe.steps[0]["step"] not in ("absmax", "search"):
        raise _bad_recipe(path, "the first step must be absmax or search, which choose codes")
    return recipe


def _bad_recipe(path: Path, why: str) -> FluteError:
    return FluteError(
        "unusable recipe", where=str(path), why=why,
        fix="compare it with configs/recipes/fast.json",
    )  # fmt: skip


def run_recipe(
    recipe: Recipe,
    weight: torch.Tensor,
    statistics: Statistics,
    start: State,
    wants_pairs: bool = False,
) -> tuple[State, list[Trace]]:
    """Runs the steps one after another and keeps each result that is not worse.

    Args:
        recipe: its ``steps`` are run in order; those that need a Hessian are left out without one.
        weight: floating [N, K], finite, on the device of the statistics.
        statistics: of the input; empty without calibration.
        start: table and spec, no codes.
        wants_pairs: the result is stored with a pair table, learned by the step ``learn_pairs``,
            which is left out otherwise.

    Returns:
        The best state and what each step did, in order.

    Raises:
        FluteError: a scale beyond the range of its dtype, an unusable Hessian.
    """
    judge = statistics.heldout if statistics.heldout is not None else statistics.hessian
    whole = energy(weight, judge)
    state, best, traces = start, float("inf"), []
    for call in recipe.steps:
        options = {key: value for key, value in call.items() if key != "step"}
        name = call["step"]
        if name in NEED_HESSIAN and statistics.hessian is None:
            continue
        if name == learn_pairs.__name__ and not wants_pairs:
            continue
        found = STEPS[name](weight, statistics, state, **options)
        error = relative_error(weight, found, judge, whole=whole)
        is_kept = error <= best or state.codes is None
        if is_kept:
            state, best = found, error
        elif name == learn_pairs.__name__:
            state = as_pairs(state)
        traces.append(Trace(name, error, is_kept))
    return state, traces
