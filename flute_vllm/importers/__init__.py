"""Foreign checkpoint formats: which one a checkpoint has, and how it becomes native.

A further format is one more file with an :class:`~flute_vllm.importers.base.Importer` and one
more entry in ``FORMATS``; nothing else in the project names a format.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flute_vllm.checkpoint import Checkpoint, read_json
from flute_vllm.errors import FluteError
from flute_vllm.importers.base import Importer, NativeLayer
from flute_vllm.importers.flute_zoo import FluteZoo
from flute_vllm.schema import QUANT_METHOD

FORMATS: tuple[type[Importer], ...] = (FluteZoo,)

__all__ = ["FORMATS", "Importer", "NativeLayer", "find", "from_config"]


def find(source: Checkpoint | str | Path) -> Importer | None:
    """The importer of a checkpoint folder; None for native and for dense checkpoints.

    Raises FluteError when a format is recognised and its configuration is at fault.
    """
    folder = source.folder if isinstance(source, Checkpoint) else Path(source)
    if _is_native(folder):
        return None
    for kind in FORMATS:
        config = kind.read_config(folder)
        if config is not None:
            return kind.from_config(config)
    return None


def from_config(config: Mapping[str, Any]) -> Importer:
    """The importer for a parsed configuration alone, such as the object in flute_config.json."""
    for kind in FORMATS:
        if kind.recognises(config):
            return kind.from_config(config)
    raise FluteError(
        "unknown checkpoint format",
        where="quantization configuration",
        why=f"no known format has the keys {', '.join(map(str, config)) or '(none)'}; known are "
        f"{', '.join(kind.name for kind in FORMATS)}",
        fix="convert the checkpoint with the tool that wrote it, or quantize the dense model",
    )


def _is_native(folder: Path) -> bool:
    # A leftover flute_config.json beside a converted config.json must not win: its tensors are
    # gone. A missing config.json is for Checkpoint to report.
    path = folder / "config.json"
    section = read_json(path).get("quantization_config") if path.exists() else None
    return isinstance(section, dict) and section.get("quant_method") == QUANT_METHOD
