"""Which quantized layer runs after which, so that a launch can ask for the next one's weights.

vLLM finishes the layers of a model in the order of its modules, which is the order in which a
decoder runs them. Where a model runs them otherwise, the hint brings weights too early or for
nothing, at most ``tuning.ahead_bytes()`` of them a launch; results do not depend on it.
"""

from __future__ import annotations

import weakref

import torch


class LayerOrder:
    """The layers of one model on one device, linked as they are finished.

    A layer's ``flute_next``, None before, becomes a tuple of the layer behind it, empty for the
    last: modules, not tensors, so that weights that are loaded anew are found; a tuple, or torch
    would take the next layer for a part of this one.
    """

    def __init__(self) -> None:
        self._last: weakref.ref[torch.nn.Module] | None = None

    def __reduce__(self):
        return (LayerOrder, ())  # vLLM copies configs between processes: layers stay behind

    def append(self, layer: torch.nn.Module) -> None:
        """Puts a layer behind those so far; one that has its place keeps it."""
        if layer.flute_next is not None:
            return
        layer.flute_next = ()
        last = None if self._last is None else self._last()
        if last is not None and last.qweight.device == layer.qweight.device:
            last.flute_next = (layer,)
        self._last = weakref.ref(layer)
