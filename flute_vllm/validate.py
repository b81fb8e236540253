"""Checks a native checkpoint against its config from the headers alone, before any weight is used.

Used by ``info``, ``dequantize``, ``convert`` and by the vLLM plugin, so that a damaged or
inconsistent checkpoint ends with one message instead of wrong output.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from flute_vllm.checkpoint import Checkpoint, TensorInfo
from flute_vllm.errors import FluteError
from flute_vllm.format import TENSOR_NAMES, UNIT, LayerSpec
from flute_vllm.schema import HEAD, QUANT_METHOD, FluteQuantizationConfig

FOREIGN_CONFIG = "flute_config.json"
# Matrices that vLLM stores as one; their parts must be quantized alike.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
_FIX = "download or quantize the checkpoint again"


def fused_siblings(module: str) -> tuple[str, ...]:
    """Full names of the modules that vLLM fuses with ``module``, itself included."""
    parent, dot, leaf = module.rpartition(".")
    for group in FUSED:
        if leaf in group:
            return tuple(f"{parent}{dot}{name}" for name in group)
    return (module,)


def is_native(config: dict[str, Any]) -> bool:
    """Whether a config.json says that the checkpoint is in this project's format."""
    section = config.get("quantization_config")
    return isinstance(section, dict) and section.get("quant_method") == QUANT_METHOD


def quantized_modules(checkpoint: Checkpoint) -> list[str]:
    """Modules that have any of the three tensors of the native format, in file order."""
    found: dict[str, None] = {}
    for name in checkpoint.tensors:
        module, _, suffix = name.rpartition(".")
        if suffix in TENSOR_NAMES and module:
            found[module] = None
    return list(found)


def module_shape(checkpoint: Checkpoint, module: str, bits: int) -> tuple[int, int]:
    """(out_features, in_features) of a quantized module, from the shape of its codes."""
    rows, words = checkpoint.tensors[f"{module}.qweight"].shape
    return rows, words // bits * UNIT


def validate_checkpoint(checkpoint: Checkpoint) -> FluteQuantizationConfig:
    """Checks names, shapes and dtypes of all tensors of a native checkpoint; reads no weight.

    Returns the parsed quantization config. Raises FluteError naming the first tensor at fault.
    """
    where = str(checkpoint.folder / "config.json")
    section = checkpoint.config.get("quantization_config")
    if not isinstance(section, dict) or not is_native(checkpoint.config):
        method = section.get("quant_method") if isinstance(section, dict) else section
        raise FluteError(
            "not a flute_vllm checkpoint",
            where=where,
            why=f"quantization_config.quant_method is {method!r}, not {QUANT_METHOD!r}",
            fix="quantize a dense model with `flute-vllm quantize`, or convert a checkpoint of "
            "upstream FLUTE with `flute-vllm convert`",
        )
    if (checkpoint.folder / FOREIGN_CONFIG).exists():
        raise FluteError(
            "contradicting configs",
            where=str(checkpoint.folder / FOREIGN_CONFIG),
            why=f"config.json says quant_method {QUANT_METHOD!r} and the upstream file "
            f"{FOREIGN_CONFIG} is there too",
            fix=f"remove {FOREIGN_CONFIG}, or convert the original folder again",
        )
    config = FluteQuantizationConfig.parse(section, where)
    modules = quantized_modules(checkpoint)
    if not modules:
        raise FluteError(
            "no quantized module",
            where=str(checkpoint.folder),
            why=f"quantization_config says {QUANT_METHOD!r}, none of {len(checkpoint.tensors)} "
            "tensors is named <module>.qweight",
            fix=_FIX,
        )
    specs: dict[str, LayerSpec] = {}
    for module in modules:
        specs[module] = _check_module(checkpoint, config, module)
    _check_head(checkpoint, specs)
    _check_extra(checkpoint, specs)
    _check_dense(checkpoint, config, specs)
    _check_fused(checkpoint, specs)
    return config


def check_values(tensor: torch.Tensor, where: str) -> None:
    """Raises FluteError for NaN or infinity in scales, a table or a dense weight."""
    finite = tensor.isfinite()
    if not bool(finite.all()):
        first = (~finite).nonzero()[0].tolist()
        raise FluteError(
            "values that are not finite",
            where=where,
            why=f"{int((~finite).sum())} of {tensor.numel()} values are NaN or infinite, the "
            f"first is {float(tensor[tuple(first)])} at {first}",
            fix=_FIX,
        )


