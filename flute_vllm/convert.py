"""Quantized checkpoints to dense ones, and foreign checkpoints to native ones, file by file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from flute_vllm.checkpoint import Checkpoint, TensorInfo
from flute_vllm.errors import FluteError
from flute_vllm.format import SCALE_DTYPES, TENSOR_NAMES, LayerSpec, dequantize
from flute_vllm.importers import Importer, NativeLayer, find
from flute_vllm.schema import HEAD, FluteQuantizationConfig
from flute_vllm.validate import (
    check_values,
    dense_namesakes,
    is_native,
    module_shape,
    quantized_modules,
    validate_checkpoint,
)
from flute_vllm.writer import AtomicFolder, Layout, layout_nbytes

Progress = Callable[[str, int, int], None]  # module, modules done, modules in all


class Source(Protocol):
    """The quantized modules of a checkpoint, whatever its format."""

    checkpoint: Checkpoint

    def modules(self) -> dict[str, list[str]]:
        """Names of the tensors that each quantized module consumes."""

    def load(self, module: str) -> NativeLayer:
        """One module in the native format, its scales and table checked to be finite."""


class NativeSource:
    """A checkpoint in this project's format."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.config: FluteQuantizationConfig = validate_checkpoint(checkpoint)

    def modules(self) -> dict[str, list[str]]:
        return {
            module: [f"{module}.{suffix}" for suffix in TENSOR_NAMES]
            for module in quantized_modules(self.checkpoint)
        }

    def load(self, module: str) -> NativeLayer:
        parts = {suffix: self.checkpoint.load(f"{module}.{suffix}") for suffix in TENSOR_NAMES}
        for suffix in ("scales", "table"):
            name = f"{module}.{suffix}"
            check_values(parts[suffix], f"{self.checkpoint.tensors[name].file}: {name}")
        spec = self.config.spec_for(module)
        if spec is None:  # validate_checkpoint has refused such modules
            raise KeyError(module)
        return NativeLayer(parts["qweight"], parts["scales"], parts["table"], spec)


class ForeignSource:
    """A checkpoint that an importer understands."""

    def __init__(self, checkpoint: Checkpoint, importer: Importer) -> None:
        self.checkpoint = checkpoint
        self.importer = importer

    def modules(self) -> dict[str, list[str]]:
        suffixes = self.importer.tensor_suffixes
        return {
            module: [
                f"{module}.{suffix}"
                for suffix in suffixes
                if f"{module}.{suffix}" in self.checkpoint.tensors
            ]
            for module in self.importer.modules(self.checkpoint)
        }

    def load(self, module: str) -> NativeLayer:
        tensors = {
            suffix: self.checkpoint.load(f"{module}.{suffix}")
            for suffix in self.importer.required_suffixes
        }
        layer = self.importer.to_native(module, tensors)
        for suffix in ("scales", "table"):
            check_values(layer.tensors()[suffix], f"{self.checkpoint.folder}: {module}.{suffix}")
        return layer


def open_source(folder: str | Path) -> Source | Checkpoint:
    """A quantized source, or the checkpoint itself where it is dense. Raises FluteError."""
    checkpoint = Checkpoint(folder)
    if is_native(checkpoint.config):
        return NativeSource(checkpoint)
    importer = find(checkpoint)
    if importer is not None:
        return ForeignSource(checkpoint, importer)
    section = checkpoint.config.get("quantization_config")
    if section is not None:
        method = section.get("quant_method") if isinstance(section, dict) else section
        raise FluteError(
            "unknown checkpoint format",
            where=str(checkpoint.folder / "config.json"),
            why=f"quantization_config.quant_method is {method!r}, which no importer reads",
            fix="convert the checkpoint with the tool that wrote it",
        )
    return checkpoint


def dense_state_dict(
    folder: str | Path,
) -> tuple[dict[str, Any], Iterator[tuple[str, torch.Tensor]]]:
    """The dense twin of a native, foreign or dense checkpoint, tensor by tensor.

    Returns:
        config.json without quantization_config, and an iterator over (name, tensor).
        A quantized weight becomes ``<module>.weight`` [N, K] in the dtype of its scales, rounded
        once; other tensors are unchanged.
    """
    source = open_source(folder)
    if isinstance(source, Checkpoint):
        checkpoint, modules = source, {}
    else:
        checkpoint, modules = source.checkpoint, source.modules()
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for _, kept, here in _by_file(checkpoint, modules):
            for name in kept:
                yield name, checkpoint.load(name)
            for module in here:
                yield f"{module}.weight", _dense(source.load(module))

    return config, tensors()


