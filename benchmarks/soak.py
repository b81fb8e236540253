"""Serves a model under load: no error, no growing memory, the answers of a quiet server.

    python benchmarks/soak.py MODEL --duration-s 600 [--streams 64] [--out F] [-- SERVE_ARG...]

Starts ``vllm serve MODEL``, asks a few probes alone, then keeps ``--streams`` completions of mixed
lengths running, some of them abandoned half way, and asks the probes again in between. In 16 bits
a batch changes the rounding of attention, so a near tie may fall the other way: an answer may leave
the quiet one only at a step whose two best tokens lie within TIE of each other. Memory counts as
growing when the last third of the time holds more than the third before it by more than the limit.
Exit code 1 when any of this fails.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIE = 0.15  # nats, as in tests/test_gpu_vllm.py
PROBES, PROBE_TOKENS = 8, 32
ABANDONED = 0.05  # share of streams that the client leaves half way
HOST_GROWTH, GPU_GROWTH = 128 << 20, 64 << 20  # bytes
SAMPLE_S = 2.0
MIB = 1 << 20


@dataclass
class Load:
    """Counts of a run; ``errors`` holds the first texts."""

    requests: int = 0
    tokens: int = 0
    abandoned: int = 0
    failed: int = 0
    errors: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of each finished request
    first_token: list[float] = field(default_factory=list)

    def fail(self, error: str) -> None:
        self.failed += 1
        if len(self.errors) < 10:
            self.errors.append(error[:300])


@dataclass(frozen=True)
class Answer:
    """Greedy tokens and, for each step, how far the second best token was, in nats."""

    tokens: tuple[int, ...]
    gaps: tuple[float, ...]


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

    def host_bytes(self) -> int:
        """Resident memory of the server and all its workers, shared pages counted once each."""
        import psutil

        total = 0
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            for process in (parent, *parent.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    total += process.memory_info().rss
        return total

    def stop(self) -> None:
        for sign, patience_s in ((signal.SIGTERM, 30), (signal.SIGKILL, 5)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience_s)


def ask_gpus(field_name: str) -> list[str]:
    """One line for each GPU; none without nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={field_name}", "--format=csv,noheader,nounits"]
    with contextlib.suppress(FileNotFoundError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        return done.stdout.strip().splitlines() if done.returncode == 0 else []
    return []


def gpu_bytes() -> int | None:
    """Memory in use on all GPUs together; None without a GPU."""
    used = ask_gpus("memory.used")
    return sum(map(int, used)) * MIB if used else None


def gpu_name() -> str:
    return next(iter(ask_gpus("name")), "CPU")


def growth(samples: list[int]) -> int | None:
    """Bytes by which the last third holds more than the middle one; None for too few samples."""
    third = len(samples) // 3
    if third < 2:
        return None
    middle, last = samples[-2 * third : -third], samples[-third:]
    return int(statistics.median(last) - statistics.median(middle))


def compare(quiet: Answer, loaded: Answer, tie: float = TIE) -> str:
    """ "equal", "near tie" or "different": the first step that differs decides."""
    if len(quiet.tokens) != len(loaded.tokens):
        return "different"
    for step, (one, other) in enumerate(zip(quiet.tokens, loaded.tokens, strict=True)):
        if one != other:
            return "near tie" if quiet.gaps[step] < tie else "different"
    return "equal"


class Client:
    """Sends the load and the probes. Prompts are random token ids of the model's vocabulary."""

    def __init__(self, url: str, vocabulary: int, arguments: argparse.Namespace) -> None:
        from openai import AsyncOpenAI

        self.api = AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=arguments.request_limit_s
        )
        self.vocabulary, self.arguments = vocabulary, arguments
        self.random, self.load = random.Random(0), Load()

    def prompt(self, generator: random.Random, tokens: int) -> list[int]:
        return [generator.randint(3, self.vocabulary - 1) for _ in range(tokens)]

    def length(self, bounds: list[int]) -> int:
        """Short lengths are as frequent as long ones on a logarithmic scale."""
        low, high = bounds
        return round(low * (high / low) ** self.random.random())

    async def probe(self, index: int) -> Answer:
        generator = random.Random(1000 + index)
        prompt = self.prompt(generator, 4 + 12 * index % 90)
        answer = await self.api.completions.create(
            model="soak", prompt=prompt, max_tokens=PROBE_TOKENS, temperature=0, logprobs=2,
            extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
        )  # fmt: skip
        found = answer.choices[0].logprobs
        tokens = tuple(int(text.partition(":")[2]) for text in found.tokens)
        ordered = [sorted(step.values(), reverse=True) for step in found.top_logprobs]
        return Answer(tokens, tuple(best[0] - best[1] for best in ordered))

    async def stream(self) -> None:
        wanted = self.length(self.arguments.new_tokens)
        is_abandoned = self.random.random() < ABANDONED
        prompt = self.prompt(self.random, self.length(self.arguments.prompt_tokens))
        start = time.monotonic()
        chunks = 0
        events = await self.api.completions.create(
            model="soak", prompt=prompt, max_tokens=wanted, stream=True, temperature=0.7,
            stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
        )  # fmt: skip
        usage = None
        async for event in events:
            if event.usage is not None:
                usage = event.usage
            if event.choices:
                chunks += 1
                if chunks == 1:
                    self.load.first_token.append(time.monotonic() - start)
                if is_abandoned and chunks > wanted // 2:
                    await events.close()
                    self.load.abandoned += 1
                    return
        if usage is None or usage.completion_tokens != wanted:
            got = None if usage is None else usage.completion_tokens
            raise ValueError(f"asked for {wanted} tokens, the stream ended with {got}")
        self.load.requests += 1
        self.load.tokens += wanted
        self.load.seconds.append(time.monotonic() - start)

    async def keep_streaming(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            try:
                await self.stream()
            except Exception as error:  # noqa: BLE001 - every failure of a request is counted
                self.load.fail(f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.2)

    async def keep_probing(self, quiet: list[Answer], deadline: float) -> dict[str, int]:
        counts = {"equal": 0, "near tie": 0, "different": 0}
        index = 0
        while time.monotonic() < deadline:
            try:
                answer = await self.probe(index % len(quiet))
                counts[compare(quiet[index % len(quiet)], answer)] += 1
            except Exception as error:  # noqa: BLE001
                self.load.fail(f"probe: {type(error).__name__}: {error}")
            index += 1
            await asyncio.sleep(0.1)
        return counts


async def sample_memory(server: Server, deadline: float) -> tuple[list[int], list[int]]:
    host, gpu = [], []
    while time.monotonic() < deadline:
        host.append(server.host_bytes())
        used = await asyncio.to_thread(gpu_bytes)
        if used is not None:
            gpu.append(used)
        await asyncio.sleep(SAMPLE_S)
    return host, gpu


async def run(server: Server, vocabulary: int, arguments: argparse.Namespace) -> dict:
    client = Client(server.url, vocabulary, arguments)
    quiet = [await client.probe(index) for index in range(PROBES)]
    again = [await client.probe(index) for index in range(PROBES)]
    alone = [compare(*pair) for pair in zip(quiet, again, strict=True)]
    deadline = time.monotonic() + arguments.duration_s
    probes, (host, gpu), *_ = await asyncio.gather(
        client.keep_probing(quiet, deadline),
        sample_memory(server, deadline),
        *(client.keep_streaming(deadline) for _ in range(arguments.streams)),
    )
    await client.api.close()
    load = client.load
    return {
        "requests": load.requests, "tokens": load.tokens, "abandoned": load.abandoned,
        "failed": load.failed, "errors": load.errors,
        "tokens_per_s": round(load.tokens / arguments.duration_s, 1),
        "request_s": quantiles(load.seconds), "first_token_s": quantiles(load.first_token),
        "probes_alone": {word: alone.count(word) for word in ("equal", "near tie", "different")},
        "probes_under_load": probes,
        "memory_mib": {
            "host": summary(host), "gpu": summary(gpu) if gpu else None, "samples": len(host),
        },
    }  # fmt: skip


def quantiles(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    at = {"p50": 0.5, "p99": 0.99}
    return {
        k: round(ordered[min(len(ordered) - 1, int(q * len(ordered)))], 3) for k, q in at.items()
    }


def summary(samples: list[int]) -> dict:
    grown = growth(samples)
    return {
        "first": samples[0] // MIB, "last": samples[-1] // MIB, "most": max(samples) // MIB,
        "growth": None if grown is None else round(grown / MIB, 1),
    }  # fmt: skip


def problems(result: dict, server_ended: bool) -> list[str]:
    """What failed; empty for a run that passed."""
    found = []
    if server_ended:
        found.append("the server ended by itself")
    if result["failed"]:
        found.append(f"{result['failed']} requests failed, such as {result['errors'][:1]}")
    if not result["requests"]:
        found.append("no request was finished")
    for name in ("probes_alone", "probes_under_load"):
        if result[name]["different"]:
            found.append(f"{name}: {result[name]['different']} answers differ")
    if not sum(result["probes_under_load"].values()):
        found.append("no probe was answered under load")
    for place, limit in (("host", HOST_GROWTH), ("gpu", GPU_GROWTH)):
        grown = (result["memory_mib"][place] or {}).get("growth")
        if grown is not None and grown * MIB > limit:
            found.append(f"{place} memory grew by {grown} MiB, limit {limit // MIB}")
    return found


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    words = sys.argv[1:] if argv is None else argv
    split = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--duration-s", type=float, default=600)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=[8, 1024])
    parser.add_argument("--new-tokens", type=int, nargs=2, default=[8, 256])
    parser.add_argument("--start-limit-s", type=float, default=400)
    parser.add_argument("--request-limit-s", type=float, default=300)
    parser.add_argument("--commit", default="")
    parser.add_argument("--log", type=Path, help="keep the server's log here")
    parser.add_argument("--out", type=Path, default=Path("soak.json"))
    arguments = parser.parse_args(words[:split])
    arguments.serve = words[split + 1 :]
    return arguments


@contextlib.contextmanager
def log_file(wanted: Path | None) -> Iterator[Path]:
    if wanted is not None:
        yield wanted
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "log"


def main() -> int:
    from importlib import metadata

    arguments = parse()
    config = json.loads((Path(arguments.model) / "config.json").read_text())
    vocabulary = config.get("vocab_size") or config["text_config"]["vocab_size"]
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    with log_file(arguments.log) as log:
        begin = time.monotonic()
        server = Server(arguments.model, arguments.serve, log, arguments.start_limit_s)
        started = time.monotonic() - begin
        try:
            result = asyncio.run(run(server, vocabulary, arguments))
            found = problems(result, server.process.poll() is not None)
        finally:
            server.stop()
    record = {
        "device": gpu_name(), "vllm": metadata.version("vllm"), "torch": metadata.version("torch"),
        "commit": arguments.commit or head.stdout.strip(),
        "command": "python " + " ".join(sys.argv), "duration_s": arguments.duration_s,
        "streams": arguments.streams, "start_s": round(started, 1), **result,
        "problems": found, "passed": not found,
    }  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
