"""The linear method of native checkpoints: parameters, loading, checks and the forward call."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch
from torch.nn import Parameter
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
    PerTensorScaleParameter,
)
from vllm.model_executor.utils import replace_parameter

from flute_vllm import ops, tuning
from flute_vllm.errors import FluteError
from flute_vllm.format import PER_ROW, TENSOR_NAMES, UNIT, LayerSpec
from flute_vllm.plugin import fusion
from flute_vllm.plugin.order import LayerOrder, next_weight
from flute_vllm.plugin.tracking import (
    LoadAccount,
    check_finite,
    check_tensor,
    expected_rows,
    layer_parts,
)

logger = init_logger("vllm.flute")


@register_weight_loader_v2_supported_method
class FluteLinearMethod(LinearMethodBase):
    """One quantized linear layer of vLLM, possibly several fused matrices with a table each.

    After loading the layer holds ``qweight`` int32 [N, K / 32 * bits], ``scales``
    [N, K / group_size] and ``table`` [matrices, 2**bits], N and K being this rank's share.
    """

    def __init__(self, prefix: str, spec: LayerSpec, order: LayerOrder | None = None) -> None:
        self.prefix = prefix
        self.spec = spec
        self.order = order or LayerOrder()
        self.ahead_bytes = tuning.ahead_bytes()

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
        inner = extra_weight_attrs["weight_loader"]

        def loader(name: str) -> Callable:
            return self._checked_loader(layer, name, inner, input_size, output_size)

        rows, columns = sum(output_partition_sizes), input_size_per_partition
        for name, parameter in self.make_parameters(
            rows, columns, len(output_partition_sizes), self.spec.torch_scale_dtype, loader
        ).items():
            layer.register_parameter(name, parameter)
        self._announce()

    def prepare(self, layer, in_features: int, parts: list[int], dtype: torch.dtype) -> None:
        """Notes on the layer what loading and the forward call need beside its tensors."""
        ops.load()
        fusion.install()
        layer.flute_account = LoadAccount(self.prefix, layer_parts(layer))
        layer.flute_in_features = in_features
        layer.flute_parts = list(parts)
        layer.flute_dtype = dtype  # of activations
        layer.flute_plan = []  # launches of the GPU kernels, once the weights are there
        layer.flute_plan_parts = None  # the same, to look up one
        layer.flute_order, layer.flute_place = None, 0  # plugin/order.py

    def make_parameters(
        self,
        rows: int,
        columns: int,
        matrices: int,
        scale_dtype: torch.dtype,
        loader: Callable[[str], Callable],
    ) -> dict[str, BasevLLMParameter]:
        """Parameters in the canonical layout; NaN marks what no loader has filled."""
        spec = self.spec
        scales = torch.full((rows, spec.num_groups(columns)), float("nan"), dtype=scale_dtype)
        if spec.group_size == PER_ROW:
            scales_parameter = ChannelQuantScaleParameter(
                data=scales, output_dim=0, weight_loader=loader("scales")
            )
        else:
            scales_parameter = GroupQuantScaleParameter(
                data=scales, input_dim=1, output_dim=0, weight_loader=loader("scales")
            )
        table = torch.full((matrices, *spec.table_shape), float("nan"), dtype=scale_dtype)
        return {
            "qweight": PackedvLLMParameter(
                data=torch.zeros(rows, spec.words_per_row(columns), dtype=torch.int32),
                input_dim=1,
                output_dim=0,
                packed_dim=1,
                packed_factor=Fraction(32, spec.bits),
                weight_loader=loader("qweight"),
            ),
            "scales": scales_parameter,
            "table": PerTensorScaleParameter(data=table, weight_loader=loader("table")),
        }

    def _checked_loader(
        self,
        layer: torch.nn.Module,
        name: str,
        inner: Callable,
        input_size: int,
        output_size: int,
    ) -> Callable:
        """vLLM's loader for one parameter, behind a check of the whole tensor on disk."""

        def load(param, loaded_weight, loaded_shard_id=None):
            where = f"{self.prefix}.{name}" + (
                "" if loaded_shard_id is None else f" (matrix {loaded_shard_id} of the fused layer)"
            )
            shape, dtype = self.spec.tensor_layout(1, input_size)[name]
            if name != "table":
                shape = (expected_rows(layer, output_size, loaded_shard_id), shape[1])
            check_tensor(where, loaded_weight, shape, dtype)
            self.load_part(layer, name, inner, param, loaded_weight, loaded_shard_id)

        return load

    @staticmethod
    def load_part(layer, name: str, inner: Callable, param, tensor, shard_id) -> None:
        """Hands an unsharded canonical tensor to vLLM's loader, which takes this rank's share."""
        if name == "table":
            tensor = tensor.unsqueeze(0)  # one row of the parameter for each fused matrix
        if shard_id is None:
            inner(param, tensor)
        else:
            inner(param, tensor, shard_id)
        layer.flute_account.record(name, shard_id)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.check_loaded(layer, TENSOR_NAMES)
        self.finish(layer)

    def check_loaded(self, layer: torch.nn.Module, names: tuple[str, ...]) -> None:
        """Raises FluteError when a tensor was missing or holds NaN or infinity."""
        account = layer.flute_account
        unfilled = bool(torch.isnan(layer.scales).any() or torch.isnan(layer.table).any())
        # --load-format dummy fills parameters without calling a loader.
        is_dummy = account.is_empty() and not unfilled
        if not is_dummy:
            account.check_complete(names)
        account.reset()
        check_finite(f"{self.prefix}.scales", layer.scales)
        check_finite(f"{self.prefix}.table", layer.table)

    def finish(self, layer: torch.nn.Module) -> None:
        """Replaces vLLM's loading parameters with plain ones, under the same names."""
        tensors = {name: getattr(layer, name).data.contiguous() for name in TENSOR_NAMES}
        is_16_bit = layer.flute_dtype in (torch.float16, torch.bfloat16)
        if tensors["qweight"].is_cuda and is_16_bit and ops.has_cuda_kernels():
            tensors = self._to_gpu_layout(layer, tensors)
        for name, tensor in tensors.items():
            replace_parameter(layer, name, Parameter(tensor, requires_grad=False))
        if layer.flute_plan:
            self.order.append(layer)

    def _to_gpu_layout(
        self, layer: torch.nn.Module, tensors: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Codes and scales as the GPU kernels read them; ``scales`` is left to tell the dtype.

        It keeps one element: vLLM's PrefetchOffloader demands that what it moves is pinned, which
        a tensor without elements never is. The kernels compute in the dtype of the activations, so
        scales and table are converted to it by value. Temporary memory: this layer once more.
        """
        scales = tensors["scales"].to(layer.flute_dtype)
        table = tensors["table"].to(layer.flute_dtype)
        for name, tensor in (("scales", scales), ("table", table)):
            check_finite(f"{self.prefix}.{name}, as {layer.flute_dtype}", tensor)
        settings = (layer.flute_parts, self.spec.bits, self.spec.group_size)
        records = ops.repack(tensors["qweight"], scales, table, *settings)
        # With overlap a launch reads records before the kernels ahead of it have finished.
        torch.cuda.current_stream(records.device).synchronize()
        layer.flute_plan = tuning.plan(
            sum(layer.flute_parts), layer.flute_in_features, self.spec.bits, self.spec.group_size,
            tuple(layer.flute_parts), tuning.device_of(records.device), pair=table.dim() == 3,
            overlap=1,
        )  # fmt: skip
        layer.flute_plan_parts = tuning.by_rows(layer.flute_plan)
        return {"qweight": records, "scales": scales.new_zeros(1), "table": table}

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        plan = layer.flute_plan
        # A graph serves any number of rows, so the op looks its entry up; an eager call does here.
        if plan and not torch.compiler.is_compiling():
            plan = tuning.single(layer.flute_plan_parts, x.numel() // layer.flute_in_features)
        following = next_weight(layer) if plan else None
        y = torch.ops.flute.gemm(
            x, layer.qweight, layer.scales, layer.table, layer.flute_parts,
            self.spec.bits, self.spec.group_size, plan, following, self.ahead_bytes,
        )  # fmt: skip
        # y is ours alone: no second output, and the dtype stays whatever that of the bias is.
        return y if bias is None else y.add_(bias)

    def dequantize_weight(self, layer: torch.nn.Module) -> torch.Tensor:
        """Dense [N, K] of this rank, in the dtype of the scales; vLLM requantizes from it."""
        return torch.ops.flute.dequantize(
            layer.qweight, layer.scales, layer.table, layer.flute_parts,
            self.spec.bits, self.spec.group_size, in_features=layer.flute_in_features,
        )  # fmt: skip

    def _announce(self) -> None:
        logger.info_once(
            "flute: %d-bit %s table, group_size %s, %s scales; kernel: %s",
            self.spec.bits, self.spec.table_kind, self.spec.group_size, self.spec.scale_dtype,
            _kernel_name(),
        )  # fmt: skip


def _kernel_name() -> str:
    from vllm.platforms import current_platform

    return "CUDA" if current_platform.is_cuda() else f"CPU, {ops.cpu_isa()}"


def check_shardable(
    prefix: str, spec: LayerSpec, input_size: int, input_size_per_partition: int
) -> None:
    """Raises FluteError unless a rank's share of K is a whole number of groups and units."""
    spec.check_in_features(input_size, where=prefix)
    step = UNIT if spec.group_size == PER_ROW else spec.group_size
    if input_size_per_partition % step == 0:
        return
    ranks = input_size // input_size_per_partition
    allowed = [n for n in range(1, ranks) if input_size % n == 0 and input_size // n % step == 0]
    raise FluteError(
        f"cannot shard for tensor_parallel_size={ranks}", where=prefix,
        why=f"in_features {input_size} / {ranks} = {input_size_per_partition} is not a multiple of "
        f"{step} (group_size {spec.group_size})",
        fix=f"use --tensor-parallel-size {allowed[-1]} (allowed: {', '.join(map(str, allowed))}), "
        "or requantize with a smaller --group-size",
    )  # fmt: skip
