"""The journal of a quantization: which files are complete, so that a crash costs one block.

``<out>.partial/flute-journal.jsonl`` begins with a line that says what is being made, and gets a
line for each finished unit. A unit's line is written only after its file has its final name and
is on disk, and each line is on disk before work goes on. So whatever is killed at whatever
moment, the journal never names a file that is not complete, and a last line that was cut off is
work that is done again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flute_vllm.checkpoint import Checkpoint
from flute_vllm.errors import FluteError
from flute_vllm.writer import MARKER, UNFINISHED, AtomicFolder, fsync, whole_file, writing

logger = logging.getLogger(__name__)
JOURNAL = "flute-journal.jsonl"
SCRATCH = "flute-scratch-"  # files of a run that are not part of its output begin so


class JournalFolder(AtomicFolder):
    """An :class:`AtomicFolder` that is kept when work stops, and taken up by the next run.

    Args:
        out: the folder that will appear.
        fingerprint: all that the output depends on, JSON values by field.
        restart: throw away what an earlier run left.

    Raises:
        FluteError: ``out`` exists, ``<out>.partial`` is not ours, or was begun with another
            fingerprint.
    """

    def __init__(self, out: str | Path, fingerprint: dict[str, Any], restart: bool = False) -> None:
        super().__init__(out)
        self._fingerprint = json.loads(json.dumps(fingerprint))
        self._restart = restart
        self.done: dict[str, dict[str, Any]] = {}

    @property
    def journal(self) -> Path:
        return self.partial / JOURNAL

    def __enter__(self) -> JournalFolder:
        if self._restart or not self._take_up():
            super().__enter__()
            self.done = {}
            self._append({"fingerprint": self._fingerprint})
        return self

    def __exit__(self, kind, value, traceback) -> None:
        """Keeps what is done: files of units, and what was measured or trained before the first.

        A folder without any is removed, it would only be in the way.
        """
        if kind is not None and not self.done and not self._has_scratch():
            shutil.rmtree(self.partial, ignore_errors=True)

    def _has_scratch(self) -> bool:
        return any(path.suffix != UNFINISHED for path in self.partial.glob(f"{SCRATCH}*"))

    def _take_up(self) -> bool:
        if not (self.journal.is_file() and self.is_leftover()):
            return False
        lines = self._lines()
        if not lines or "fingerprint" not in lines[0]:
            return False
        if len(lines) == 1 and lines[0]["fingerprint"] != self._fingerprint:
            logger.warning(
                "flute: %s is begun anew: it has no finished file, and what was measured or "
                "trained there is of other settings", self.partial,
            )  # fmt: skip
            return False
        self._check_same(lines[0]["fingerprint"], len(lines) - 1)
        self.done = {line["unit"]: line for line in lines[1:]}
        for line in self.done.values():
            path = self.partial / line["file"]
            if not path.is_file() or path.stat().st_size != line["nbytes"]:
                raise FluteError(
                    "cannot resume", where=str(path),
                    why=f"the journal says that it has {line['nbytes']} bytes, it "
                    + (f"has {path.stat().st_size}" if path.is_file() else "does not exist"),
                    fix="run again with --restart, which begins anew",
                )  # fmt: skip
        return True

    def _lines(self) -> list[dict[str, Any]]:
        """Complete lines; cuts off what a crash left of one."""
        data = self.journal.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with writing(self.journal):
                os.truncate(self.journal, len(whole))
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise FluteError(
                "cannot resume", where=str(self.journal), why=f"a line is not JSON: {error}",
                fix="run again with --restart, which begins anew",
            ) from error  # fmt: skip

    def _check_same(self, before: dict[str, Any], done: int) -> None:
        fields = [*before, *(field for field in self._fingerprint if field not in before)]
        for field in fields:
            old, new = before.get(field), self._fingerprint.get(field)
            if old != new:
                raise FluteError(
                    "cannot resume with other settings", where=f"{self.partial}: {field}",
                    why=f"{field} was {json.dumps(old)} when the work began and is "
                    f"{json.dumps(new)} now; {done} files are done",
                    fix=f"use the old value of {field}, or --restart to begin anew",
                )  # fmt: skip

    def record(self, unit: str, file: str, **details: Any) -> None:
        """Notes that a unit's file is complete; see the module's text for the order of things."""
        nbytes = (self.partial / file).stat().st_size
        line = {"unit": unit, "file": file, "nbytes": nbytes, **details}
        self._append(line)
        self.done[unit] = line

    def _append(self, line: dict[str, Any]) -> None:
        with writing(self.journal), self.journal.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        fsync(self.partial)

    def publish(self) -> Path:
        """Gives the folder its name, and only then removes the journal and what lies beside it.

        A crash in between leaves a complete folder with a journal in it: :meth:`finish`. Scratch
        files stay until then: without that of the tuned tensors a rerun would tune the tuned ones.
        """
        with writing(self.out):
            fsync(self.partial)
            os.rename(self.partial, self.out)
            fsync(self.out.parent)
        self._tidy()
        return self.out

    def _tidy(self) -> None:
        with writing(self.out):
            for path in self.out.glob(f"{SCRATCH}*"):
                path.unlink()
            (self.out / MARKER).unlink(missing_ok=True)
            (self.out / JOURNAL).unlink()  # last: it is what a rerun looks for
            fsync(self.out)

    @classmethod
    def finish(cls, out: str | Path, fingerprint: dict[str, Any]) -> bool:
        """Tidies up an output that a crash left complete; False where there is none.

        Raises FluteError when it was made with other settings.
        """
        if not (Path(out) / JOURNAL).is_file():
            return False
        folder = cls.__new__(cls)
        folder.out = folder.partial = Path(out)
        folder._fingerprint = json.loads(json.dumps(fingerprint))
        lines = folder._lines()
        folder._check_same(lines[0]["fingerprint"], len(lines) - 1)
        folder._tidy()
        return True


class Attempts:
    """How often work was begun that may need too much memory, and the process was killed at it.

    The kernel ends a process for its memory without an error that could be caught. A note beside
    the output is on disk before the work begins, and removed once the worst is over or the work
    ends in any other way, Ctrl-C included; so a note that is found tells of attempts that were
    killed.

    Args:
        path: of the note.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def killed(self) -> int:
        return json.loads(self._path.read_text())["begun"] if self._path.is_file() else 0

    @contextmanager
    def begun(self) -> Iterator[Callable[[], None]]:
        """For the time of the work; what it yields is to be called when the worst is over."""
        with whole_file(self._path) as unfinished:
            unfinished.write_text(json.dumps({"begun": self.killed + 1}))
        try:
            yield self._forget
        finally:
            self._forget()

    def _forget(self) -> None:
        if self._path.is_file():
            with writing(self._path):
                self._path.unlink()
                fsync(self._path.parent)


def source_fingerprint(checkpoint: Checkpoint) -> dict[str, Any]:
    """What of a source its output depends on, from config and headers: cheap and complete enough.

    The weights themselves are not hashed: that would read the source twice.
    """
    headers = hashlib.sha256()
    for name, info in checkpoint.tensors.items():
        headers.update(f"{name} {info.file.name} {info.dtype} {info.shape}\n".encode())
    config = json.dumps(checkpoint.config, sort_keys=True).encode()
    return {
        "source config": hashlib.sha256(config).hexdigest(),
        "source tensors": headers.hexdigest(),
    }
