"""Reading checkpoint folders: headers only, with checks, then single tensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from flute_vllm.errors import FluteError

INDEX_NAME = "model.safetensors.index.json"
# Of a hub repository: no pickles, which may be as large again.
DOWNLOADED = (
    "*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.md", "*.tiktoken", "tokenizer*",
    "LICEN[SC]E*", "NOTICE*", "COPYING*",
)  # fmt: skip
HEAD_IS_TIED = "tie_word_embeddings"
HEADER_LIMIT = 100 << 20  # the safetensors specification's own limit
TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


def resolve_source(source: str | Path, revision: str | None = None) -> Path:
    """Folder of a local path or, downloaded, of a hub id. Raises FluteError if there is neither."""
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists() or str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        raise FluteError(
            "no such checkpoint folder",
            where=str(source),
            why="the path is not a folder" if path.exists() else "the path does not exist",
            fix="pass the folder that holds config.json, or a hub id such as org/model",
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(str(source), revision=revision, allow_patterns=list(DOWNLOADED))
        )
    except Exception as error:
        raise FluteError(
            "cannot download the checkpoint",
            where=str(source),
            why=f"{type(error).__name__}: {error}",
            fix="check the id and the network, or pass a local folder",
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises FluteError for a missing or malformed file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FluteError(
            "missing file", where=str(path), why="it does not exist",
            fix="download the checkpoint again, or pass the folder that holds it",
        ) from None  # fmt: skip
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FluteError(
            "unreadable JSON", where=str(path), why=str(error), fix="download the file again"
        ) from error
    if not isinstance(value, dict):
        raise FluteError(
            "unreadable JSON", where=str(path),
            why=f"expected an object, got {type(value).__name__}",
            fix="download the file again",
        )  # fmt: skip
    return value


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors of one safetensors file, checked against the size of the file."""

    def bad(why: str) -> FluteError:
        return FluteError(
            "damaged safetensors file", where=str(path), why=why, fix="download or copy it again"
        )

    try:
        size = path.stat().st_size
        file = path.open("rb")
    except OSError as error:
        raise bad(f"it cannot be read: {error}") from error
    with file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise bad(f"the file has {size} bytes, fewer than the 8 of the header length")
        length = struct.unpack("<Q", prefix)[0]
        if length > min(size - 8, HEADER_LIMIT):
            raise bad(f"the header length {length} exceeds the file ({size} bytes)")
        try:
            header = json.loads(file.read(length), object_pairs_hook=_unique_keys)
        except (ValueError, RecursionError) as error:
            raise bad(f"the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise bad("the header is not a JSON object")
    header.pop("__metadata__", None)
    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        try:
            dtype, shape = TORCH_DTYPES.get(entry["dtype"]), tuple(entry["shape"])
            begin, stop = entry["data_offsets"]
        except (TypeError, KeyError, ValueError) as error:
            raise bad(f"malformed entry for tensor {name}") from error
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, stop)):
            raise bad(f"tensor {name} has a shape or offset that is not a whole number")
        if dtype is None:
            raise FluteError(
                f"unsupported dtype {entry['dtype']}", where=f"{path}: {name}",
                why=f"this release reads {', '.join(TORCH_DTYPES)}",
                fix="convert the tensor to one of them",
            )  # fmt: skip
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if stop - begin != nbytes:
            raise bad(
                f"tensor {name} of shape {list(shape)} needs {nbytes} bytes, has {stop - begin}"
            )
        spans.append((begin, stop, name))
        tensors[name] = TensorInfo(name, path, dtype, shape, nbytes)
    end = 0
    for begin, stop, name in sorted(spans):
        if begin != end:
            raise bad(f"the data of tensor {name} begins at byte {begin}, expected {end}")
        end = stop
    if size != 8 + length + end:
        raise bad(f"expected {8 + length + end} bytes from the header, the file has {size}")
    return tensors


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuses what json.loads resolves silently: a name that stands twice in one object."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"{twice!r} stands twice")
    return value


