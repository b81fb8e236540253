"""The quantizer that transformers calls: quantized linear layers in place of the dense ones."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from flute_vllm import ops
from flute_vllm.errors import FluteError
from flute_vllm.format import LayerSpec
from flute_vllm.schema import QUANT_METHOD, FluteQuantizationConfig


@register_quantization_config(QUANT_METHOD)
class FluteHfConfig(QuantizationConfigMixin):
    """``quantization_config`` of config.json as transformers passes it around."""

    def __init__(self, **fields: Any) -> None:
        fields.pop("quant_method", None)
        self.quant_method = QUANT_METHOD
        self.schema = FluteQuantizationConfig.parse({"quant_method": QUANT_METHOD, **fields})

    def to_dict(self) -> dict[str, Any]:
        return self.schema.to_json()

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class FluteLinear(nn.Module):
    """A linear layer that computes from packed codes with ``flute::gemm``.

    Buffers: ``qweight`` int32 [N, K / 32 * bits], ``scales`` and ``table`` in the scale dtype,
    ``bias`` [N] or None. float32, float16 and bfloat16 inputs; runs on a CPU or a GPU.
    """

    def __init__(self, linear: nn.Linear, spec: LayerSpec, name: str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.spec = (
            linear.in_features, linear.out_features, spec,
        )  # fmt: skip
        spec.check_in_features(self.in_features, name)
        layout = spec.tensor_layout(self.out_features, self.in_features)
        for key, (shape, dtype) in layout.items():
            empty = torch.empty(shape, dtype=dtype, device=linear.weight.device)
            self.register_buffer(key, empty)
        self.bias = linear.bias

    @property
    def weight(self) -> torch.Tensor:
        """An empty tensor: some models look at the dtype and device of their linears."""
        return self.scales.new_empty(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = ops.gemm(
            x, self.qweight, self.scales, self.table.unsqueeze(0), [self.out_features],
            self.spec.bits, self.spec.group_size,
        )  # fmt: skip
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.spec}"


@register_quantizer(QUANT_METHOD)
class FluteHfQuantizer(HfQuantizer):
    """Puts :class:`FluteLinear` in place before transformers loads the tensors by name."""

    requires_calibration = True  # of from_pretrained on a dense model: `flute-vllm quantize` does
    quantization_config: FluteHfConfig

    def __init__(self, quantization_config: FluteHfConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise FluteError(
                "cannot quantize while loading", where="from_pretrained",
                why="the checkpoint is dense", fix="`flute-vllm quantize` it first",
            )  # fmt: skip
        super().__init__(quantization_config, **kwargs)

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        ops.load()

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype | None:
        return dtype

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        schema = self.quantization_config.schema
        linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        for name, linear in linears:
            spec = schema.spec_for(name)
            if spec is None:
                continue
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, FluteLinear(linear, spec, name))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        layers = {n: m for n, m in model.named_modules() if isinstance(m, FluteLinear)}
        unfilled = []
        for name, module in layers.items():
            wanted = module.spec.tensor_layout(module.out_features, module.in_features)
            for key, (shape, dtype) in wanted.items():
                found = getattr(module, key)
                if tuple(found.shape) != shape or found.dtype != dtype:
                    raise FluteError(
                        "the tensors do not fit config.json", where=f"{name}.{key}",
                        why=f"{found.dtype} {list(found.shape)}, expected {dtype} "
                        f"{list(shape)}", fix="download or quantize the checkpoint again",
                    )  # fmt: skip
                if _is_left_unread(module, found):
                    unfilled.append(f"{name}.{key}")
        if unfilled:
            raise FluteError(
                "missing tensor", where=unfilled[0],
                why=f"{len(unfilled)} tensors of {len(layers)} quantized layers were not in the "
                "checkpoint under the names of this model class",
                fix="use the class that config.json names under architectures, or download or "
                "quantize the checkpoint again",
            )  # fmt: skip
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _is_left_unread(module: nn.Module, tensor: torch.Tensor) -> bool:
    """Whether transformers found no tensor for a buffer, and left it as the memory was.

    From release 5 on it marks what it has read. accelerate, which offloads layers, moves the
    buffers of its hooks' modules, and the mark is lost.
    """
    marks = int(transformers.__version__.partition(".")[0]) >= 5
    is_moved = tensor.is_meta or hasattr(module, "_hf_hook")
    return marks and not is_moved and not getattr(tensor, "_is_hf_initialized", False)
