"""Everything that is decided before the first weight is read: specs, work units, exact sizes.

A unit of work is a decoder block, or all that lies outside the blocks. Each unit becomes one
output file, so a file that is complete is work that no crash takes back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from flute_vllm.checkpoint import Checkpoint
from flute_vllm.errors import FluteError
from flute_vllm.format import FORMAT_VERSION, SCALE_DTYPES, TENSOR_NAMES, LayerSpec
from flute_vllm.quantize.codebooks import TABLE_NAMES, Codebook, named_codebook, read_codebook
from flute_vllm.quantize.recipes import Recipe, load_recipe
from flute_vllm.quantize.structure import Selection, fused_groups, select_modules
from flute_vllm.schema import FluteQuantizationConfig, Override, module_matches
from flute_vllm.validate import FOREIGN_CONFIG
from flute_vllm.writer import Layout, file_nbytes, layout_nbytes


@dataclass(frozen=True)
class QuantizeSettings:
    """What the user chose.

    Attributes:
        bits, group_size: of all modules that no override names.
        recipe: a name in ``configs/recipes``, or a JSON file like those.
        scale_dtype: None takes the dtype of the source weights (bfloat16 for float32 ones).
        skip: patterns of modules to leave dense.
        overrides: module pattern to bits; the first match wins.
        table: "nf", "int" or "fp", or a JSON file, used as it is for the modules of its bits;
            None: NormalFloat, which the recipe may replace by a learned table.
        device: "cpu", "cuda", "cuda:1"; "auto" takes a GPU when there is one.
        calib: text for recipes that need activations: "bundled", a file, "hf:DATASET", "none".
        samples, length: windows of text and tokens in each; None: what the recipe says.
        seed: where in the text the windows begin.
        bpw: bits per weight to fill with mixed bits, group sizes and kinds of table, chosen by
            what each group of modules costs the model; modules of ``overrides`` keep theirs.
            None: the same for all.
        lm_head: quantize the output head, too.
    """

    bits: int = 4
    group_size: int = 64
    recipe: str = "fast"
    scale_dtype: str | None = None
    skip: tuple[str, ...] = ()
    overrides: dict[str, int] = field(default_factory=dict)
    table: str | None = None
    device: str = "auto"
    calib: str = "bundled"
    samples: int | None = None
    length: int | None = None
    seed: int = 0
    bpw: float | None = None
    lm_head: bool = False

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "skip": list(self.skip)}


OUTSIDE = "outside"  # the unit of all that is in no block


@dataclass(frozen=True)
class Unit:
    """One output file: ``groups`` of modules to quantize together, and tensors to copy."""

    name: str
    file: str
    groups: tuple[tuple[str, ...], ...]
    copied: tuple[str, ...]
    layout: Layout

    @property
    def modules(self) -> list[str]:
        return [module for group in self.groups for module in group]


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first weight is read."""

    config: FluteQuantizationConfig
    specs: dict[str, LayerSpec]
    shapes: dict[str, tuple[int, int]]
    codebooks: dict[int, Codebook]
    recipe: Recipe
    units: list[Unit]
    notes: list[str]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(layout_nbytes(unit.layout) for unit in self.units)

    @property
    def file_nbytes(self) -> int:
        """Bytes of all weight files, with their headers."""
        return sum(file_nbytes(unit.layout) for unit in self.units)

    @property
    def weights(self) -> int:
        return sum(rows * columns for rows, columns in map(self.shapes.__getitem__, self.specs))

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized modules: codes, scales and tables."""
        stored = sum(
            spec.bits_per_weight(*self.shapes[name]) * torch.Size(self.shapes[name]).numel()
            for name, spec in self.specs.items()
        )
        return stored / self.weights


def plan_checkpoint(
    checkpoint: Checkpoint,
    settings: QuantizeSettings,
    allocated: Mapping[str, LayerSpec] | None = None,
) -> Plan:
    """Decides the spec of every module from headers; reads no weight. Raises FluteError.

    Args:
        checkpoint, settings: of the run.
        allocated: specs by module that ``bpw`` led to, once they are known.
    """
    _refuse_quantized(checkpoint)
    recipe = load_recipe(settings.recipe)
    codebooks = _codebooks(settings)
    default = LayerSpec(
        settings.bits,
        settings.group_size,
        settings.scale_dtype or "bfloat16",
        codebooks[settings.bits].table_kind if settings.bits in codebooks else "scalar",
    )
    # Settings are checked before the model is built, which takes seconds.
    _config(default, settings.skip, settings, codebooks)
    selection = select_modules(checkpoint, settings.lm_head)
    if settings.scale_dtype is None:
        default = default.with_changes(scale_dtype=_source_dtype(checkpoint, selection))
    notes = list(selection.notes)
    dense = [*settings.skip, *selection.dense, *_unfit(selection, default, settings, notes)]
    config = _config(default, dense, settings, codebooks)
    if allocated is not None:
        config = _with_allocated(config, allocated)
    elif settings.bpw is not None:
        notes.append(
            f"bits, group sizes and tables will be chosen to fill {settings.bpw:g} bits per "
            "weight, once it is measured what each module needs; sizes shown are those without"
        )
    config = _with_aliases(config, selection)
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
        name = settings.table if settings.table in TABLE_NAMES else "nf"
        book = replace(named_codebook(name, spec.bits), is_fixed=settings.table is not None)
        codebooks.setdefault(spec.bits, book)
    units = _units(checkpoint, selection, specs)
    return Plan(config, specs, selection.linears, codebooks, recipe, units, notes)


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


def _with_allocated(
    config: FluteQuantizationConfig, allocated: Mapping[str, LayerSpec]
) -> FluteQuantizationConfig:
    default = config.default_spec()
    return _with_overrides(config, {
        module: Override(**changes) for module, spec in allocated.items()
        if (changes := _changes(spec, default))
    })  # fmt: skip


def _with_aliases(config: FluteQuantizationConfig, selection: Selection) -> FluteQuantizationConfig:
    """What holds for modules by their stored names holds by those of transformers, too."""
    default, dense, overrides = config.default_spec(), [], {}
    for stored, name in selection.aliases.items():
        spec = config.spec_for(stored)
        if spec == config.spec_for(name):
            continue
        if spec is None:
            dense.append(name)
        else:
            overrides[name] = Override(**(_changes(spec, default) or {"bits": spec.bits}))
    kept = [*config.modules_to_not_convert, *dense]
    return _with_overrides(config.model_copy(update={"modules_to_not_convert": kept}), overrides)


def _changes(spec: LayerSpec, default: LayerSpec) -> dict[str, Any]:
    names = ("bits", "group_size", "table_kind")
    return {n: getattr(spec, n) for n in names if getattr(spec, n) != getattr(default, n)}


def _with_overrides(
    config: FluteQuantizationConfig, overrides: Mapping[str, Override]
) -> FluteQuantizationConfig:
    """Those before the config's own: the first that matches counts."""
    merged = {**config.to_json(), "overrides": {
        pattern: change.model_dump(exclude_none=True)
        for pattern, change in {**overrides, **config.overrides}.items()
    }}  # fmt: skip
    return FluteQuantizationConfig.parse(merged, where="allocation")


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
    if settings.table is None or settings.table in TABLE_NAMES:
        return {}
    codebook = read_codebook(settings.table)
    if codebook.bits not in {settings.bits, *settings.overrides.values()}:
        raise FluteError(
            "the table is used by no module",
            where=settings.table,
            why=f"it has {codebook.bits} bits, the settings ask for {settings.bits}",
            fix=f"use --bits {codebook.bits}",
        )
    return {codebook.bits: replace(codebook, is_fixed=True)}


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


