"""Writing checkpoint folders: shards tensor by tensor, and a folder that appears when complete."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from flute_vllm.checkpoint import DTYPE_NAMES, INDEX_NAME, read_json
from flute_vllm.errors import FluteError
from flute_vllm.validate import is_native

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype of each tensor, by name
MARKER = ".flute-partial"  # tells an unfinished output of ours from a folder of the user
UNFINISHED = ".unfinished"  # at the end of the name of a file that is not complete
# What is copied from a source: tokenizer, generation and chat files, and what its licence asks for.
# Tokenizers come under names without an ending of their own, too (tokenizer.model.v3).
COPIED_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".md", ".tiktoken")
COPIED_PREFIXES = ("tokenizer", "license", "licence", "notice", "copying")
NOT_COPIED = ("config.json", "flute_config.json", "report.json")
CHAT_TEMPLATES = "additional_chat_templates"  # a folder of transformers'
CARD = "README.md"


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
        self._shards: dict[str, Layout] = {}

    def __enter__(self) -> AtomicFolder:
        if self.partial.exists() or self.partial.is_symlink():
            self._remove_leftover()
        with writing(self.partial):
            self.partial.mkdir(parents=True)
            (self.partial / MARKER).touch()
        return self

    def is_leftover(self) -> bool:
        """Whether the partial folder is one that an interrupted run of ours left."""
        return not self.partial.is_symlink() and (self.partial / MARKER).is_file()

    def _remove_leftover(self) -> None:
        """Removes what an interrupted run left, and nothing else."""
        if not self.is_leftover():
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

    def reserve(self, nbytes: int, scratch: int = 0) -> None:
        """Raises FluteError now if the disk cannot hold ``nbytes`` more, not hours later.

        ``scratch`` are bytes of files that are there only while the output is made.
        """
        with writing(self.partial):
            free = shutil.disk_usage(self.partial).free
        if nbytes + scratch > free:
            beside = f", and {scratch:,} while it is made" if scratch else ""
            raise FluteError(
                "not enough disk space", where=str(self.out),
                why=f"the output needs {nbytes:,} bytes{beside}, {free:,} are free",
                fix="free some space, or choose an output path on another disk",
            )  # fmt: skip

    @contextmanager
    def shard(self, name: str, layout: Layout) -> Iterator[ShardWriter]:
        """A weight file whose tensors are written one by one; see :class:`ShardWriter`.

        It has its name only when it is complete and on disk.
        """
        path = self.partial / f"{name}{UNFINISHED}"
        with writing(path):
            file = path.open("wb", buffering=0)
        with file:
            writer = ShardWriter(self.partial / name, file, layout)
            yield writer
            writer.finish()
        with writing(self.partial / name):
            os.rename(path, self.partial / name)
            fsync(self.partial)
        self.count_shard(name, layout)

    def count_shard(self, name: str, layout: Layout) -> None:
        """Takes a complete weight file into the index."""
        self._shards[name] = layout

    def write_tensors(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """One weight file from tensors in memory."""
        layout = {key: (tuple(value.shape), value.dtype) for key, value in tensors.items()}
        with self.shard(name, layout) as shard:
            for key, tensor in tensors.items():
                shard.write(key, tensor)

    def copy_extras(self, source: Path) -> None:
        """Copies tokenizer, generation and licence files: all small files that hold no weights.

        The card of a quantized model of ours is left out, as it speaks of its bits.
        """
        names = [file.name for file in sorted(source.iterdir()) if _is_extra(file)]
        if _has_codes(source) and CARD in names:
            names.remove(CARD)
        templates = sorted((source / CHAT_TEMPLATES).glob("*.jinja"))
        if templates:
            with writing(self.partial / CHAT_TEMPLATES):
                (self.partial / CHAT_TEMPLATES).mkdir(exist_ok=True)
        for name in (*names, *(f"{CHAT_TEMPLATES}/{file.name}" for file in templates)):
            with writing(self.partial / name):
                shutil.copyfile(source / name, self.partial / name)
                fsync(self.partial / name)
        if templates:
            with writing(self.partial / CHAT_TEMPLATES):
                fsync(self.partial / CHAT_TEMPLATES)

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        path = self.partial / name
        with writing(path):
            path.write_text(text, encoding="utf-8")
            fsync(path)

    def commit(self, config: dict[str, Any]) -> Path:
        """Writes index and config.json, then renames the folder into place."""
        self.write_index_and_config(config)
        return self.publish()

    def write_index_and_config(self, config: dict[str, Any]) -> None:
        """What makes the folder a checkpoint; files in the order of their names."""
        if set(self._shards) - {"model.safetensors"}:
            files = sorted(self._shards.items())
            index = {
                "metadata": {"total_size": sum(layout_nbytes(layout) for _, layout in files)},
                "weight_map": {tensor: file for file, layout in files for tensor in layout},
            }
            self.write_json(INDEX_NAME, index)
        self.write_json("config.json", config)

    def withdraw_config(self) -> None:
        """Makes the partial folder again one that nothing takes for a checkpoint."""
        with writing(self.partial):
            (self.partial / "config.json").unlink()
            fsync(self.partial)

    def publish(self) -> Path:
        """Takes the marker away and gives the folder its name."""
        with writing(self.out):
            (self.partial / MARKER).unlink()
            fsync(self.partial)
            os.rename(self.partial, self.out)
            fsync(self.out.parent)
        return self.out


def _is_extra(file: Path) -> bool:
    name = file.name.lower()
    is_index = name.endswith(".index.json")
    is_weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf")
    if not file.is_file() or file.name in NOT_COPIED or is_index or is_weights:
        return False
    return file.suffix in COPIED_SUFFIXES or name.startswith(COPIED_PREFIXES)


def _has_codes(source: Path) -> bool:
    config = source / "config.json"
    return config.is_file() and is_native(read_json(config))


class ShardWriter:
    """Writes one safetensors file tensor by tensor, in any order, never holding more than one.

    All shapes are known in advance, so the header comes first and every tensor has its place.
    Tensors lie in descending order of element size, as the safetensors library writes them:
    otherwise an odd number of 16-bit values would leave the int32 ones after it unaligned.
    """

    def __init__(self, path: Path, file: FileIO, layout: Layout) -> None:
        self._path, self._file, self._layout = path, file, layout
        self._missing = set(layout)
        header, self._offsets = _header(layout)
        self._write_at(0, header)

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


def _header(layout: Layout) -> tuple[bytes, dict[str, int]]:
    """The bytes in front of the data, and where in the file each tensor begins."""
    ordered = sorted(layout, key=lambda name: -layout[name][1].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name in ordered:
        shape, dtype = layout[name]
        end = begin + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end],
        }  # fmt: skip
        begin = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    start = 8 + len(encoded)
    offsets = {name: start + header[name]["data_offsets"][0] for name in ordered}
    return struct.pack("<Q", len(encoded)) + encoded, offsets


def replace_tensors(path: Path, layout: Layout, tensors: dict[str, torch.Tensor]) -> None:
    """Overwrites some tensors of a complete weight file in place.

    Not atomic: whoever calls it keeps the tensors on disk until the call has returned, and repeats
    it after a crash.
    """
    _, offsets = _header(layout)
    with writing(path), path.open("r+b") as file:
        for name, tensor in tensors.items():
            found = (tuple(tensor.shape), tensor.dtype)
            if found != layout.get(name):
                raise FluteError(
                    "internal error: unexpected tensor", where=f"{path}: {name}",
                    why=f"got {found}, expected {layout.get(name)}",
                    fix="report this with the command that you ran",
                )  # fmt: skip
            file.seek(offsets[name])
            file.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
        file.flush()
        os.fsync(file.fileno())


def file_nbytes(layout: Layout) -> int:
    """Bytes of a weight file, header included."""
    return len(_header(layout)[0]) + layout_nbytes(layout)


def layout_nbytes(layout: Layout) -> int:
    """Bytes of the data of a weight file, without its header."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in layout.values())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an operating system error into a FluteError that names the file.

    The safetensors library, which writes files of ours that a run needs for itself, has an error
    of its own for them.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        is_told = isinstance(error, OSError)
        why = f"{error.strerror or error} (errno {error.errno})" if is_told else str(error)
        raise FluteError(
            "cannot write the output", where=str(path), why=why,
            fix="check free disk space (`df -h`), quota and permissions, then run it again",
        ) from error  # fmt: skip


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """For a file that is there whole or not at all: yields where to write it, then renames that."""
    unfinished = path.with_name(path.name + UNFINISHED)
    with writing(path):
        yield unfinished
        fsync(unfinished)
        unfinished.rename(path)


def fsync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