def _check_module(
    checkpoint: Checkpoint, config: FluteQuantizationConfig, module: str
) -> LayerSpec:
    present = {s for s in TENSOR_NAMES if f"{module}.{s}" in checkpoint.tensors}
    missing = [suffix for suffix in TENSOR_NAMES if suffix not in present]
    if missing:
        raise FluteError(
            "missing tensor",
            where=f"{checkpoint.folder}: {module}.{missing[0]}",
            why=f"a quantized module has {', '.join(TENSOR_NAMES)}; this one has only "
            f"{', '.join(sorted(present))}",
            fix=_FIX,
        )
    spec = config.spec_for(module)
    if spec is None:
        raise FluteError(
            "quantized tensors in a module that is not to be converted",
            where=f"{checkpoint.folder}: {module}.qweight",
            why=f"quantization_config.modules_to_not_convert excludes {module}",
            fix="remove the entry from modules_to_not_convert, or store the module as .weight",
        )
    info = {suffix: checkpoint.tensors[f"{module}.{suffix}"] for suffix in TENSOR_NAMES}
    _check_table(info["table"], spec)
    _check_dtype(info["qweight"], torch.int32, "codes are stored as int32 words")
    for suffix in ("scales", "table"):
        _check_dtype(info[suffix], spec.torch_scale_dtype, f"scale_dtype is {spec.scale_dtype!r}")
    codes = info["qweight"].shape
    if len(codes) != 2 or codes[1] % spec.bits or not codes[0] * codes[1]:
        raise _shape_error(
            info["qweight"], f"[out_features, a multiple of {spec.bits}] at {spec.bits} bits"
        )
    rows, columns = codes[0], codes[1] // spec.bits * UNIT
    spec.check_in_features(columns, info["qweight"].name)
    expected = spec.tensor_layout(rows, columns)["scales"][0]
    if info["scales"].shape != expected:
        raise _shape_error(
            info["scales"],
            f"{list(expected)} (qweight gives in_features {columns} at {spec.bits} bits, "
            f"group_size is {spec.group_size})",
        )
    bias = checkpoint.tensors.get(f"{module}.bias")
    if bias is not None and bias.shape != (rows,):
        raise _shape_error(bias, f"[{rows}], the out_features of qweight")
    return spec


def _check_table(info: TensorInfo, spec: LayerSpec) -> None:
    if info.shape != spec.table_shape:
        raise _shape_error(
            info, f"{list(spec.table_shape)} for a {spec.table_kind} table of {spec.bits} bits"
        )


def _check_dtype(info: TensorInfo, expected: torch.dtype, why: str) -> None:
    if info.dtype != expected:
        raise FluteError(
            "wrong dtype",
            where=f"{info.file}: {info.name}",
            why=f"{info.dtype}, expected {expected}: {why}",
            fix=_FIX,
        )


def _shape_error(info: TensorInfo, expected: str) -> FluteError:
    return FluteError(
        "wrong shape",
        where=f"{info.file}: {info.name}",
        why=f"shape is {list(info.shape)}, expected {expected}",
        fix="correct bits, group_size or overrides in config.json, or " + _FIX,
    )


def _check_head(checkpoint: Checkpoint, specs: dict[str, LayerSpec]) -> None:
    """A head that is tied to the embeddings is never read, so a quantized one would be lost."""
    head = next((module for module in specs if module.rpartition(".")[2] == HEAD), None)
    if head is not None and checkpoint.is_head_tied:
        raise FluteError(
            "quantized head beside tied embeddings",
            where=f"{checkpoint.folder}: {head}.qweight",
            why="config.json says tie_word_embeddings, so that the model uses its embeddings",
            fix="set tie_word_embeddings to false if the head was made for this model, or " + _FIX,
        )


def _check_extra(checkpoint: Checkpoint, specs: dict[str, LayerSpec]) -> None:
    allowed = {*TENSOR_NAMES, "bias"}
    for name, info in checkpoint.tensors.items():
        module = next((part for part in _parents(name) if part in specs), None)
        if module is not None and name.removeprefix(f"{module}.") not in allowed:
            raise FluteError(
                "unexpected tensor",
                where=f"{info.file}: {name}",
                why=f"quantized module {module} may have only {', '.join(sorted(allowed))}",
                fix="remove the tensor, or " + _FIX,
            )


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _check_dense(
    checkpoint: Checkpoint, config: FluteQuantizationConfig, specs: dict[str, LayerSpec]
) -> None:
    """A dense matrix whose namesakes in other blocks are quantized must be listed as dense."""
    for module in dense_namesakes(checkpoint, specs):
        if config.spec_for(module) is not None:
            info = checkpoint.tensors[f"{module}.weight"]
            raise FluteError(
                "dense weight where a quantized one is expected",
                where=f"{info.file}: {info.name}",
                why=f"{module} is not in modules_to_not_convert, and has no qweight",
                fix=f"add {module!r} to modules_to_not_convert, or " + _FIX,
            )


def dense_namesakes(checkpoint: Checkpoint, modules: Iterable[str]) -> list[str]:
    """Modules with a dense weight [N, K] whose last name one of ``modules`` has, too."""
    modules = set(modules)
    leaves = {module.rpartition(".")[2] for module in modules}
    stored = (
        name.removesuffix(".weight") for name, info in checkpoint.tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2
    )  # fmt: skip
    return [m for m in stored if m.rpartition(".")[2] in leaves and m not in modules]


def _check_fused(checkpoint: Checkpoint, specs: dict[str, LayerSpec]) -> None:
    for module, spec in specs.items():
        for other in fused_siblings(module):
            if other in specs and specs[other] != spec:
                raise FluteError(
                    "modules that vLLM fuses are quantized differently",
                    where=f"{checkpoint.folder}: {module} and {other}",
                    why=f"{spec.bits} bits, group_size {spec.group_size} against "
                    f"{specs[other].bits} bits, group_size {specs[other].group_size}",
                    fix="quantize again with the same bits and group size for both",
                )
            if other not in specs and f"{other}.weight" in checkpoint.tensors:
                raise FluteError(
                    "modules that vLLM fuses are partly dense",
                    where=f"{checkpoint.folder}: {module} and {other}",
                    why=f"{module} has qweight, {other} has weight",
                    fix="quantize again with both or neither of them",
                )
