"""Commands that run side by side, each with a time limit, a log and a place in a summary.

A step starts when those it comes after have ended, well or not: one that fails or hangs costs its
own result only. The summary is rewritten at every end, so it stands also when the whole is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Step:
    """One command. ``finish`` runs after it, as a rule to turn its output into a JSON file."""

    name: str
    command: list[str]
    limit_s: float
    after: tuple[str, ...] = ()
    finish: Callable[[], None] | None = None
    process: subprocess.Popen | None = None
    began: float = 0.0
    ended: dict = field(default_factory=dict)

    def start(self, folder: Path, environment: dict[str, str], cwd: Path) -> None:
        self.began = time.monotonic()
        with (folder / f"{self.name}.log").open("w") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=environment, cwd=cwd,
                start_new_session=True,
            )  # fmt: skip

    def poll(self) -> bool:
        """Whether the step has ended; ends it when it is over its limit."""
        code, late = self.process.poll(), time.monotonic() - self.began > self.limit_s
        if code is None and not late:
            return False
        end_group(self.process)
        self.ended = {
            "rc": code, "seconds": round(time.monotonic() - self.began, 1),
            "outcome": "over its limit" if code is None else "passed" if code == 0 else "failed",
        }  # fmt: skip
        if self.finish is not None:
            try:
                self.finish()
            except Exception as error:  # noqa: BLE001 - the other steps go on
                self.ended["finish"] = f"{type(error).__name__}: {error}"
        return True


def end_group(process: subprocess.Popen) -> None:
    """Ends a process and all that it started, also in groups of their own: engines and servers."""
    import psutil

    started = []
    with contextlib.suppress(psutil.NoSuchProcess):
        started = psutil.Process(process.pid).children(recursive=True)
    for sign, patience_s in ((signal.SIGTERM, 10), (signal.SIGKILL, 5)):
        if process.poll() is not None:
            break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
    with contextlib.suppress(ProcessLookupError):  # children that outlived it
        os.killpg(process.pid, signal.SIGKILL)
    for child in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def run(
    steps: list[Step],
    folder: Path,
    environment: dict[str, str] | None = None,
    cwd: Path | None = None,
    limit_s: float = float("inf"),
    say: Callable[[str], None] = print,
) -> dict[str, dict]:
    """Runs all steps and returns how each ended, by name.

    ``folder`` gets NAME.log of each, NAME.done when it has ended, and summary.json. After
    ``limit_s`` what still runs is ended, and what has not begun is noted as such.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        (folder / f"{step.name}.done").unlink(missing_ok=True)
    begin, ended = time.monotonic(), {}
    waiting, running = list(steps), []
    try:
        while waiting or running:
            elapsed = time.monotonic() - begin
            for step in [s for s in waiting if set(s.after) <= set(ended)]:
                waiting.remove(step)
                step.limit_s = min(step.limit_s, max(1.0, limit_s - elapsed))
                say(f"{elapsed:5.0f} s  start {step.name}, limit {step.limit_s:.0f} s")
                step.start(folder, {**os.environ, **(environment or {})}, cwd or Path.cwd())
                running.append(step)
            for step in [s for s in running if s.poll()]:
                running.remove(step)
                ended[step.name] = step.ended
                (folder / f"{step.name}.done").touch()
                (folder / "summary.json").write_text(json.dumps(ended, indent=1) + "\n")
                say(f"{time.monotonic() - begin:5.0f} s  {step.name}: {json.dumps(step.ended)}")
            if waiting and not running and not any(set(s.after) <= set(ended) for s in waiting):
                raise ValueError(f"steps wait for each other: {[s.name for s in waiting]}")
            time.sleep(0.1)
    finally:
        for step in running:
            end_group(step.process)
    return ended
