"""What a checkpoint is, from its headers: format, bits, sizes, tensor-parallel sizes."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from math import gcd, prod
from pathlib import Path
from typing import Any

from flute_vllm.checkpoint import Checkpoint, read_json
from flute_vllm.convert import ForeignSource, NativeSource, open_source
from flute_vllm.format import PER_ROW, UNIT
from flute_vllm.validate import module_shape

# Linear layers whose input is split over tensor-parallel ranks in vLLM's decoder models.
ROW_PARALLEL = ("o_proj", "down_proj", "out_proj", "dense", "dense_4h_to_h", "w2", "c_proj", "fc2")
_LARGEST_TP = 64


@dataclass(frozen=True)
class ModuleInfo:
    """One quantized module. ``nbytes`` counts codes, scales and table."""

    name: str
    bits: int
    group_size: int
    out_features: int
    in_features: int
    nbytes: int

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features


def describe(folder: str | Path) -> dict[str, Any]:
    """Summary of a native, foreign or dense checkpoint as plain JSON data; reads no weight.

    Native checkpoints are validated on the way. Raises FluteError.
    """
    source = open_source(folder)
    checkpoint = source if isinstance(source, Checkpoint) else source.checkpoint
    modules = [] if isinstance(source, Checkpoint) else _modules(source)
    consumed = set() if isinstance(source, Checkpoint) else {
        name for names in source.modules().values() for name in names
    }  # fmt: skip
    dense = [name for name in checkpoint.tensors if name not in consumed]
    weights = sum(module.weights for module in modules)
    dense_values = sum(prod(checkpoint.tensors[name].shape) for name in dense)
    return {
        "path": str(checkpoint.folder),
        "format": _format_name(source),
        "format_version": source.config.format_version
        if isinstance(source, NativeSource)
        else None,
        "architecture": (checkpoint.config.get("architectures") or [None])[0],
        "files": len(checkpoint.files),
        "bytes": checkpoint.nbytes,
        "quantized_modules": len(modules),
        "dense_tensors": len(dense),
        "parameters": weights + dense_values,
        "bits": {
            str(bits): count
            for bits, count in sorted(Counter(module.bits for module in modules).items())
        },
        "bits_per_weight": {
            "codes": sum(m.bits * m.weights for m in modules) / weights if weights else None,
            "linears": sum(m.nbytes for m in modules) * 8 / weights
            if weights
            else _dense_bits(checkpoint),
            "checkpoint": checkpoint.nbytes * 8 / max(1, weights + dense_values),
        },
        "tensor_parallel_sizes": tensor_parallel_sizes(checkpoint.config, modules),
        "error": _mean_error(checkpoint),
        "modules": [asdict(module) for module in modules],
        "tensors": [
            {
                "name": info.name,
                "dtype": str(info.dtype).removeprefix("torch."),
                "shape": list(info.shape),
                "bytes": info.nbytes,
                "file": info.file.name,
            }
            for info in checkpoint.tensors.values()
        ],
    }


def tensor_parallel_sizes(config: dict[str, Any], modules: list[ModuleInfo]) -> list[int]:
    """Numbers of ranks that split heads and, for row-parallel modules, whole groups evenly.

    Key-value heads need not divide: vLLM repeats them when there are more ranks than heads.
    """
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    limits = [text.get("num_attention_heads")]
    for module in modules:
        if module.name.rpartition(".")[2] in ROW_PARALLEL:
            step = UNIT if module.group_size == PER_ROW else module.group_size
            limits.append(module.in_features // step)
    known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    if not known:
        return [1]
    common = gcd(*known)
    kv_heads = text.get("num_key_value_heads") or text.get("num_attention_heads") or 1
    return [
        ranks
        for ranks in range(1, min(common, _LARGEST_TP) + 1)
        if common % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)
    ]


def _modules(source: NativeSource | ForeignSource) -> list[ModuleInfo]:
    tensors = source.checkpoint.tensors
    found = []
    for module, names in source.modules().items():
        nbytes = sum(tensors[name].nbytes for name in names)
        if isinstance(source, NativeSource):
            spec = source.config.spec_for(module)
            shape = module_shape(source.checkpoint, module, spec.bits)
        else:
            spec = source.importer.layer_spec()
            # Every foreign format read so far stores scales [N, K / group_size].
            rows, groups = tensors[f"{module}.scales"].shape
            shape = (rows, groups * spec.group_size)
        found.append(ModuleInfo(module, spec.bits, spec.group_size, *shape, nbytes))
    return found


def _dense_bits(checkpoint: Checkpoint) -> float | None:
    """Mean bits of a value in the matrices of a dense checkpoint."""
    matrices = [info for info in checkpoint.tensors.values() if len(info.shape) == 2]
    values = sum(prod(info.shape) for info in matrices)
    return sum(info.nbytes for info in matrices) * 8 / values if values else None


def _format_name(source: NativeSource | ForeignSource | Checkpoint) -> str:
    if isinstance(source, Checkpoint):
        return "dense"
    return "flute_vllm" if isinstance(source, NativeSource) else source.importer.name


def _mean_error(checkpoint: Checkpoint) -> float | None:
    """Relative squared error that the quantizer noted, if it left a report."""
    path = checkpoint.folder / "report.json"
    if not path.exists():
        return None
    totals = read_json(path).get("totals")
    error = totals.get("mean_error") if isinstance(totals, dict) else None
    return error if isinstance(error, float) else None
