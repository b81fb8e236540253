"""Which quantized layer runs after which, so that a launch can ask for the next one's weights.

vLLM finishes the layers of a model in the order of its modules, which is the order in which a
decoder runs them. Where a model runs them otherwise, the hint brings weights too early or for
nothing, at most ``tuning.ahead_bytes()`` of them a launch; results do not depend on it.

Offloading moves weights after that. A layer on the host ends its list, as the one that is finished
behind it lies on the GPU at that moment; the op passes over weights that are not on its device.
"""

from __future__ import annotations

import weakref

import torch


class LayerOrder:
    """The layers of one model on one device, in the order in which they are finished.

    A layer's ``flute_order`` is the list that it shares with all of them, ``flute_place`` its index
    there. Modules, not tensors, so that weights that are loaded anew are found. A list for all, not
    a link from each to the next: torch.compile follows such a chain to its end and gave up at the
    320 layers of a 70B model.
    """

    def __init__(self) -> None:
        # Weak: a config must not keep the weights of a model that is gone.
        self._last: weakref.ref[torch.nn.Module] | None = None

    def __reduce__(self):
        return (LayerOrder, ())  # vLLM copies configs between processes: layers stay behind

    def append(self, layer: torch.nn.Module) -> None:
        """Puts a layer behind those so far; one that has its place keeps it."""
        if layer.flute_order is not None:
            return
        last = None if self._last is None else self._last()
        if last is None or last.qweight.device != layer.qweight.device:
            layer.flute_order = []
        else:
            layer.flute_order = last.flute_order
        layer.flute_place = len(layer.flute_order)
        layer.flute_order.append(layer)
        self._last = weakref.ref(layer)


def next_weight(layer: torch.nn.Module) -> torch.Tensor | None:
    """``qweight`` of the layer behind this one, wherever it lies now; None for the last.

    Asked of the layer at each call: vLLM's offloaders point parameters at other memory.
    """
    if layer.flute_order is None or layer.flute_place + 1 == len(layer.flute_order):
        return None
    return layer.flute_order[layer.flute_place + 1].qweight
