"""Quantizes a whole checkpoint, one tensor at a time.

First everything is decided from headers (:func:`plan_checkpoint`): the spec of every module and
with it the exact size of the output. Then source files are read one by one and each becomes one
output file of the same name. Memory: one dense matrix and its codes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from flute_vllm import __version__
from flute_vllm.checkpoint import Checkpoint
from flute_vllm.errors import FluteError
from flute_vllm.format import FORMAT_VERSION, SCALE_DTYPES, TENSOR_NAMES, LayerSpec
from flute_vllm.quantize.codebooks import Codebook, normal_float, read_codebook
from flute_vllm.quantize.structure import Selection, fused_groups, select_modules
from flute_vllm.quantize.tensor import QuantizedTensor, quantize_tensor
from flute_vllm.schema import FluteQuantizationConfig, Override, module_matches
from flute_vllm.validate import FOREIGN_CONFIG
from flute_vllm.writer import AtomicFolder, Layout, layout_nbytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizeSettings:
    """What the user chose. ``overrides`` maps a module pattern to bits; first match wins.

    ``scale_dtype`` None takes the dtype of the source weights (bfloat16 for float32 ones).
    ``table`` is a JSON file for the modules of its own bits; others get NormalFloat.
    """

    bits: int = 4
    group_size: int = 64
    scale: str = "search"
    scale_dtype: str | None = None
    skip: tuple[str, ...] = ()
    overrides: dict[str, int] = field(default_factory=dict)
    device: str = "cpu"
    table: str | None = None


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first weight is read."""

    config: FluteQuantizationConfig
    specs: dict[str, LayerSpec]
    shapes: dict[str, tuple[int, int]]
    codebooks: dict[int, Codebook]
    layouts: dict[Path, Layout]
    notes: list[str]

    @property
    def nbytes(self) -> int:
        return sum(layout_nbytes(layout) for layout in self.layouts.values())


@dataclass(frozen=True)
class ModuleReport:
    """One module when it is done. ``error`` is |W - W'|^2 / |W|^2."""

    module: str
    bits: int
    group_size: int
    weights: int
    error: float
    seconds: float


def quantize_checkpoint(
    source: str | Path,
    out: str | Path,
    settings: QuantizeSettings | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    on_module: Callable[[ModuleReport], None] | None = None,
) -> dict[str, Any]:
    """Writes the quantized checkpoint and returns the content of its report.json.

    Args:
        source: folder with config.json and dense safetensors.
        out: folder that does not exist yet; it appears complete or not at all.
        settings: defaults are 4 bits, groups of 64, searched scales.
        on_plan, on_module: called with progress.

    Raises:
        FluteError: an unusable source or setting, a weight that is not finite, a full disk.
    """
    settings = settings or QuantizeSettings()
    folder = AtomicFolder(out)
    checkpoint = Checkpoint(source)
    plan = plan_checkpoint(checkpoint, settings)
    device = _device(settings.device)
    for note in plan.notes:
        logger.warning("%s", note)
    if on_plan is not None:
        on_plan(plan)
    started = time.perf_counter()
    reports: list[ModuleReport] = []
    with folder:
        folder.reserve(plan.nbytes)
        for path, names in checkpoint.iter_files():
            layout = plan.layouts[path]
            with safe_open(path, framework="pt") as file, folder.shard(path.name, layout) as shard:
                for name in names:
                    tensor = file.get_tensor(name)
                    module = name.removesuffix(".weight")
                    if module == name or module not in plan.specs:
                        shard.write(name, tensor)
                        continue
                    quantized, report = _quantize(module, tensor.to(device), plan, settings)
                    for suffix, value in quantized.tensors().items():
                        shard.write(f"{module}.{suffix}", value)
                    reports.append(report)
                    if on_module is not None:
                        on_module(report)
        folder.copy_extras(checkpoint.folder)
        summary = _report(plan, settings, reports, checkpoint, time.perf_counter() - started)
        folder.write_json("report.json", summary)
        folder.commit({**checkpoint.config, "quantization_config": plan.config.to_json()})
    return summary


