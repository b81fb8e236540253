"""The method of a quantized output head, which vLLM shards by vocabulary and pads."""

from __future__ import annotations

import torch

from flute_vllm.plugin.linear import FluteLinearMethod


class FluteHeadMethod(FluteLinearMethod):
    """A ``ParallelLMHead`` [vocabulary, hidden]; loaded and run like any other layer.

    vLLM's own loader of heads takes this rank's rows of the vocabulary and fills those of the
    padding with zeros; scales of zero make them logits of zero, which vLLM cuts off.
    """

    def finish(self, layer: torch.nn.Module) -> None:
        super().finish(layer)
        # vLLM's LoRA asks a head's weight for its dtype and device. No parameter: a checkpoint
        # that has a dense head must not find a place to put it.
        layer.weight = torch.empty(0, dtype=layer.flute_dtype, device=layer.qweight.device)
