"""Native checkpoints in transformers: ``AutoModelForCausalLM.from_pretrained(OUT)``.

``import flute_vllm`` is enough. It must stay cheap, so nothing here is imported before
transformers loads its list of quantizers: :func:`register_when_imported` waits for that.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

QUANTIZERS = "transformers.quantizers.auto"


def register_when_imported() -> None:
    """Registers now if transformers has loaded its quantizers, else as soon as it does."""
    if QUANTIZERS in sys.modules:
        register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds one module as Python would, and registers the quantizer when it has been run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, inner: Loader) -> None:
        self._inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        register()

    def __getattr__(self, name: str) -> Any:  # inspect and linecache ask loaders for sources
        return getattr(self._inner, name)


def register() -> None:
    """Adds the quantizer ``flute`` to transformers, by importing the module that decorates it."""
    import flute_vllm.hf_quantizer  # noqa: F401
