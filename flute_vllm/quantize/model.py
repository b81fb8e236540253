"""Quantizes a whole checkpoint, one decoder block at a time, and survives being stopped.

First everything is decided from headers (:mod:`flute_vllm.quantize.plan`). Then each unit (a
block, or what lies outside the blocks) is read, quantized and written to a file of its own, and
noted in the journal; a run that finds a journal goes on where it ends. Memory: one block.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from flute_vllm import __version__
from flute_vllm.checkpoint import Checkpoint, read_json
from flute_vllm.errors import FluteError
from flute_vllm.format import TENSOR_NAMES, unpack
from flute_vllm.quantize.allocate import allocate, shipped_options
from flute_vllm.quantize.calibration import Windows
from flute_vllm.quantize.finetune import load_or_tune, tune_scales
from flute_vllm.quantize.journal import SCRATCH, JournalFolder, source_fingerprint
from flute_vllm.quantize.learned import load_or_train, train_scales, with_scales
from flute_vllm.quantize.plan import OUTSIDE, Plan, QuantizeSettings, Unit, plan_checkpoint
from flute_vllm.quantize.recipes import Trace, run_recipe
from flute_vllm.quantize.report import (
    ModuleReport,
    after_tuning,
    make_card,
    make_report,
    model_name,
)
from flute_vllm.quantize.sensitivity import load_or_measure, measure_losses
from flute_vllm.quantize.state import State, Statistics, relative_error
from flute_vllm.quantize.stream import (
    ActivationStream,
    measuring_windows,
    open_stream,
    open_windows,
)
from flute_vllm.quantize.tensor import load_group, start_state
from flute_vllm.schema import module_matches
from flute_vllm.validate import validate_checkpoint
from flute_vllm.writer import ShardWriter, file_nbytes, replace_tensors

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Callbacks:
    """Called with progress: the plan; units that an earlier run did; a training step (its
    number, of how many, the loss); a module just done."""

    on_plan: Callable[[Plan], None] = lambda plan: None
    on_resume: Callable[[Plan, list[str]], None] = lambda plan, units: None
    on_training: Callable[[int, int, float], None] = lambda step, steps, loss: None
    on_module: Callable[[ModuleReport, Unit], None] = lambda report, unit: None


def quantize_checkpoint(
    source: str | Path,
    out: str | Path,
    settings: QuantizeSettings | None = None,
    callbacks: Callbacks | None = None,
    restart: bool = False,
    host_limit: int | None = None,
) -> dict[str, Any]:
    """Writes the quantized checkpoint and returns the content of its report.json.

    Args:
        source: folder with config.json and dense safetensors.
        out: folder that does not exist yet; it appears complete or not at all. What a stopped
            run left in ``<out>.partial`` is taken up.
        settings: defaults are recipe ``fast``, 4 bits, groups of 64.
        callbacks: called with progress.
        restart: begin anew instead.
        host_limit: bytes of host memory beyond which the tuning at the end is left out, with a
            WARNING; None: as much as is free then. What comes before keeps to no limit.

    Raises:
        FluteError: an unusable source or setting, other settings than those of the run to be
            resumed, a weight that is not finite, a full disk.
    """
    settings = settings or QuantizeSettings()
    callbacks = callbacks or Callbacks()
    checkpoint = Checkpoint(source)
    device = choose_device(settings.device)
    plan = plan_checkpoint(checkpoint, settings)
    windows = open_windows(checkpoint, plan, settings)
    stream = open_stream(checkpoint, plan, windows, device)
    is_read = stream is not None or plan.recipe.needs == "gradients"
    calibration = windows.origin if windows is not None and is_read else None
    fingerprint = {
        **settings.to_json(),
        "device": device.type,
        "recipe content": plan.recipe.model_dump(mode="json"),
        "tables": {str(bits): book.values.tolist() for bits, book in plan.codebooks.items()},
        "calibration text": calibration,
        "flute_vllm": __version__,
        **source_fingerprint(checkpoint),
    }
    if not restart and JournalFolder.finish(out, fingerprint):
        return read_json(Path(out) / "report.json")
    folder = JournalFolder(out, fingerprint, restart)
    for note in plan.notes:
        logger.warning("%s", note)
    trained: dict[str, torch.Tensor] = {}
    with folder:
        if settings.bpw is not None:
            plan = _allocated(folder, checkpoint, plan, settings, device)
            if stream is not None:
                stream.plan = plan
        callbacks.on_plan(plan)
        left = [unit for unit in plan.units if unit.name not in folder.done]
        if folder.done:
            callbacks.on_resume(plan, list(folder.done))
        weights = sum(file_nbytes(unit.layout) for unit in left)
        folder.reserve(weights, _scratch_nbytes(folder, stream, left))
        if windows is not None and plan.recipe.training is not None and left:
            trained = load_or_train(
                folder.partial / f"{SCRATCH}scales.safetensors",
                lambda: train_scales(
                    checkpoint.folder, plan, windows, plan.recipe.training, device,
                    callbacks.on_training,
                ),
            )  # fmt: skip
        if stream is not None:
            stream.start(folder.partial, [unit.name for unit in plan.units], left)
        for unit in left:
            reports = _make_unit(unit, folder, checkpoint, plan, stream, trained, device, callbacks)
            folder.record(unit.name, unit.file, modules=[asdict(report) for report in reports])
            if stream is not None:
                stream.forget_before(unit.name)
        tensors, measured = _tune(
            folder, checkpoint, plan, windows, device, callbacks, host_limit
        )  # fmt: skip
        for unit in plan.units:
            folder.count_shard(unit.file, unit.layout)
        modules = [m for unit in plan.units for m in folder.done[unit.name]["modules"]]
        errors = _errors_after(tensors, folder, checkpoint, plan, device)
        modules = [after_tuning(m, errors[m["module"]]) if m["module"] in errors else m
                   for m in modules]  # fmt: skip
        report = make_report(plan, settings, modules, checkpoint, calibration)
        if measured is not None:
            report["finetuning"] = measured
        folder.copy_extras(checkpoint.folder)
        folder.write_json("report.json", report)
        card = make_card(report, checkpoint.folder, model_name(checkpoint.folder))
        folder.write_text("README.md", card)
        folder.write_index_and_config(
            {**checkpoint.config, "quantization_config": plan.config.to_json()}
        )
        _check_readable(folder)
        folder.publish()
    return report


def _check_readable(folder: JournalFolder) -> None:
    """Whatever reads our checkpoints must take this one, before it is one."""
    try:
        validate_checkpoint(Checkpoint(folder.partial))
    except FluteError:
        folder.withdraw_config()
        raise


def _tune(
    folder: JournalFolder,
    checkpoint: Checkpoint,
    plan: Plan,
    windows: Windows | None,
    device: torch.device,
    callbacks: Callbacks,
    host_limit: int | None,
) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """Replaces scales and tables in the finished files by tuned ones, if the recipe tunes.

    Returns:
        The tensors that were replaced, by name, and what was measured; None without tuning.
    """
    tuning = plan.recipe.finetuning
    if tuning is None or windows is None:
        return {}, None
    tensors, measured = load_or_tune(
        folder.partial / f"{SCRATCH}tuned.safetensors",
        lambda: tune_scales(
            checkpoint.folder, folder.partial, plan, windows, tuning, device,
            callbacks.on_training, host_limit,
        ),
    )  # fmt: skip
    for unit in plan.units:
        found = {name: tensors[name] for name in unit.layout if name in tensors}
        replace_tensors(folder.partial / unit.file, unit.layout, found)
    return tensors, measured


def _errors_after(
    tensors: Mapping[str, torch.Tensor],
    folder: JournalFolder,
    checkpoint: Checkpoint,
    plan: Plan,
    device: torch.device,
) -> dict[str, float]:
    """Relative squared errors of the modules whose scales are among ``tensors``, from the files.

    One module is in memory at a time. A resumed run reads the same files, so the figures are the
    same.
    """
    errors = {}
    for unit in plan.units if tensors else ():
        with safe_open(folder.partial / unit.file, "pt", str(device)) as file:
            for module in unit.modules:
                if f"{module}.scales" not in tensors:
                    continue
                spec = plan.specs[module]
                codes, scales, table = (file.get_tensor(f"{module}.{suffix}")
                                        for suffix in TENSOR_NAMES)  # fmt: skip
                stored = State(spec, table.float(), True, module, scales, unpack(codes, spec.bits))
                weight = checkpoint.load(f"{module}.weight").to(device)
                errors[module] = relative_error(weight, stored)
    return errors


def _scratch_nbytes(
    folder: JournalFolder, stream: ActivationStream | None, left: Sequence[Unit]
) -> int:
    """Bytes of activations that will lie beside the weights at once, less those that do already.

    Before a unit is in the journal there are three files: of what it reads, of what the unit
    before it read, and of what follows it.
    """
    if stream is None:
        return 0
    saving = sum(1 for unit in left if unit.groups or unit.name != OUTSIDE) - 1  # all but the last
    there = [path.stat().st_size for path in folder.partial.glob(f"{SCRATCH}[0-9]*.safetensors")]
    model = stream.runner.model
    width = model.get_input_embeddings().weight.shape[1]
    hidden = getattr(model.config.get_text_config(), "hidden_size", width)
    value = stream.runner.dtype.itemsize * (2 if stream.is_sequential else 1)
    files = min(3, len(there) + max(0, saving))
    return max(0, files * stream.windows.ids.numel() * hidden * value - sum(there))


def _allocated(
    folder: JournalFolder,
    checkpoint: Checkpoint,
    plan: Plan,
    settings: QuantizeSettings,
    device: torch.device,
) -> Plan:
    """The plan with specs that fill ``settings.bpw``; the same again when resumed."""
    groups = [
        group for unit in plan.units for group in unit.groups
        if not any(module_matches(p, m) for p in settings.overrides for m in group)
    ]  # fmt: skip
    shapes = {group: [plan.shapes[module] for module in group] for group in groups}
    base = plan.config.default_spec()
    is_learned = not plan.codebooks[base.bits].is_fixed
    has_pairs = is_learned and any(c["step"] == "learn_pairs" for c in plan.recipe.steps)
    options = [o for o in shipped_options() if o.table_kind == "scalar" or has_pairs]
    wanted = plan.recipe.calibration.model_copy(update={"samples": 16, "length": 256})
    losses = load_or_measure(
        folder.partial / f"{SCRATCH}losses.json",
        lambda: measure_losses(
            checkpoint, groups, base, plan.codebooks[base.bits],
            measuring_windows(checkpoint, wanted, settings), device,
        ),
    )  # fmt: skip
    weights = sum(n * k for parts in shapes.values() for n, k in parts)
    found = allocate(shapes, losses, base, options, settings.bpw * weights)
    return plan_checkpoint(checkpoint, settings, {m: found[g] for g in groups for m in g})


def _make_unit(
    unit: Unit,
    folder: JournalFolder,
    checkpoint: Checkpoint,
    plan: Plan,
    stream: ActivationStream | None,
    trained: dict[str, torch.Tensor],
    device: torch.device,
    callbacks: Callbacks,
) -> list[ModuleReport]:
    """Writes the file of one unit; the reports of its modules."""
    reports: list[ModuleReport] = []

    def make(
        group: tuple[str, ...],
        weight: torch.Tensor,
        statistics: Statistics,
        target: torch.Tensor | None,
    ) -> State:
        scales = torch.cat([trained[module] for module in group]) if trained else None
        state, found = _quantize_group(group, weight, statistics, target, scales, plan, checkpoint)
        _write_group(shard, group, state, checkpoint)
        for report in found:
            reports.append(report)
            callbacks.on_module(report, unit)
        return state

    with folder.shard(unit.file, unit.layout) as shard:
        for name in unit.copied:
            shard.write(name, checkpoint.load(name))
        if stream is not None and unit.name != OUTSIDE:
            stream.quantize_block(unit, make)
        elif stream is not None:
            stream.quantize_head(unit, make)
        else:
            for group in unit.groups:
                make(group, load_group(checkpoint, group, plan.specs, device), Statistics(), None)
        # Before the file gets its name: a journalled unit has its activations on disk.
        if stream is not None:
            stream.save()
    return reports


def _quantize_group(
    group: tuple[str, ...],
    weight: torch.Tensor,
    statistics: Statistics,
    target: torch.Tensor | None,
    scales: torch.Tensor | None,
    plan: Plan,
    checkpoint: Checkpoint,
) -> tuple[State, list[ModuleReport]]:
    started = time.perf_counter()
    aim = weight if target is None else target
    spec = plan.specs[group[0]]
    codebook = plan.codebooks[spec.bits]
    # Pair tables that the user did not give are learned from a scalar one.
    wants_pairs = spec.table_kind == "pair" and codebook.table_kind == "scalar"
    begun = spec.with_changes(table_kind="scalar") if wants_pairs else spec
    start = start_state(begun, codebook.values.to(weight.device), codebook.is_fixed, group[0])
    if scales is None:
        state, traces = run_recipe(plan.recipe, aim, statistics, start, wants_pairs)
    else:  # trained for the loss of the model, so no error of a layer may overrule them
        state, traces = with_scales(weight, statistics, start, scales), []
    reports = []
    for module, rows in _rows(group, checkpoint):
        error = relative_error(weight, state, None, rows)
        judge = statistics.heldout
        output = None if judge is None else relative_error(aim, state, judge, rows)
        share = (rows.stop - rows.start) / weight.shape[0]
        reports.append(
            ModuleReport(
                module,
                spec.bits,
                spec.group_size,
                (rows.stop - rows.start) * weight.shape[1],
                error,
                output,
                [_brief(trace) for trace in traces],
                share * (time.perf_counter() - started),
            )  # fmt: skip
        )
    return state, reports


def _brief(trace: Trace) -> dict[str, Any]:
    return {**trace.to_json(), "error": float(f"{trace.error:.6g}")}


def _rows(group: tuple[str, ...], checkpoint: Checkpoint) -> Iterator[tuple[str, slice]]:
    first = 0
    for module in group:
        count = checkpoint.tensors[f"{module}.weight"].shape[0]
        yield module, slice(first, first + count)
        first += count


def _write_group(
    shard: ShardWriter, group: tuple[str, ...], state: State, checkpoint: Checkpoint
) -> None:
    for module, rows in _rows(group, checkpoint):
        for suffix, value in state.tensors(rows).items():
            shard.write(f"{module}.{suffix}", value)


def choose_device(name: str) -> torch.device:
    """The torch device of ``--device``; "auto" is the GPU when there is one. Raises FluteError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise FluteError(
            f"cannot use device {name!r}",
            where="--device",
            why=str(error).splitlines()[0],
            fix="use --device cpu, or cuda with a CUDA build of torch",
        ) from error
    return device
