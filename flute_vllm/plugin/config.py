"""``FluteConfig``: from a checkpoint's quantization config to the method of each vLLM layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from flute_vllm.errors import FluteError
from flute_vllm.format import LayerSpec
from flute_vllm.importers import Importer, find, from_config
from flute_vllm.plugin.foreign import ForeignLinearMethod
from flute_vllm.plugin.head import FluteHeadMethod
from flute_vllm.plugin.linear import FluteLinearMethod
from flute_vllm.plugin.order import LayerOrder
from flute_vllm.schema import QUANT_METHOD, FluteQuantizationConfig, module_matches

# Where a class of vLLM has no packed_modules_mapping (StableLM, GPT-J).
USUALLY_PACKED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}


class FluteConfig(QuantizationConfig):
    """Either a native checkpoint (``schema``) or one in a foreign layout (``importer``).

    Holds plain data only: vLLM pickles and deep-copies it between processes.
    """

    def __init__(
        self,
        schema: FluteQuantizationConfig | None = None,
        importer: Importer | None = None,
    ) -> None:
        super().__init__()
        self.schema = schema
        self.importer = importer
        # Quantized modules of the checkpoint, None while its headers were not read.
        self.quantized_modules: frozenset[str] | None = None
        # Native checkpoints: every stored matrix by the checkpoint's name and, once vLLM's are
        # known, by vLLM's; None for a dense one.
        self.stored: dict[str, LayerSpec | None] = {}
        self.order = LayerOrder()

    def __repr__(self) -> str:
        if self.importer is not None:
            return f"FluteConfig(layout={self.importer.name}, spec={self.importer.layer_spec()})"
        return f"FluteConfig({self.schema})"

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        # Read only with --quantization flute, for a config.json without quantization_config.
        return ["flute_config.json"]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FluteConfig:
        if config.get("quant_method") == QUANT_METHOD:
            return cls(schema=FluteQuantizationConfig.parse(config))
        return cls(importer=from_config(config))

    def maybe_update_config(self, model_name: str, hf_config=None, revision=None) -> None:
        """Checks the headers of a local checkpoint before any weight is read.

        A hub id that vLLM has yet to download is checked tensor by tensor while it loads.
        """
        folder = Path(model_name)
        if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
            return
        from flute_vllm.checkpoint import Checkpoint
        from flute_vllm.completeness import check_complete

        checkpoint = Checkpoint(folder)
        if self.schema is not None:
            from flute_vllm.validate import quantized_modules, validate_checkpoint

            validate_checkpoint(checkpoint)
            self.quantized_modules = frozenset(quantized_modules(checkpoint))
            dense = (n.removesuffix(".weight") for n in checkpoint.tensors if n[-7:] == ".weight")
            self.stored = dict.fromkeys(dense)
            self.stored.update({m: self.schema.spec_for(m) for m in self.quantized_modules})
            check_complete(checkpoint, set(self.quantized_modules))
            return
        # What the folder says beyond the parsed file (tile hints) belongs to the importer too.
        self.importer = find(checkpoint) or self.importer
        self.quantized_modules = frozenset(self.importer.modules(checkpoint))
        if not self.quantized_modules:
            raise FluteError(
                "no quantized module in the checkpoint", where=str(folder),
                why=f"flute_config.json announces the {self.importer.name} layout, and no tensor "
                "has it", fix="drop --quantization flute to serve the dense weights",
            )  # fmt: skip
        check_complete(checkpoint, set(self.quantized_modules))

    def apply_vllm_mapper(self, hf_to_vllm_mapper) -> None:
        """Adds vLLM's module names to those of the checkpoint in the config's patterns."""
        if self.schema is None:
            return
        for name, spec in list(self.stored.items()):
            for renamed in hf_to_vllm_mapper.apply_list([name]):
                self.stored.setdefault(renamed, spec)

        def both(pattern: str) -> list[str]:
            is_name = not pattern.startswith("re:")
            return [pattern, *(hf_to_vllm_mapper.apply_list([pattern]) if is_name else [])]

        # Each mapped pattern stands beside its original: the first match counts.
        skipped = [name for p in self.schema.modules_to_not_convert for name in both(p)]
        overrides = {n: change for p, change in self.schema.overrides.items() for n in both(p)}
        self.schema = self.schema.model_copy(
            update={
                "modules_to_not_convert": list(dict.fromkeys(skipped)),
                "overrides": overrides,
            }
        )

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        # Embeddings, attention and routed experts stay dense: None means vLLM's default.
        if isinstance(layer, ParallelLMHead):
            return self._head_method(prefix)
        if not isinstance(layer, LinearBase):
            return None
        if self.importer is not None:
            modules = self.checkpoint_modules(prefix)
            if self.quantized_modules is not None and not self._has_quantized(modules):
                return UnquantizedLinearMethod()
            return ForeignLinearMethod(prefix, self.importer, modules, self.order)
        is_fused = isinstance(layer, (MergedColumnParallelLinear, QKVParallelLinear))
        spec = self.common_spec(prefix, self.stored_modules(prefix), is_fused)
        return (
            UnquantizedLinearMethod()
            if spec is None
            else FluteLinearMethod(prefix, spec, self.order)
        )

    def _head_method(self, prefix: str) -> QuantizeMethodBase | None:
        """Of an output head, whose rows vLLM shards and pads; only native checkpoints have one.

        A head is often absent from a checkpoint (tied) whose config does not name it as dense, and
        some models do not tell its name: what the headers have decides, where they were read.
        """
        spec = self.schema.spec_for(prefix) if self.schema is not None and prefix else None
        is_stored = self.quantized_modules is None or self._has_quantized([prefix])
        return FluteHeadMethod(prefix, spec, self.order) if spec and is_stored else None

    def checkpoint_modules(self, prefix: str) -> list[str]:
        """Names in the checkpoint of the matrices that vLLM fuses into the layer ``prefix``."""
        parent, _, name = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(name, [name])
        return [f"{parent}.{part}" if parent else part for part in parts]

    def stored_modules(self, prefix: str) -> list[str]:
        """The modules of :meth:`checkpoint_modules` that are there, as far as headers were read.

        vLLM's packed names are those of its usual checkpoints: a matrix may be fused on disk
        already (gate_up_proj of GLM-4), or lack a part (v_proj where values are the keys).
        """
        parts = self.checkpoint_modules(prefix)
        parent, _, name = prefix.rpartition(".")
        usual = [f"{parent}.{part}" for part in USUALLY_PACKED.get(name, ())]
        for modules in ([prefix], parts, usual):
            found = [module for module in modules if self._find(module) is not None]
            if found:
                return found
        return parts

    def common_spec(
        self, prefix: str, modules: list[str], is_fused: bool = False
    ) -> LayerSpec | None:
        """Spec shared by the matrices of a layer, None for dense ones. Raises FluteError when they
        differ. ``is_fused``: vLLM made it of several, whose names may not be known."""
        specs = {module: self._spec(module, is_fused) for module in modules}
        if len(set(specs.values())) > 1:
            listing = ", ".join(
                f"{module.rpartition('.')[2]}: {_describe(spec)}" for module, spec in specs.items()
            )
            raise FluteError(
                "fused matrices are stored differently", where=prefix,
                why=f"vLLM computes them as one layer, and the checkpoint has {listing}",
                fix="requantize with the same bits and group size for all of them",
            )  # fmt: skip
        return specs[modules[0]]

    def _spec(self, module: str, is_fused: bool) -> LayerSpec | None:
        """What the checkpoint says of a module: what is stored, else what the config expects."""
        name = self._find(module)
        if name is not None:
            return self.stored[name]
        leaf = module.rpartition(".")[2]
        quantized = {n.rpartition(".")[2] for n, spec in self.stored.items() if spec is not None}
        # Layers that vLLM adds to a model (the score of a reranker) are in no checkpoint of ours.
        # Some it does not name at all (q_a_proj of MiniCPM3).
        is_added = self.stored and leaf and not is_fused and leaf not in quantized
        return None if is_added else self.schema.spec_for(module)

    def _find(self, module: str) -> str | None:
        """The stored name of a module; vLLM may prefix it (language_model.model...)."""
        parts = module.split(".")
        # A last component alone (a top-level fc) says nothing about a module deep inside.
        names = (".".join(parts[first:]) for first in range(max(1, len(parts) - 1)))
        return next((name for name in names if name in self.stored), None)

    def _has_quantized(self, modules: list[str]) -> bool:
        """Whether the checkpoint's headers have one of these modules quantized."""
        # vLLM may prefix names (language_model.model...), hence component matching.
        return any(
            module in self.quantized_modules
            or any(module_matches(known, module) for known in self.quantized_modules)
            for module in modules
        )


def _describe(spec: LayerSpec | None) -> str:
    return "dense" if spec is None else f"{spec.bits} bits, group_size {spec.group_size}"
