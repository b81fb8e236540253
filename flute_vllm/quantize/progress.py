"""What a person sees of a quantization: the plan, the bar, the summary; and the upload."""

from __future__ import annotations

import logging
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from flute_vllm.checkpoint import Checkpoint
from flute_vllm.errors import FluteError, format_size
from flute_vllm.quantize.calibration import NONE
from flute_vllm.quantize.memory import (
    OVERHEAD,
    Part,
    memory_parts,
    memory_totals,
    tuning_parts,
    window_length,
)
from flute_vllm.quantize.model import Callbacks, choose_device
from flute_vllm.quantize.plan import Plan, QuantizeSettings, Unit
from flute_vllm.quantize.report import ModuleReport, told_output_error

logger = logging.getLogger(__name__)


class ProgressBar:
    """A bar with block, module, error and time left; on a log file a line for each block."""

    def __init__(self, console: Console, settings: QuantizeSettings) -> None:
        self._console, self._settings = console, settings
        columns = (
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
            TextColumn("{task.fields[error]}"), TextColumn("ETA"), TimeRemainingColumn(),
        )  # fmt: skip
        self._progress = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        )
        self._task = self._progress.add_task("reading headers", total=None, error="")
        self._errors: dict[str, list[float]] = {}
        self._unit_errors: list[float] = []
        self.callbacks = Callbacks(
            self._on_plan, self._on_resume, self._on_training, self._on_module
        )

    def __enter__(self) -> ProgressBar:
        self._progress.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self._progress.__exit__(*details)

    def _on_plan(self, plan: Plan) -> None:
        self._console.print(describe_plan(plan), highlight=False, soft_wrap=True)
        self._units = [unit for unit in plan.units if unit.groups]
        self._progress.update(self._task, total=plan.weights, description="quantizing")

    def _on_resume(self, plan: Plan, units: list[str]) -> None:
        done = [m for unit in plan.units if unit.name in units for m in unit.modules]
        weights = sum(plan.shapes[m][0] * plan.shapes[m][1] for m in done)
        self._console.print(
            f"resuming: {len(units)} of {len(plan.units)} files are done", highlight=False
        )
        # Not an advance: the speed, and with it the ETA, is that of this run.
        self._progress.update(self._task, completed=weights)

    def _on_training(self, step: int, steps: int, loss: float) -> None:
        self._progress.update(
            self._task, description=f"training scales {step}/{steps}", error=f"loss {loss:.3f}"
        )

    def _on_module(self, report: ModuleReport, unit: Unit) -> None:
        number = 1 + self._units.index(unit)
        leaf = report.module.removeprefix(f"{unit.name}.")
        error = report.error if report.output_error is None else report.output_error
        before = self._errors.setdefault(leaf, [])
        compared = f" (median {statistics.median(before):.2e})" if before else ""
        before.append(error)
        self._progress.update(
            self._task, advance=report.weights,
            description=f"block {number}/{len(self._units)} {escape(leaf)} {report.bits} bits",
            error=f"error {error:.2e}{compared}",
        )  # fmt: skip
        self._unit_errors.append(error)
        if len(self._unit_errors) == len(unit.modules):
            if not self._console.is_terminal:
                mean = sum(self._unit_errors) / len(self._unit_errors)
                self._console.print(
                    f"block {number}/{len(self._units)}: mean error {mean:.3g}", highlight=False
                )
            self._unit_errors = []


def describe_plan(plan: Plan) -> str:
    bits = sorted({spec.bits for spec in plan.specs.values()})
    size = plan.config.group_size
    groups = "one scale per row" if size == -1 else f"groups of {size}"
    return (
        f"plan: {len(plan.specs)} modules to {', '.join(map(str, bits))} bits, {groups}, "
        f"recipe {plan.recipe.name}, scales in {plan.config.scale_dtype}; output {plan.nbytes:,} "
        f"bytes of tensors in {len(plan.units)} files"
    )


