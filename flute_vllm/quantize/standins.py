"""Modules that stand for decoder blocks, to see what a decoder gives its blocks and the head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

_CACHES = ("past_key_values", "past_key_value", "layer_past")  # names that decoders give a cache


class Standin(nn.Module):
    """Stands for a block: decoders look at attributes of it, such as the kind of attention.

    With ``in_tuple`` it returns what it hands on as the first of a tuple, as some blocks do.
    """

    def __init__(self, block: nn.Module, in_tuple: bool) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)
        self.in_tuple = in_tuple

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_block"), name)

    def hand_on(self, hidden: torch.Tensor) -> Any:
        return (hidden,) if self.in_tuple else hidden


class Catcher(Standin):
    """Notes its arguments, hands its input on.

    ``arguments`` are those beside the hidden states: positional ones and named ones.
    ``differing`` names one that differs between the first two calls, so that those of one batch
    do not serve another.
    """

    def __init__(self, block: nn.Module, in_tuple: bool = False) -> None:
        super().__init__(block, in_tuple)
        self.hidden: torch.Tensor | None = None
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.differing: str | None = None
        self.calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if "hidden_states" in kwargs:
            self.hidden = kwargs.pop("hidden_states")
        else:
            self.hidden, args = args[0], args[1:]
        kwargs.update({name: None for name in _CACHES if name in kwargs})
        if "use_cache" in kwargs:
            kwargs["use_cache"] = False
        if self.calls == 1:
            named = {**dict(enumerate(args, 1)), **kwargs}
            before = {**dict(enumerate(self.arguments[0], 1)), **self.arguments[1]}
            changed = (n for n, value in named.items() if not _is_same(value, before.get(n)))
            self.differing = next((str(name) for name in changed), None)
        self.arguments = (args, kwargs)
        self.calls += 1
        return self.hand_on(self.hidden)


class Source(Standin):
    """Stands for all blocks: whatever it is given, it hands on what they would."""

    def __init__(self, block: nn.Module, hidden: torch.Tensor, in_tuple: bool) -> None:
        super().__init__(block, in_tuple)
        self.hidden = hidden

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return self.hand_on(self.hidden)


class Tail(nn.Module):
    """From the output of the last block to what the head reads, which ``head`` is given."""

    def __init__(self, decode: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.decode, self.head = decode, nn.Identity()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(self.decode(hidden))


def _is_same(one: Any, other: Any) -> bool:
    """Whether two arguments hold equal tensors; what is no tensor counts as equal."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_is_same(one[key], other[key]) for key in one)
    is_list = isinstance(one, Sequence) and isinstance(other, Sequence)
    if is_list and not isinstance(one, str):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return isinstance(one, torch.Tensor) == isinstance(other, torch.Tensor)
