"""Which tensors of a layer have been loaded, and whether they are what the layer needs.

vLLM does not report a quantized parameter that the checkpoint lacks, and cuts a tensor of the
wrong size to fit without a word. Both would serve garbage, so the layer keeps its own account.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from flute_vllm.errors import FluteError

WHOLE = "whole"  # stands for all matrices of a layer that is fused in the checkpoint too


class LoadAccount:
    """Tensors seen by the weight loaders of one layer, by name and matrix."""

    def __init__(self, prefix: str, parts: list[Hashable]) -> None:
        self.prefix = prefix
        self.parts = parts
        self._seen: dict[str, set[Hashable]] = {}

    def record(self, name: str, shard_id: Hashable | tuple | None) -> None:
        seen = self._seen.setdefault(name, set())
        if shard_id is None:
            seen.add(WHOLE)
        elif isinstance(shard_id, tuple):
            seen.update(shard_id)
        else:
            seen.add(shard_id)

    def is_empty(self) -> bool:
        return not self._seen

    def reset(self) -> None:
        """Starts over, for a reload of the weights."""
        self._seen.clear()

    def check_complete(self, names: tuple[str, ...]) -> None:
        """Raises FluteError that names the first missing tensor."""
        for name in names:
            seen = self._seen.get(name, set())
            missing = [] if WHOLE in seen else [part for part in self.parts if part not in seen]
            if missing:
                which = (
                    "" if self.parts == [WHOLE] else f" (matrix {missing[0]} of the fused layer)"
                )
                raise FluteError(
                    f"missing tensor {name}", where=f"{self.prefix}.{name}{which}",
                    why="the checkpoint holds other tensors of the model, not this one",
                    fix="download or quantize the checkpoint again",
                )  # fmt: skip


def layer_parts(layer: torch.nn.Module) -> list[Hashable]:
    """Shard ids that vLLM's loaders use for the matrices of a layer."""
    if hasattr(layer, "total_num_kv_heads"):
        return ["q", "k", "v"]
    sizes = getattr(layer, "output_sizes", None)
    return list(range(len(sizes))) if sizes and len(sizes) > 1 else [WHOLE]


def expected_rows(layer: torch.nn.Module, output_size: int, shard_id: object) -> int | None:
    """out_features of the unsharded matrix ``shard_id``; None where the layer does not tell."""
    if hasattr(layer, "org_vocab_size"):  # a head: output_size counts vLLM's padding too
        return layer.org_vocab_size
    if hasattr(layer, "total_num_kv_heads"):
        value_size = getattr(layer, "v_head_size", layer.head_size)
        rows = {
            "q": layer.total_num_heads * layer.head_size,
            "k": layer.total_num_kv_heads * layer.head_size,
            "v": layer.total_num_kv_heads * value_size,
        }
        return sum(rows.values()) if shard_id is None else rows.get(shard_id)
    sizes = getattr(layer, "output_sizes", None) or [output_size]
    if shard_id is None:
        return sum(sizes)
    if isinstance(shard_id, tuple):
        return sum(sizes[index] for index in shard_id)
    return sizes[shard_id] if isinstance(shard_id, int) else None


def check_tensor(
    where: str,
    tensor: torch.Tensor,
    shape: tuple[int | None, ...],
    dtype: torch.dtype,
) -> None:
    """Raises FluteError unless an unsharded tensor has ``shape`` (None: any) and ``dtype``."""
    if tensor.dtype != dtype:
        raise FluteError(
            "wrong dtype", where=where,
            why=f"the checkpoint has {tensor.dtype}, its config announces {dtype}",
            fix="make scale_dtype and the tensors agree, or quantize the checkpoint again",
        )  # fmt: skip
    fits = tensor.dim() == len(shape) and all(
        want is None or want == have for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("*" if want is None else str(want) for want in shape)
        raise FluteError(
            "wrong shape", where=where,
            why=f"the checkpoint has {list(tensor.shape)}, the model needs [{wanted}]",
            fix="the checkpoint was made for another model or other settings; quantize it again",
        )  # fmt: skip


def check_finite(where: str, tensor: torch.Tensor) -> None:
    """Raises FluteError when a loaded tensor holds NaN or infinity."""
    bad = ~torch.isfinite(tensor)
    if bool(bad.any()):
        raise FluteError(
            "not a finite number", where=where,
            why=f"{int(bad.sum())} of {tensor.numel()} values are NaN or infinite",
            fix="quantize the checkpoint again from clean weights",
        )  # fmt: skip