def print_plan(
    console: Console, checkpoint: Checkpoint, plan: Plan, settings: QuantizeSettings
) -> None:
    """The dry run: exact sizes, and memory by arithmetic."""
    console.print(describe_plan(plan), highlight=False, soft_wrap=True)
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"weight files: {plan.file_nbytes:,} bytes on disk, headers included; "
        f"{plan.bits_per_weight:.4f} bits per weight of the quantized modules",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    device = choose_device(settings.device).type
    parts = memory_parts(checkpoint, plan, settings, device)
    _print_parts(console, parts)
    console.print(
        f"memory, estimated: {_told_totals(parts, device)}, with "
        f"{format_size(OVERHEAD[device])} for Python and torch",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    tuning = _tuning(checkpoint, plan, settings, device)
    if tuning:
        _print_parts(console, tuning)
        console.print(
            f"tuning at the end, roughly: {_told_totals(tuning, device)}; left out where that is "
            "not free",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


def _print_parts(console: Console, parts: list[Part]) -> None:
    for part in parts:
        place = "device" if part.is_on_device else "host"
        console.print(
            f"  {place:6} {format_size(part.nbytes):>9}  {part.what}",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip


def _told_totals(parts: list[Part], device: str) -> str:
    host, accelerator = memory_totals(parts, device)
    gpu = "" if device == "cpu" else f", {format_size(accelerator)} on the GPU"
    return f"{format_size(host)} on the host{gpu}"


def _tuning(
    checkpoint: Checkpoint, plan: Plan, settings: QuantizeSettings, device: str
) -> list[Part]:
    """What the tuning at the end of a run needs; empty for a run without."""
    if plan.recipe.finetuning is None or settings.calib == NONE:
        return []
    return tuning_parts(checkpoint, plan, window_length(checkpoint, plan, settings), device)


def check_memory(
    checkpoint: Checkpoint, plan: Plan, settings: QuantizeSettings, ram: float | None
) -> None:
    """Raises FluteError where ``--ram`` (GB) is less than the plan needs, before any work.

    Tuning at the end, which is left out then, is only told of by a WARNING.
    """
    if ram is None:
        return
    device = choose_device(settings.device).type
    parts = memory_parts(checkpoint, plan, settings, device)
    host, _ = memory_totals(parts, device)
    if host > ram * 1e9:
        largest = max(parts, key=lambda part: part.nbytes)
        raise FluteError(
            "not enough memory for this plan", where=f"--ram {ram:g}",
            why=f"it needs about {format_size(host)} of host memory, most of it for: "
            f"{largest.what}",
            fix="use fewer --samples or a smaller --length, --recipe fast, or a GPU "
            "(--dry-run shows the sum)",
        )  # fmt: skip
    tuning, _ = memory_totals(_tuning(checkpoint, plan, settings, device), device)
    if tuning > ram * 1e9:
        logger.warning(
            "flute: the tuning at the end of recipe %s needs about %s of host memory, more than "
            "--ram %g: it will be left out",
            plan.recipe.name, format_size(tuning), ram,
        )  # fmt: skip


def summary(report: dict[str, Any], out: Path) -> str:
    totals = report["totals"]
    of_output = told_output_error(totals)
    outputs = f", of the outputs {of_output}" if of_output else ""
    return (
        f"{out}: {totals['modules']} modules at {totals['bits_per_weight']:.2f} bits "
        f"per weight, {format_size(totals['source_bytes'])} -> "
        f"{format_size(totals['output_bytes'])}, relative squared error "
        f"{totals['mean_error']:.3g} of the weights{outputs}, {totals['seconds']:.1f} s"
    )


def push(out: Path, repository: str) -> str:
    """Uploads a finished folder to the Hugging Face hub; its address. Raises FluteError."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(folder_path=str(out), repo_id=repository)
    except Exception as error:  # network, login and permission errors are of many kinds
        raise FluteError(
            "cannot upload the folder", where=f"--push-to-hub {repository}",
            why=f"{type(error).__name__}: {error}",
            fix=f"`hf auth login`, then `hf upload {repository} {out}`; the folder is complete",
        ) from error  # fmt: skip
    return f"https://huggingface.co/{repository}"
