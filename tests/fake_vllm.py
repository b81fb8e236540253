"""vLLM layers of one tensor-parallel rank without process groups or engines."""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import torch


@contextmanager
def fake_rank(rank: int, size: int):
    """Makes vLLM's linear layers and parameters believe in ``rank`` of ``size``."""
    from vllm.config import VllmConfig, set_current_vllm_config

    targets = [
        f"{module}.get_tensor_model_parallel_{what}"
        for module in (
            "vllm.model_executor.layers.linear",
            "vllm.model_executor.layers.vocab_parallel_embedding",
            "vllm.model_executor.parameter",
        )
        for what in ("rank", "world_size")
    ]
    with set_current_vllm_config(VllmConfig()):
        patches = [
            mock.patch(target, return_value=rank if target.endswith("rank") else size)
            for target in targets
        ]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()


def make_layer(kind: str, config, prefix: str, **sizes) -> torch.nn.Module:
    """A vLLM linear layer of class ``kind`` with the quantization ``config``."""
    from vllm.model_executor.layers import linear

    return getattr(linear, kind)(
        quant_config=config, prefix=prefix, params_dtype=torch.float32, **sizes
    )


def make_head(config, prefix: str, vocabulary: int, columns: int) -> torch.nn.Module:
    """vLLM's output head [vocabulary, columns] with the quantization ``config``."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    return ParallelLMHead(
        vocabulary, columns, params_dtype=torch.float32, quant_config=config, prefix=prefix
    )


def load(layer: torch.nn.Module, tensors: dict[str, torch.Tensor], shard_id=None) -> None:
    """Hands each tensor to the weight loader of the parameter of that name."""
    for name, tensor in tensors.items():
        parameter = getattr(layer, name)
        arguments = (parameter, tensor) if shard_id is None else (parameter, tensor, shard_id)
        parameter.weight_loader(*arguments)


def finish(layer: torch.nn.Module) -> None:
    layer.quant_method.process_weights_after_loading(layer)