def _units(checkpoint: Checkpoint, selection: Selection, specs: dict[str, LayerSpec]) -> list[Unit]:
    """One unit for each decoder block in order, and one for everything outside them, last."""
    parts: dict[str, list[str]] = {block: [] for block in selection.blocks}
    outside: list[str] = []
    for name in checkpoint.tensors:
        block = selection.block_of(name)
        (outside if block is None else parts[block]).append(name)
    named = [(block, names) for block, names in parts.items() if names]
    if outside:
        named.append((OUTSIDE, outside))
    units = []
    for number, (name, names) in enumerate(named, start=1):
        modules = [m for m in (n.removesuffix(".weight") for n in names) if m in specs]
        quantized = {f"{module}.weight" for module in modules}
        copied = tuple(n for n in names if n not in quantized)
        file = f"model-{number:05}-of-{len(named):05}.safetensors"
        layout = _layout(checkpoint, copied, modules, specs)
        units.append(Unit(name, file, tuple(_groups(modules)), copied, layout))
    return units


def _groups(modules: list[str]) -> Iterable[tuple[str, ...]]:
    """All modules, those that vLLM fuses together; they share a table."""
    fused = {module: tuple(group) for group in fused_groups(dict.fromkeys(modules))
             for module in group}  # fmt: skip
    return dict.fromkeys(fused.get(module, (module,)) for module in modules)


def _layout(
    checkpoint: Checkpoint,
    copied: Iterable[str],
    modules: Iterable[str],
    specs: dict[str, LayerSpec],
) -> Layout:
    layout: Layout = {}
    for name in copied:
        info = checkpoint.tensors[name]
        layout[name] = (info.shape, info.dtype)
    for module in modules:
        tensors = specs[module].tensor_layout(*checkpoint.tensors[f"{module}.weight"].shape)
        layout.update({f"{module}.{suffix}": tensors[suffix] for suffix in TENSOR_NAMES})
    return layout
