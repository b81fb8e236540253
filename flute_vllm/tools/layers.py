"""The linear layers of a model as vLLM runs them: matrices that it fuses count as one layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flute_vllm.checkpoint import Checkpoint
from flute_vllm.convert import NativeSource, open_source
from flute_vllm.errors import FluteError
from flute_vllm.format import LayerSpec
from flute_vllm.validate import fused_siblings, module_shape

FUSED_NAMES = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}


@dataclass(frozen=True)
class LinearLayer:
    """Equal layers of a model: ``count`` of them, named by their last part.

    ``parts``: out_features of each fused matrix; ``n``, ``k``: out_features and in_features.
    """

    name: str
    parts: tuple[int, ...]
    k: int
    spec: LayerSpec
    count: int = 1

    @property
    def n(self) -> int:
        return sum(self.parts)

    @property
    def is_pair(self) -> bool:
        """Whether its table holds pairs, which not every kernel takes."""
        return self.spec.table_kind == "pair"

    def sizes(self, m: int) -> tuple[int, int, int, int, int, tuple[int, ...], bool]:
        """Of a product with m rows of x, in the order of ``tuning.Problem`` and its like."""
        spec = self.spec
        return self.n, self.k, m, spec.bits, spec.group_size, self.parts, self.is_pair


def model_layers(folder: str | Path, default: LayerSpec) -> list[LinearLayer]:
    """Distinct quantized layers of a checkpoint, in its order; reads headers only.

    ``default`` is the spec that a dense checkpoint's layers would have.

    Raises FluteError: an unreadable checkpoint, or no layer that could be quantized.
    """
    found = _matrices(folder, default)
    if not found:
        raise FluteError(
            "no quantized layers", where=str(folder), why="the checkpoint has no such module",
            fix="pass a checkpoint made by flute-vllm quantize, or a dense decoder model",
        )  # fmt: skip
    return group_layers(found)


def _matrices(folder: str | Path, default: LayerSpec) -> dict[str, tuple[int, int, LayerSpec]]:
    """(out_features, in_features, spec) of each module, by name."""
    source = open_source(folder)
    if isinstance(source, Checkpoint):
        from flute_vllm.quantize.structure import select_modules

        linears = select_modules(source).linears
        for name, (_, columns) in linears.items():
            default.check_in_features(columns, name)
        return {name: (*shape, default) for name, shape in linears.items()}
    found = {}
    for module in source.modules():
        if isinstance(source, NativeSource):
            spec = source.config.spec_for(module)
            shape = module_shape(source.checkpoint, module, spec.bits)
        else:
            spec = source.importer.layer_spec()
            rows, groups = source.checkpoint.tensors[f"{module}.scales"].shape
            shape = (rows, groups * spec.group_size)
        found[module] = (*shape, spec)
    return found


def group_layers(matrices: dict[str, tuple[int, int, LayerSpec]]) -> list[LinearLayer]:
    """Fuses siblings, then merges equal layers."""
    counts: dict[LinearLayer, int] = {}
    done: set[str] = set()
    for name, (_, k, spec) in matrices.items():
        if name in done:
            continue
        siblings = [n for n in fused_siblings(name) if n in matrices]
        done.update(siblings)
        leaf = siblings[0].rpartition(".")[2]
        label = FUSED_NAMES.get(leaf, leaf) if len(siblings) > 1 else leaf
        layer = LinearLayer(label, tuple(matrices[n][0] for n in siblings), k, spec)
        counts[layer] = counts.get(layer, 0) + 1
    return [
        LinearLayer(layer.name, layer.parts, layer.k, layer.spec, count)
        for layer, count in counts.items()
    ]


def parse_rows(text: str) -> list[int]:
    """Numbers of rows of x from "1,8,64". Raises FluteError."""
    try:
        rows = [int(item) for item in text.split(",")]
    except ValueError:
        rows = []
    if not rows or min(rows) < 1:
        raise FluteError(
            "cannot read the numbers of rows", where=f"--rows {text}",
            why="it must be positive numbers with commas between them", fix="for example 1,8,64",
        )  # fmt: skip
    return rows
