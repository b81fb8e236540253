"""``vllm serve`` as a child process, and the memory that it holds on the host and on GPUs."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

MIB = 1 << 20


class Server:
    """``vllm serve`` on a free local port, with its workers in one process group."""

    def __init__(self, model: str, arguments: list[str], log: Path, limit_s: float) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        command = [
            sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, "--host",
            "127.0.0.1", "--port", str(port), "--served-model-name", "soak", *arguments,
        ]  # fmt: skip
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, env=environment, start_new_session=True
            )
        try:
            self._wait(limit_s)
        except BaseException:  # Ctrl-C, too, must not leave a server behind
            self.stop()
            raise

    def _wait(self, limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(
                    f"the server ended with {self.process.returncode}: {self.tail()}"
                )
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.url}/health", timeout=2)
                return
            time.sleep(0.5)
        raise RuntimeError(f"the server was not ready within {limit_s:.0f} s: {self.tail()}")

    def tail(self) -> str:
        return " | ".join(self.log.read_text(errors="replace").splitlines()[-5:])[-1500:]

    def host_bytes(self) -> dict[int, int]:
        """Resident memory of the server and each of its workers by pid, shared pages in each."""
        import psutil

        found = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            for process in (parent, *parent.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    found[process.pid] = process.memory_info().rss
        return found

    def stop(self) -> None:
        for sign, patience_s in ((signal.SIGTERM, 30), (signal.SIGKILL, 5)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience_s)


def ask_gpus(query: str) -> list[str]:
    """Lines of nvidia-smi's answer; none without it."""
    command = ["nvidia-smi", f"--query-{query}", "--format=csv,noheader,nounits"]
    with contextlib.suppress(FileNotFoundError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        return done.stdout.strip().splitlines() if done.returncode == 0 else []
    return []


def gpu_bytes(pids: set[int] | None = None) -> int | None:
    """Memory in use on all GPUs together, of some processes only where ``pids`` is given; None
    without a GPU, and where none of the processes is listed with its memory."""
    if pids is None:
        used = ask_gpus("gpu=memory.used")
        return sum(map(int, used)) * MIB if used else None
    listed = (line.split(", ") for line in ask_gpus("compute-apps=pid,used_memory"))
    mine = [int(size) for pid, size in listed if size.isdigit() and int(pid) in pids]
    return sum(mine) * MIB if mine else None


def gpu_name() -> str:
    return next(iter(ask_gpus("gpu=name")), "CPU")
