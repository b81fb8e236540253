"""Where the data files of the project are: next to the package when installed, else in the
checkout."""

from __future__ import annotations

from pathlib import Path

from flute_vllm.errors import FluteError

_PACKAGE = Path(__file__).resolve().parent


def data_path(*parts: str) -> Path:
    """Path of a data file such as ``data_path("configs", "codebooks", "nf4.json")``."""
    for root in (_PACKAGE, _PACKAGE.parent):
        path = root.joinpath(*parts)
        if path.exists():
            return path
    raise FluteError(
        "missing data file",
        where="/".join(parts),
        why=f"it is neither in {_PACKAGE} nor in {_PACKAGE.parent}",
        fix="reinstall flute-vllm",
    )