def dequantize_checkpoint(
    folder: str | Path, out: str | Path, on_module: Progress | None = None
) -> Path:
    """Writes the dense twin in the Hugging Face layout. Raises FluteError.

    A checkpoint of another format is dequantized to the weights that it means.
    """
    target = AtomicFolder(out)
    source = _quantized_source(folder)
    config = {k: v for k, v in source.checkpoint.config.items() if k != "quantization_config"}

    def tensors(module: str) -> dict[str, torch.Tensor]:
        return {f"{module}.weight": _dense(source.load(module))}

    def layout(module: str) -> Layout:
        (rows, columns), dtype = _shape_and_dtype(source, module)
        return {f"{module}.weight": ((rows, columns), dtype)}

    with target:
        _rewrite(source, target, layout, tensors, on_module)
        target.copy_extras(source.checkpoint.folder)
        return target.commit(config)


def convert_checkpoint(
    folder: str | Path, out: str | Path, on_module: Progress | None = None
) -> Path:
    """Writes the native twin of a foreign checkpoint; dequantized weights are the same bits."""
    target = AtomicFolder(out)
    source = _quantized_source(folder)
    if isinstance(source, NativeSource):
        raise FluteError(
            "the checkpoint is already native",
            where=str(folder),
            why="quantization_config.quant_method is 'flute'",
            fix="serve it as it is; `flute-vllm dequantize` writes its dense twin",
        )
    specs: dict[str, LayerSpec] = {}

    def tensors(module: str) -> dict[str, torch.Tensor]:
        layer = source.load(module)
        specs[module] = layer.spec
        return {f"{module}.{suffix}": value for suffix, value in layer.tensors().items()}

    with target:
        _rewrite(source, target, None, tensors, on_module)
        target.copy_extras(source.checkpoint.folder)
        section = source.importer.native_config(
            specs, [HEAD, *dense_namesakes(source.checkpoint, specs)]
        )
        target.commit({**source.checkpoint.config, "quantization_config": section})
    return target.out


def _quantized_source(folder: str | Path) -> NativeSource | ForeignSource:
    source = open_source(folder)
    if isinstance(source, Checkpoint):
        raise FluteError(
            "the checkpoint is not quantized",
            where=str(folder),
            why="config.json has no quantization_config and there is no flute_config.json",
            fix="quantize it with `flute-vllm quantize`",
        )
    return source


def _dense(layer: NativeLayer) -> torch.Tensor:
    return dequantize(layer.qweight, layer.scales, layer.table, layer.spec.bits)


def _shape_and_dtype(source: Source, module: str) -> tuple[tuple[int, int], torch.dtype]:
    """Of the dense weight; from headers for native sources, else by decoding the module."""
    if isinstance(source, NativeSource):
        spec = source.config.spec_for(module)
        shape = module_shape(source.checkpoint, module, spec.bits)
        return shape, SCALE_DTYPES[spec.scale_dtype]
    layer = source.load(module)
    words = layer.qweight.shape[1]
    return (layer.qweight.shape[0], words // layer.spec.bits * 32), layer.scales.dtype


def _by_file(
    checkpoint: Checkpoint, modules: dict[str, list[str]]
) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Each file, its unquantized tensors, and the modules whose first tensor it holds."""
    consumed = {name: module for module, names in modules.items() for name in names}
    home: dict[str, TensorInfo] = {m: checkpoint.tensors[names[0]] for m, names in modules.items()}
    for path, names in checkpoint.iter_files():
        kept = [name for name in names if name not in consumed]
        yield path, kept, [module for module, info in home.items() if info.file == path]


def _rewrite(
    source: Source,
    target: AtomicFolder,
    layout_of: Callable[[str], Layout] | None,
    tensors_of: Callable[[str], dict[str, torch.Tensor]],
    on_module: Progress | None,
) -> None:
    """One output file for each source file; streamed where the layout is known in advance."""
    checkpoint, modules = source.checkpoint, source.modules()
    done = 0

    def produce(module: str) -> dict[str, torch.Tensor]:
        nonlocal done
        tensors = tensors_of(module)
        done += 1
        if on_module is not None:
            on_module(module, done, len(modules))
        return tensors

    for path, kept, here in _by_file(checkpoint, modules):
        if not kept and not here:
            continue
        ready = {} if layout_of else {m: produce(m) for m in here}
        layout: Layout = {
            n: (checkpoint.tensors[n].shape, checkpoint.tensors[n].dtype) for n in kept
        }
        for module in here:
            layout |= layout_of(module) if layout_of else _layout(ready[module])
        target.reserve(layout_nbytes(layout))
        with target.shard(path.name, layout) as shard:
            for name in kept:
                shard.write(name, checkpoint.load(name))
            for module in here:
                for name, tensor in (ready.pop(module) if ready else produce(module)).items():
                    shard.write(name, tensor)


def _layout(tensors: dict[str, torch.Tensor]) -> Layout:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
