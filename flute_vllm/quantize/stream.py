"""Calibration activations on their way through the model, from block to block.

After a block is quantized its outputs are the inputs of the next one. They are kept on disk beside
the finished files: recomputing them after a crash would repeat all work up to there, and hardly
ever bit for bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from flute_vllm.checkpoint import Checkpoint
from flute_vllm.quantize.activations import not_run, observe
from flute_vllm.quantize.blocks import BlockRunner, NotRunnable
from flute_vllm.quantize.calibration import NONE, RANDOM, Windows, cut, draw
from flute_vllm.quantize.journal import SCRATCH
from flute_vllm.quantize.plan import OUTSIDE, Plan, QuantizeSettings, Unit
from flute_vllm.quantize.recipes import Calibration
from flute_vllm.quantize.state import State, Statistics
from flute_vllm.quantize.tensor import load_group
from flute_vllm.writer import fsync, writing

logger = logging.getLogger(__name__)
_PROBED_TOKENS = 64  # of a window, to see whether a model runs at all
# make(group, weight, statistics, target): weight as stored, target in place of it if not None
Make = Callable[[tuple[str, ...], torch.Tensor, Statistics, torch.Tensor | None], State]


class ActivationStream:
    """Windows of calibration text as hidden states before the next block to quantize.

    ``hidden`` [windows, length, hidden] are those of the quantized model so far; with propagation
    "sequential", ``dense`` are those of the original model at the same place.
    """

    def __init__(
        self, checkpoint: Checkpoint, plan: Plan, windows: Windows, device: torch.device
    ) -> None:
        self.checkpoint, self.plan, self.windows, self.device = checkpoint, plan, windows, device
        self.is_sequential = plan.recipe.propagation == "sequential"
        self.is_dense = plan.recipe.propagation == "dense"
        self.runner = BlockRunner(checkpoint, device)
        self.runner.check_names()
        self._names: list[str] = []
        self._next = 0

    def start(self, folder: Path, names: Sequence[str], left: Sequence[Unit]) -> None:
        """Runs the embeddings, or takes up the activations that an earlier run left."""
        self._folder, self._names = folder, list(names)
        embedded = self.runner.embed(self.windows.ids)
        self._next = len(names) - len(left)
        is_read = any(unit.groups for unit in left)
        if self._next == 0 or not is_read:
            self.hidden, self.dense = embedded, embedded
            return
        stored = load_file(self._path(self._next))
        self.hidden = stored["hidden"]
        self.dense = stored.get("dense", self.hidden)

    def quantize_block(self, unit: Unit, make: Make) -> None:
        """Quantizes the groups of a block with ``make`` and moves the activations past it."""
        index, heldout = self._next, self.windows.heldout
        leaf = {module: module.removeprefix(f"{unit.name}.") for module in unit.modules}
        with self.runner.block(index) as block:
            if self.is_sequential:
                with self.runner.block(index) as dense:
                    for group in self._in_order(block, index, unit, leaf):
                        first = leaf[group[0]]
                        moments = observe(
                            self.runner, index, block, self.hidden, heldout, [first], dense,
                            self.dense,
                        )  # fmt: skip
                        weight = load_group(self.checkpoint, group, self.plan.specs, self.device)
                        target = moments.target(first, weight)
                        state = make(group, weight, moments.statistics(first), target)
                        self._put(block, group, leaf, state)
                    self.dense = torch.cat(list(self.runner.run(dense, index, self.dense)))
            else:
                firsts = [leaf[group[0]] for group in unit.groups]
                outputs: list[torch.Tensor] = []
                moments = observe(
                    self.runner, index, block, self.hidden, heldout, firsts,
                    prior=self.windows.prior, outputs=outputs if self.is_dense else None,
                )  # fmt: skip
                for group in unit.groups:
                    statistics = moments.statistics(leaf[group[0]])
                    state = make(
                        group,
                        load_group(self.checkpoint, group, self.plan.specs, self.device),
                        statistics,
                        None,
                    )
                    self._put(block, group, leaf, state)
            if self.is_dense:
                self.hidden = torch.cat(outputs)
            else:
                self.hidden = torch.cat(list(self.runner.run(block, index, self.hidden)))
        self._next += 1

    def quantize_head(self, unit: Unit, make: Make) -> None:
        """Quantizes the groups outside the blocks, all of which read what follows the last one."""
        for group in unit.groups:
            with self.runner.tails(2 if self.is_sequential else 1) as tails:
                moments = observe(
                    self.runner, self._next, tails[0], self.hidden, self.windows.heldout, ["head"],
                    *((tails[1], self.dense) if self.is_sequential else ()),
                    prior=0.0 if self.is_sequential else self.windows.prior,
                )  # fmt: skip
            weight = load_group(self.checkpoint, group, self.plan.specs, self.device)
            target = moments.target("head", weight) if self.is_sequential else None
            make(group, weight, moments.statistics("head"), target)
        self._next += 1

    @property
    def _has_head(self) -> bool:
        return any(unit.groups for unit in self.plan.units if unit.name == OUTSIDE)

    def _in_order(
        self, block: torch.nn.Module, index: int, unit: Unit, leaf: dict[str, str]
    ) -> list[tuple[str, ...]]:
        """The groups in the order in which the block runs them."""
        by_leaf = {leaf[group[0]]: group for group in unit.groups}
        seen: dict[str, None] = {}
        hooks = [
            block.get_submodule(name).register_forward_pre_hook(
                lambda _module, _args, name=name: seen.setdefault(name)
            )
            for name in by_leaf
        ]
        with torch.no_grad():
            next(self.runner.run(block, index, self.hidden[: self.runner.batch]))
        for hook in hooks:
            hook.remove()
        if len(seen) < len(by_leaf):
            raise not_run(next(name for name in by_leaf if name not in seen))
        return [by_leaf[name] for name in seen]

    def _put(
        self, block: torch.nn.Module, group: tuple[str, ...], leaf: dict[str, str], state: State
    ) -> None:
        """Gives the modules of a group their quantized weights."""
        first = 0
        for module in group:
            linear = block.get_submodule(leaf[module])
            rows = slice(first, first + linear.out_features)
            linear.weight.data = state.dense(rows).to(linear.weight.dtype)
            first = rows.stop

    def save(self) -> None:
        """Writes the activations before the next block to a file of their own."""
        if self._next >= len(self.runner.blocks) + self._has_head:
            return  # nothing follows that reads them
        tensors = {"hidden": self.hidden}
        if self.is_sequential:
            tensors["dense"] = self.dense
        path = self._path(self._next)
        with writing(path):
            save_file(tensors, path)
            fsync(path)

    def forget_before(self, unit: str) -> None:
        """Removes what no rerun needs once a unit is in the journal.

        The activations that led to the unit itself stay: a journal whose last line is lost means
        that the unit is made again.
        """
        path = self._path(self._names.index(unit) - 1)
        with writing(path):
            path.unlink(missing_ok=True)

    def _path(self, index: int) -> Path:
        return self._folder / f"{SCRATCH}{index:05}.safetensors"


def open_windows(checkpoint: Checkpoint, plan: Plan, settings: QuantizeSettings) -> Windows | None:
    """The calibration windows of a run; None for a recipe without data or, warned of, no text."""
    if plan.recipe.needs == "nothing":
        return None
    if settings.calib == NONE:
        logger.warning(
            "flute: recipe %s runs without calibration (--calib none): only its data-free steps "
            "are left", plan.recipe.name,
        )  # fmt: skip
        return None
    wanted = plan.recipe.calibration.model_copy(
        update={k: v for k in ("samples", "length") if (v := getattr(settings, k)) is not None}
    )
    text = checkpoint.config.get("text_config", checkpoint.config)
    longest = text.get("max_position_embeddings")
    if plan.recipe.needs == RANDOM:
        return draw(checkpoint, wanted, longest, settings.seed)
    return cut(checkpoint, settings.calib, wanted, longest, settings.seed)


def open_stream(
    checkpoint: Checkpoint, plan: Plan, windows: Windows | None, device: torch.device
) -> ActivationStream | None:
    """The stream of a recipe that reads activations; None for others.

    Raises:
        FluteError: the architecture cannot be run block by block. A recipe that reads random
            tokens goes on without them, told so by a warning: it promises to need no data.
    """
    if windows is None or plan.recipe.needs not in (RANDOM, "activations"):
        return None
    try:
        stream = ActivationStream(checkpoint, plan, windows, device)
        stream.runner.probe(windows.ids[:2, :_PROBED_TOKENS])
        return stream
    except NotRunnable as error:
        if plan.recipe.needs != RANDOM:
            raise
        logger.warning(
            "flute: recipe %s rounds to nearest here, without the second moments of random tokens: "
            "%s", plan.recipe.name, error.why,
        )  # fmt: skip
        return None


def measuring_windows(
    checkpoint: Checkpoint, wanted: Calibration, settings: QuantizeSettings
) -> torch.Tensor:
    """int64 [windows, length]: text, or random tokens with ``--calib none``, to measure losses."""
    text = checkpoint.config.get("text_config", checkpoint.config)
    longest = text.get("max_position_embeddings")
    if settings.calib == NONE:
        return draw(checkpoint, wanted, longest, settings.seed).ids
    return cut(checkpoint, settings.calib, wanted, longest, settings.seed).ids