def plan_checkpoint(checkpoint: Checkpoint, settings: QuantizeSettings) -> Plan:
    """Decides the spec of every module from headers; reads no weight. Raises FluteError."""
    _refuse_quantized(checkpoint)
    codebooks = _codebooks(settings)
    default = LayerSpec(
        settings.bits,
        settings.group_size,
        settings.scale_dtype or "bfloat16",
        codebooks[settings.bits].table_kind if settings.bits in codebooks else "scalar",
    )
    # Settings are checked before the model is built, which takes seconds.
    _config(default, settings.skip, settings, codebooks)
    selection = select_modules(checkpoint)
    if settings.scale_dtype is None:
        default = default.with_changes(scale_dtype=_source_dtype(checkpoint, selection))
    notes = list(selection.notes)
    dense = [*settings.skip, *selection.dense, *_unfit(selection, default, settings, notes)]
    config = _config(default, dense, settings, codebooks)
    found = {module: config.spec_for(module) for module in selection.linears}
    specs = {module: spec for module, spec in found.items() if spec is not None}
    _check_patterns(settings, selection)
    if not specs:
        raise FluteError(
            "nothing to quantize",
            where=str(checkpoint.folder),
            why=f"all {len(selection.linears)} linear modules of the decoder stay dense"
            + "".join(f"; {note}" for note in notes),
            fix="use a smaller --group-size, or fewer --skip patterns",
        )
    _check_fused(found)
    for spec in specs.values():
        codebooks.setdefault(spec.bits, normal_float(spec.bits))
    layouts = {path: _layout(checkpoint, names, specs) for path, names in checkpoint.iter_files()}
    return Plan(config, specs, selection.linears, codebooks, layouts, notes)


def _config(
    default: LayerSpec,
    dense: Iterable[str],
    settings: QuantizeSettings,
    codebooks: dict[int, Codebook],
) -> FluteQuantizationConfig:
    config = FluteQuantizationConfig(
        format_version=FORMAT_VERSION,
        bits=default.bits,
        group_size=default.group_size,
        scale_dtype=default.scale_dtype,
        table_kind=default.table_kind,
        modules_to_not_convert=list(dict.fromkeys(dense)),
        overrides=_overrides(settings, codebooks),
    )
    return FluteQuantizationConfig.parse(config.to_json(), where="command line")


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    section = checkpoint.config.get("quantization_config")
    foreign = checkpoint.folder / FOREIGN_CONFIG
    if section is None and not foreign.exists():
        return
    method = section.get("quant_method") if isinstance(section, dict) else None
    raise FluteError(
        "the source is already quantized",
        where=str(foreign if section is None else checkpoint.folder / "config.json"),
        why=f"quantization_config.quant_method is {method!r}"
        if section is not None
        else f"{FOREIGN_CONFIG} marks a FLUTE checkpoint",
        fix="quantize the original 16-bit model; `flute-vllm convert` and `flute-vllm dequantize` "
        "accept quantized ones",
    )


def _codebooks(settings: QuantizeSettings) -> dict[int, Codebook]:
    if settings.table is None:
        return {}
    codebook = read_codebook(settings.table)
    if codebook.bits not in {settings.bits, *settings.overrides.values()}:
        raise FluteError(
            "the table is used by no module",
            where=settings.table,
            why=f"it has {codebook.bits} bits, the settings ask for {settings.bits}",
            fix=f"use --bits {codebook.bits}",
        )
    return {codebook.bits: codebook}


def _overrides(settings: QuantizeSettings, codebooks: dict[int, Codebook]) -> dict[str, Override]:
    kinds = {bits: book.table_kind for bits, book in codebooks.items()}
    default_kind = kinds.get(settings.bits, "scalar")
    overrides = {}
    for pattern, bits in settings.overrides.items():
        kind = kinds.get(bits, "scalar")
        overrides[pattern] = Override(bits=bits, table_kind=None if kind == default_kind else kind)
    return overrides


