"""The linear method of foreign checkpoints: decode each matrix, then load it like a native one.

vLLM hands over one tensor at a time. The tensors of one logical matrix wait until all are there;
the importer turns the whole matrix into the canonical layout, and vLLM's own loaders take this
rank's rows or columns of that. So any tensor-parallel size works without a collective, at the
price of one matrix of temporary memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from vllm.model_executor.layers.linear import register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import BasevLLMParameter

from flute_vllm.errors import FluteError
from flute_vllm.format import SCALE_DTYPES, TENSOR_NAMES
from flute_vllm.importers import Importer
from flute_vllm.plugin.linear import FluteLinearMethod, check_shardable
from flute_vllm.plugin.order import LayerOrder
from flute_vllm.plugin.tracking import check_tensor, expected_rows


@register_weight_loader_v2_supported_method
class ForeignLinearMethod(FluteLinearMethod):
    """A layer whose checkpoint tensors an importer decodes while vLLM loads them."""

    def __init__(
        self, prefix: str, importer: Importer, modules: list[str], order: LayerOrder | None = None
    ) -> None:
        super().__init__(prefix, importer.layer_spec(), order)
        self.importer = importer
        self.modules = modules  # checkpoint names of the matrices that the layer fuses

    def module_name(self, shard_id: Hashable) -> str:
        """Checkpoint name of one matrix; importers look up per-module facts by it."""
        index = {"q": 0, "k": 1, "v": 2, None: 0}.get(shard_id, shard_id)
        is_known = isinstance(index, int) and index < len(self.modules)
        return self.modules[index] if is_known else f"{self.prefix} (matrix {shard_id})"

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ) -> None:
        check_shardable(self.prefix, self.spec, input_size, input_size_per_partition)
        self.prepare(layer, input_size_per_partition, output_partition_sizes, params_dtype)
        layer.flute_scale_dtype = None
        collector = _Collector(
            self, layer, extra_weight_attrs["weight_loader"], input_size, output_size
        )
        # The config of a foreign checkpoint need not tell the dtype of its scales. float32 holds
        # either exactly until the first tensor shows it.
        native = self.make_parameters(
            sum(output_partition_sizes), input_size_per_partition, len(output_partition_sizes),
            torch.float32, collector.loader,
        )  # fmt: skip
        for name, parameter in native.items():
            layer.register_parameter(name, parameter)
        # vLLM's reload counts what a loader copies, at most the size of its parameter, and passes
        # over a layer for which it counted nothing: hence one element, not none. Its dtype must
        # hold that of the tensor, or vLLM warns for each tensor of the checkpoint.
        for suffix in self.importer.tensor_suffixes:
            if suffix not in native:
                placeholder = BasevLLMParameter(
                    data=torch.zeros(1, dtype=self.importer.tensor_dtypes[suffix]),
                    weight_loader=collector.loader(suffix),
                )
                layer.register_parameter(suffix, placeholder)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.check_loaded(layer, self.importer.required_suffixes)
        for suffix in self.importer.tensor_suffixes:
            if suffix not in TENSOR_NAMES:
                delattr(layer, suffix)
        scale_dtype = layer.flute_scale_dtype or self.spec.torch_scale_dtype
        layer.scales.data = layer.scales.data.to(scale_dtype)
        layer.table.data = layer.table.data.to(scale_dtype)
        layer.flute_scale_dtype = None  # a reload may bring another one
        self.finish(layer)


class _Collector:
    """Waiting tensors of the matrices of one layer, by shard id."""

    def __init__(
        self,
        method: ForeignLinearMethod,
        layer: torch.nn.Module,
        inner: Callable,
        input_size: int,
        output_size: int,
    ) -> None:
        self.method, self.layer, self.inner = method, layer, inner
        self.input_size, self.output_size = input_size, output_size
        self.waiting: dict[Hashable, dict[str, torch.Tensor]] = {}

    def loader(self, suffix: str) -> Callable:
        def load(param, loaded_weight, loaded_shard_id=None):
            self.layer.flute_account.record(suffix, loaded_shard_id)
            if suffix not in self.method.importer.tensor_suffixes:
                raise FluteError(
                    f"unexpected tensor {suffix}", where=f"{self.method.prefix}.{suffix}",
                    why=f"the {self.method.importer.name} layout has "
                    f"{', '.join(self.method.importer.tensor_suffixes)}",
                    fix="download the checkpoint again",
                )  # fmt: skip
            if suffix in self.method.importer.ignored_suffixes:
                return
            tensors = self.waiting.setdefault(loaded_shard_id, {})
            tensors[suffix] = loaded_weight
            if all(name in tensors for name in self.method.importer.required_suffixes):
                self._decode(loaded_shard_id, self.waiting.pop(loaded_shard_id))

        return load

    def _decode(self, shard_id: Hashable, tensors: dict[str, torch.Tensor]) -> None:
        method, layer = self.method, self.layer
        where = method.module_name(shard_id)
        native = method.importer.to_native(where, tensors)
        spec = native.spec
        if (spec.bits, spec.group_size) != (method.spec.bits, method.spec.group_size):
            raise FluteError(
                "tensors contradict the config", where=where,
                why=f"the tensors hold {spec.bits} bits with group_size {spec.group_size}, the "
                f"config {method.spec.bits} bits with group_size {method.spec.group_size}",
                fix="restore the config file that belongs to the checkpoint",
            )  # fmt: skip
        if layer.flute_scale_dtype not in (None, spec.torch_scale_dtype):
            raise FluteError(
                "mixed scale dtypes", where=where,
                why=f"this matrix has {spec.scale_dtype}, another of the fused layer "
                f"{layer.flute_scale_dtype}",
                fix=f"store all scales as one of {', '.join(SCALE_DTYPES)}",
            )  # fmt: skip
        layer.flute_scale_dtype = spec.torch_scale_dtype
        rows = expected_rows(layer, self.output_size, shard_id)
        words = spec.words_per_row(self.input_size)
        check_tensor(f"{where}.weight, decoded", native.qweight, (rows, words), torch.int32)
        for name in TENSOR_NAMES:
            # The parameter is looked up here: a reload replaces it.
            FluteLinearMethod.load_part(
                layer, name, self.inner, getattr(layer, name), getattr(native, name), shard_id
            )
