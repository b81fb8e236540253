"""Checkpoint folders: header-only reading with checks, and atomic writing file by file."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from flute_vllm.errors import FluteError

INDEX_NAME = "model.safetensors.index.json"
# Of a hub repository: no pickles, which may be as large again.
DOWNLOADED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.md", "*.tiktoken")
HEADER_LIMIT = 100 << 20  # the safetensors specification's own limit
TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype of each tensor, by name


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

    def load(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU. Raises FluteError where the checkpoint lacks it."""
        info = self.tensors.get(name)
        if info is None:
            raise FluteError(
                "missing tensor", where=f"{self.folder}: {name}",
                why=f"none of the {len(self.files)} weight files holds it",
                fix="download the checkpoint again",
            )  # fmt: skip
        with safe_open(info.file, framework="pt") as file:
            return file.get_tensor(name)

    def iter_files(self) -> Iterator[tuple[Path, list[str]]]:
        """Each weight file with the names in it."""
        for file in self.files:
            yield file, [name for name, info in self.tensors.items() if info.file == file]

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())


MARKER = ".flute-partial"  # tells an unfinished output of ours from a folder of the user


class AtomicFolder:
    """Writes a checkpoint into ``<out>.partial`` and renames it when everything is on disk.

    An interrupted run leaves only the ``.partial`` folder, which has no config.json until the
    last moment, so that nothing takes it for a checkpoint; the next run replaces it.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out)
        if self.out.exists() or self.out.is_symlink():
            raise FluteError(
                "output exists", where=str(self.out),
                why="an existing folder is never overwritten",
                fix="remove it, or choose another output path",
            )  # fmt: skip
        self.partial = self.out.with_name(self.out.name + ".partial")
        self._weight_map: dict[str, str] = {}
        self._total = 0

    def __enter__(self) -> AtomicFolder:
        if self.partial.exists() or self.partial.is_symlink():
            self._remove_leftover()
        with writing(self.partial):
            self.partial.mkdir(parents=True)
            (self.partial / MARKER).touch()
        return self

    def _remove_leftover(self) -> None:
        """Removes what an interrupted run left, and nothing else."""
        is_ours = not self.partial.is_symlink() and (self.partial / MARKER).is_file()
        if not is_ours:
            raise FluteError(
                "temporary output exists", where=str(self.partial),
                why=f"the output is written there first, and it holds no {MARKER}, so an "
                "interrupted run did not leave it",
                fix="move it away, or choose another output path",
            )  # fmt: skip
        shutil.rmtree(self.partial)

    def __exit__(self, kind, value, traceback) -> None:
        if kind is not None:
            shutil.rmtree(self.partial, ignore_errors=True)

    def reserve(self, nbytes: int) -> None:
        """Raises FluteError now if the disk cannot hold ``nbytes`` more, not hours later."""
        with writing(self.partial):
            free = shutil.disk_usage(self.partial).free
        if nbytes > free:
            raise FluteError(
                "not enough disk space", where=str(self.out),
                why=f"the output needs {nbytes:,} bytes, {free:,} are free",
                fix="free some space, or choose an output path on another disk",
            )  # fmt: skip

    @contextmanager
    def shard(self, name: str, layout: Layout) -> Iterator[ShardWriter]:
        """A weight file whose tensors are written one by one; see :class:`ShardWriter`."""
        path = self.partial / name
        with writing(path):
            file = path.open("wb", buffering=0)
        with file:
            writer = ShardWriter(path, file, layout)
            yield writer
            writer.finish()
        self._weight_map.update(dict.fromkeys(layout, name))
        self._total += layout_nbytes(layout)

    def write_tensors(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """One weight file from tensors in memory."""
        layout = {key: (tuple(value.shape), value.dtype) for key, value in tensors.items()}
        with self.shard(name, layout) as shard:
            for key, tensor in tensors.items():
                shard.write(key, tensor)

    def copy_extras(self, source: Path) -> None:
        """Copies tokenizer and generation files: all small files that hold no weights."""
        skip = {"config.json", "flute_config.json", "report.json", INDEX_NAME}
        suffixes = {".json", ".model", ".txt", ".jinja", ".md", ".tiktoken"}
        for file in sorted(source.iterdir()):
            is_index = file.name.endswith(".index.json")
            if (
                file.is_file()
                and file.suffix in suffixes
                and file.name not in skip
                and not is_index
            ):
                with writing(self.partial / file.name):
                    shutil.copyfile(file, self.partial / file.name)
                    _fsync(self.partial / file.name)

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        path = self.partial / name
        with writing(path):
            path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
            _fsync(path)

    def commit(self, config: dict[str, Any]) -> Path:
        """Writes index and config.json, then renames the folder into place."""
        if set(self._weight_map.values()) - {"model.safetensors"}:
            index = {"metadata": {"total_size": self._total}, "weight_map": self._weight_map}
            self.write_json(INDEX_NAME, index)
        self.write_json("config.json", config)
        with writing(self.out):
            (self.partial / MARKER).unlink()
            _fsync(self.partial)
            os.rename(self.partial, self.out)
            _fsync(self.out.parent)
        return self.out


class ShardWriter:
    """Writes one safetensors file tensor by tensor, in any order, never holding more than one.

    All shapes are known in advance, so the header comes first and every tensor has its place.
    Tensors lie in descending order of element size, as the safetensors library writes them:
    otherwise an odd number of 16-bit values would leave the int32 ones after it unaligned.
    """

    def __init__(self, path: Path, file: FileIO, layout: Layout) -> None:
        self._path, self._file, self._layout = path, file, layout
        self._missing = set(layout)
        ordered = sorted(layout, key=lambda name: -layout[name][1].itemsize)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for name in ordered:
            shape, dtype = layout[name]
            end = begin + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {
                "dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end],
            }  # fmt: skip
            begin = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        start = 8 + len(encoded)
        self._write_at(0, struct.pack("<Q", len(encoded)) + encoded)
        self._offsets = {name: start + header[name]["data_offsets"][0] for name in ordered}

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Stores one tensor; its shape and dtype must be those of the layout."""
        found = (tuple(tensor.shape), tensor.dtype)
        if name not in self._missing or found != self._layout[name]:
            raise FluteError(
                "internal error: unexpected tensor", where=f"{self._path}: {name}",
                why=f"got {found}, expected {self._layout.get(name)} once",
                fix="report this with the command that you ran",
            )  # fmt: skip
        self._missing.remove(name)
        if tensor.numel():
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            self._write_at(self._offsets[name], memoryview(data))

    def _write_at(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        with writing(self._path):
            self._file.seek(offset)
            while view:  # one write call stores at most 2 GiB on Linux
                view = view[self._file.write(view) :]

    def finish(self) -> None:
        """Puts the file on disk. Raises FluteError if a tensor of the layout was not written."""
        if self._missing:
            raise FluteError(
                "internal error: tensor not written",
                where=f"{self._path}: {min(self._missing)}",
                why=f"{len(self._missing)} of {len(self._layout)} tensors are missing",
                fix="report this with the command that you ran",
            )  # fmt: skip
        with writing(self._path):
            os.fsync(self._file.fileno())


def layout_nbytes(layout: Layout) -> int:
    """Bytes of the data of a weight file, without its header."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in layout.values())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an operating system error into a FluteError that names the file."""
    try:
        yield
    except OSError as error:
        raise FluteError(
            "cannot write the output", where=str(path),
            why=f"{error.strerror or error} (errno {error.errno})",
            fix="check free disk space (`df -h`), quota and permissions, then run it again",
        ) from error  # fmt: skip


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
