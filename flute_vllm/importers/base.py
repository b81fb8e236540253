"""What every foreign checkpoint format offers: one small interface and the helpers they share.

An importer never touches files of weights. Its caller (the CLI, or the vLLM plugin while weights
stream in) collects the tensors of one logical matrix and gets the canonical tensors back:

1. :func:`flute_vllm.importers.find` or :func:`~flute_vllm.importers.from_config` picks it;
2. tensors named ``<module>.<suffix>`` with a suffix in ``required_suffixes`` are collected, those
   in ``ignored_suffixes`` dropped, all others (biases, norms, embeddings) pass through unchanged;
3. :meth:`Importer.to_native` turns the complete, unsharded matrix into a :class:`NativeLayer`,
   which the caller may slice for its tensor-parallel rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from flute_vllm.checkpoint import Checkpoint, TensorInfo
from flute_vllm.errors import FluteError
from flute_vllm.format import FORMAT_VERSION, LayerSpec, dequantize
from flute_vllm.schema import HEAD, QUANT_METHOD

DEFAULT_SKIPPED = (HEAD,)


class NativeLayer(NamedTuple):
    """One linear layer in the native format (:mod:`flute_vllm.format`)."""

    qweight: torch.Tensor
    scales: torch.Tensor
    table: torch.Tensor
    spec: LayerSpec

    def tensors(self) -> dict[str, torch.Tensor]:
        """The three tensors under the names that a checkpoint gives them."""
        return {"qweight": self.qweight, "scales": self.scales, "table": self.table}

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Dense weight [N, K], rounded once to ``dtype`` (the dtype of the scales when None)."""
        return dequantize(self.qweight, self.scales, self.table, self.spec.bits, dtype)


class Importer(Protocol):
    """One foreign format, bound to the configuration of one checkpoint.

    Suffixes are everything after ``<module>.``, so they may hold dots (bitsandbytes has
    ``weight.absmax``), and they may depend on the configuration: nested scales or pair tables
    add required ones. ``tensor_dtypes`` tells the dtype of each suffix's tensor before it is there;
    where the format leaves a choice, one that holds all of them exactly.
    """

    name: str
    required_suffixes: tuple[str, ...]
    ignored_suffixes: tuple[str, ...]
    tensor_dtypes: Mapping[str, torch.dtype]

    @property
    def tensor_suffixes(self) -> tuple[str, ...]:
        """All suffixes a quantized module may have: the required, then the ignored ones."""

    @classmethod
    def read_config(cls, folder: Path) -> dict[str, Any] | None:
        """The configuration object in a folder, or None when it is not of this format."""

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Whether a configuration object (without its file name) is of this format."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str | None = None) -> Importer:
        """Checks the configuration. Raises FluteError that names the field at fault."""

    def modules(self, checkpoint: Checkpoint) -> list[str]:
        """Quantized modules, checked from the headers alone; no weight is read."""

    def to_native(self, module: str, tensors: Mapping[str, torch.Tensor]) -> NativeLayer:
        """Canonical tensors of one matrix from its full foreign tensors, keyed by suffix."""

    def layer_spec(self, scale_dtype: str = "float16") -> LayerSpec:
        """The spec known from the configuration alone; only the tensors know the scale dtype."""

    def native_config(
        self, specs: Mapping[str, LayerSpec], skipped: Sequence[str] = DEFAULT_SKIPPED
    ) -> dict[str, Any]:
        """``quantization_config`` of the converted checkpoint, from the spec of each module.

        With no specs it describes what the configuration alone promises, which is what a loader
        needs before the first tensor arrives.
        """


def build_native_config(
    default: LayerSpec, specs: Mapping[str, LayerSpec], skipped: Sequence[str]
) -> dict[str, Any]:
    """``quantization_config`` with the most frequent spec on top and an override for each other.

    Raises FluteError when the modules disagree on the scale dtype, which the format stores once.
    """
    dtypes = {spec.scale_dtype: module for module, spec in specs.items()}
    if len(dtypes) > 1:
        (first, module), (second, other) = list(dtypes.items())[:2]
        raise FluteError(
            "modules with different scale dtypes",
            where=f"{module} and {other}",
            why=f"their scales are {first} and {second}; the native format has one for all",
            fix="cast the scales and tables of the source to one dtype first",
        )
    if specs:
        default = Counter(specs.values()).most_common(1)[0][0]
    fields = ("bits", "group_size", "table_kind")
    overrides = {
        module: {f: getattr(spec, f) for f in fields if getattr(spec, f) != getattr(default, f)}
        for module, spec in specs.items()
        if spec != default
    }
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "bits": default.bits,
        "group_size": default.group_size,
        "scale_dtype": default.scale_dtype,
        "table_kind": default.table_kind,
        "modules_to_not_convert": list(skipped),
        "overrides": overrides,
    }


def group_by_module(
    checkpoint: Checkpoint, suffixes: Sequence[str]
) -> dict[str, dict[str, TensorInfo]]:
    """Header entries of each module that has a tensor with one of ``suffixes``.

    The longest suffix wins, so that ``weight.absmax`` is not taken for a module ``<m>.weight``.
    """
    by_length = sorted(suffixes, key=len, reverse=True)
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in checkpoint.tensors.items():
        for suffix in by_length:
            if name.endswith(f".{suffix}"):
                found.setdefault(name.removesuffix(f".{suffix}"), {})[suffix] = info
                break
    return found


def require(module: str, present: Mapping[str, object], required: Sequence[str], fix: str) -> None:
    """Raises FluteError naming the tensors that a quantized module lacks."""
    missing = [suffix for suffix in required if suffix not in present]
    if missing:
        raise FluteError(
            "missing tensor",
            where=f"{module}.{missing[0]}",
            why=f"a quantized module has {', '.join(required)}; this one has "
            f"{', '.join(sorted(present)) or 'none of them'}",
            fix=fix,
        )


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raises FluteError for NaN or infinity, with how many and where the first one is."""
    bad = ~torch.isfinite(tensor)
    if bool(bad.any()):
        first = bad.nonzero()[0].tolist()
        raise FluteError(
            "non-finite values",
            where=name,
            why=f"{int(bad.sum())} of {tensor.numel()} values are NaN or infinite, the first at "
            f"{first}",
            fix="the checkpoint is damaged or was cast wrongly; download or quantize it again",
        )