class Checkpoint:
    """A folder with config.json and safetensors files; opening it reads headers only."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = read_json(self.folder / "config.json")
        self.files = self._weight_files()
        self.tensors: dict[str, TensorInfo] = {}
        for file in self.files:
            for name, info in read_header(file).items():
                if name in self.tensors:
                    raise FluteError(
                        "tensor stored twice", where=f"{file}: {name}",
                        why=f"it is also in {self.tensors[name].file.name}",
                        fix="remove stale shards from the folder",
                    )  # fmt: skip
                self.tensors[name] = info
        self._check_index()
        self.has_own_head = False  # whether untie_head made one

    def _weight_files(self) -> list[Path]:
        index = self.folder / INDEX_NAME
        if index.exists():
            names = sorted(set(self._weight_map().values()))
            for name in names:
                if not (self.folder / name).is_file():
                    raise FluteError(
                        "missing shard", where=str(self.folder / name),
                        why=f"{INDEX_NAME} names it and it does not exist",
                        fix="download the checkpoint again",
                    )  # fmt: skip
            return [self.folder / name for name in names]
        single = self.folder / "model.safetensors"
        if single.is_file():  # other files beside it are adapters or another format's copy
            return [single]
        files = sorted(p for p in self.folder.glob("*.safetensors") if p.is_file())
        if not files:
            pickles = sorted(p.name for p in self.folder.glob("*.bin")) + sorted(
                p.name for p in self.folder.glob("*.pt*")
            )
            raise FluteError(
                "no safetensors file", where=str(self.folder),
                why=f"only pickle files, which can run code: {', '.join(pickles)}" if pickles
                else "the folder holds no *.safetensors",
                fix="load the model with transformers and save it with save_pretrained",
            )  # fmt: skip
        return files

    def _weight_map(self) -> dict[str, str]:
        path = self.folder / INDEX_NAME
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) and Path(name).name == name for name in weight_map.values()
        ):
            raise FluteError(
                "malformed index", where=str(path),
                why="weight_map must map tensor names to file names in the folder",
                fix="download the file again",
            )  # fmt: skip
        return weight_map

    def _check_index(self) -> None:
        if not (self.folder / INDEX_NAME).exists():
            return
        missing = sorted(set(self._weight_map()) - set(self.tensors))
        if missing:
            raise FluteError(
                "missing tensor", where=f"{self.folder}: {missing[0]}",
                why=f"{INDEX_NAME} names {len(missing)} tensors that no shard holds",
                fix="download the checkpoint again",
            )  # fmt: skip

    def untie_head(self, head: str, embeddings: str) -> None:
        """From now on the head has a weight of its own, for now the values of the embeddings'.

        ``head`` and ``embeddings`` are modules. Nothing is written: in ``config`` and ``tensors``.
        """
        self.tensors[f"{head}.weight"] = self.tensors[f"{embeddings}.weight"]
        self.has_own_head = True
        for section in self._sections():
            section[HEAD_IS_TIED] = False

    def load(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU. Raises FluteError where the checkpoint lacks it."""
        info = self.tensors.get(name)
        if info is None:
            raise FluteError(
                "missing tensor", where=f"{self.folder}: {name}",
                why=f"none of the {len(self.files)} weight files holds it",
                fix="download the checkpoint again",
            )  # fmt: skip
        try:
            with safe_open(info.file, framework="pt") as file:
                return file.get_tensor(info.name)
        except (OSError, SafetensorError) as error:
            raise FluteError(
                "cannot read a weight", where=f"{info.file}: {name}",
                why=f"{type(error).__name__}: {error}; its header could be read before",
                fix="put the file back, then run the same command again",
            ) from error  # fmt: skip

    def iter_files(self) -> Iterator[tuple[Path, list[str]]]:
        """Each weight file with the names in it."""
        for file in self.files:
            yield file, [name for name, info in self.tensors.items() if info.file == file]

    @property
    def is_head_tied(self) -> bool:
        """Whether config.json says that the output head is the matrix of embeddings."""
        return any(section.get(HEAD_IS_TIED) is True for section in self._sections())

    def _sections(self) -> list[dict[str, Any]]:
        """Of config.json, those that may speak of the language model."""
        sections = (self.config, self.config.get("text_config"))
        return [section for section in sections if isinstance(section, dict)]

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())