def _source_dtype(checkpoint: Checkpoint, selection: Selection) -> str:
    first = next(iter(selection.linears))
    dtype = checkpoint.tensors[f"{first}.weight"].dtype
    return next((name for name, value in SCALE_DTYPES.items() if value == dtype), "bfloat16")


def _unfit(
    selection: Selection, spec: LayerSpec, settings: QuantizeSettings, notes: list[str]
) -> list[str]:
    """Modules whose in_features the group size does not divide; they stay dense."""
    unfit = []
    for module, (_, in_features) in selection.linears.items():
        if any(module_matches(pattern, module) for pattern in settings.skip):
            continue
        try:
            spec.check_in_features(in_features, module)
        except FluteError as error:
            unfit.append(module)
            notes.append(f"{module} stays dense: in_features {error.why}")
    return unfit


def _check_patterns(settings: QuantizeSettings, selection: Selection) -> None:
    for option, patterns in (("--skip", settings.skip), ("--override", settings.overrides)):
        for pattern in patterns:
            known = [*selection.linears, *selection.dense]
            if not any(module_matches(pattern, module) for module in known):
                raise FluteError(
                    f"{option} pattern selects nothing",
                    where=f"{option} {pattern}",
                    why=f"it matches none of {len(known)} linear modules, such as {known[0]}",
                    fix="name whole components such as down_proj, or a regular expression for "
                    "the whole name such as 're:.*down_proj'",
                )


def _check_fused(found: dict[str, LayerSpec | None]) -> None:
    for group in fused_groups(found):
        specs = {found[module] for module in group}
        if len(specs) > 1:
            described = ", ".join(
                f"{module.rpartition('.')[2]}: "
                + (f"{found[module].bits} bits" if found[module] else "dense")
                for module in group
            )
            raise FluteError(
                "modules that vLLM fuses must be quantized alike",
                where=group[0].rpartition(".")[0],
                why=described,
                fix="give --override or --skip a pattern that covers all of them, such as "
                f"'re:.*({'|'.join(module.rpartition('.')[2] for module in group)})'",
            )


def _layout(checkpoint: Checkpoint, names: list[str], specs: dict[str, LayerSpec]) -> Layout:
    layout: Layout = {}
    for name in names:
        info = checkpoint.tensors[name]
        module = name.removesuffix(".weight")
        spec = specs.get(module) if module != name else None
        if spec is None:
            layout[name] = (info.shape, info.dtype)
            continue
        tensors = spec.tensor_layout(*info.shape)
        layout.update({f"{module}.{suffix}": tensors[suffix] for suffix in TENSOR_NAMES})
    return layout


def _device(name: str) -> torch.device:
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


def _quantize(
    module: str, weight: torch.Tensor, plan: Plan, settings: QuantizeSettings
) -> tuple[QuantizedTensor, ModuleReport]:
    started = time.perf_counter()
    spec = plan.specs[module]
    table = plan.codebooks[spec.bits].values
    result = quantize_tensor(weight, spec, table, settings.scale, where=f"{module}.weight")
    seconds = time.perf_counter() - started
    report = ModuleReport(module, spec.bits, spec.group_size, weight.numel(), result.error, seconds)
    return result, report


def _report(
    plan: Plan,
    settings: QuantizeSettings,
    reports: list[ModuleReport],
    checkpoint: Checkpoint,
    seconds: float,
) -> dict[str, Any]:
    weights = sum(report.weights for report in reports)
    stored = sum(
        spec.bits_per_weight(*plan.shapes[module]) * torch.Size(plan.shapes[module]).numel()
        for module, spec in plan.specs.items()
    )
    return {
        "version": __version__,
        "settings": asdict(settings),
        "totals": {
            "modules": len(reports),
            "weights": weights,
            "bits_per_weight": stored / weights,
            "mean_error": sum(report.error * report.weights for report in reports) / weights,
            "source_bytes": checkpoint.nbytes,
            "output_bytes": plan.nbytes,
            "seconds": seconds,
        },
        "notes": plan.notes,
        "modules": {
            report.module: {k: v for k, v in asdict(report).items() if k != "module"}
            for report in reports
        },
    }
