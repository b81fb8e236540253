"""Serves a model under load: no error, no growing memory, the answers of a quiet server.

    python benchmarks/soak.py MODEL --duration-s 600 [--streams 64] [--out F] [-- SERVE_ARG...]
    python benchmarks/soak.py 8b --method flute4 --no-probes      # shapes of a model, dummy weights

Starts ``vllm serve MODEL``, asks a few probes alone, then keeps ``--streams`` completions of mixed
lengths running, some of them abandoned half way, and asks the probes again in between. In 16 bits
a batch changes the rounding of attention, so a near tie may fall the other way: an answer may leave
the quiet one only at a step whose two best tokens lie within TIE of each other. Memory counts as
growing when the last third of the time holds more than the third before it by more than the limit:
the server's processes on the host, and on the GPU too where nvidia-smi tells processes apart.
Exit code 1 when any of this fails.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from model_shapes import MODELS, methods, write_config
from soak_server import MIB, Server, gpu_bytes, gpu_name

ROOT = Path(__file__).resolve().parent.parent
TIE = 0.15  # nats, as in tests/agreement.py
PROBES, PROBE_TOKENS = 8, 32
ABANDONED = 0.05  # share of streams that the client leaves half way
HOST_GROWTH, GPU_GROWTH = 128 << 20, 64 << 20  # bytes
SAMPLE_S = 2.0
WORDS = ("equal", "near tie", "different")  # what compare() says


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
        counts = dict.fromkeys(WORDS, 0)
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


async def sample_memory(server: Server, deadline: float, is_shared: bool) -> dict:
    """Summaries of the server's memory. ``is_shared``: others use the GPU, so that memory of the
    whole device would tell nothing."""
    host, gpu, device = [], [], []
    while time.monotonic() < deadline:
        processes = server.host_bytes()
        host.append(sum(processes.values()))
        gpu.append(await asyncio.to_thread(gpu_bytes, set(processes)))
        device.append(None if is_shared else await asyncio.to_thread(gpu_bytes))
        await asyncio.sleep(SAMPLE_S)
    found = {"host": summary(host), "gpu": None, "gpu_of": None, "samples": len(host)}
    for place, samples in (("the server's processes", gpu), ("the whole device", device)):
        if found["gpu"] is None and None not in samples:
            found |= {"gpu": summary(samples), "gpu_of": place}
    return found


async def run(server: Server, vocabulary: int, arguments: argparse.Namespace) -> dict:
    client = Client(server.url, vocabulary, arguments)
    probes = range(0 if arguments.no_probes else PROBES)
    quiet = [await client.probe(index) for index in probes]
    again = [await client.probe(index) for index in probes]
    alone = [compare(*pair) for pair in zip(quiet, again, strict=True)]
    deadline = time.monotonic() + arguments.duration_s
    memory, *others = await asyncio.gather(
        sample_memory(server, deadline, arguments.shared_gpu),
        *([client.keep_probing(quiet, deadline)] if quiet else []),
        *(client.keep_streaming(deadline) for _ in range(arguments.streams)),
    )
    await client.api.close()
    load = client.load
    return {
        "requests": load.requests, "tokens": load.tokens, "abandoned": load.abandoned,
        "failed": load.failed, "errors": load.errors,
        "tokens_per_s": round(load.tokens / arguments.duration_s, 1),
        "request_s": quantiles(load.seconds), "first_token_s": quantiles(load.first_token),
        "probes_alone": {word: alone.count(word) for word in WORDS} if quiet else None,
        "probes_under_load": others[0] if quiet else None, "memory_mib": memory,
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
        if result[name] is None:  # none were asked for
            continue
        if result[name]["different"]:
            found.append(f"{name}: {result[name]['different']} answers differ")
        if not sum(result[name].values()):
            found.append(f"{name}: no probe was answered")
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
    parser.add_argument("model", help=f"a folder, or shapes of {', '.join(MODELS)}")
    parser.add_argument("--method", default="flute4", help="of shapes: how linear layers run")
    parser.add_argument("--no-probes", action="store_true", help="load only, no answers compared")
    parser.add_argument("--shared-gpu", action="store_true", help="others use the GPU meanwhile")
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
    if arguments.model not in MODELS and not (Path(arguments.model) / "config.json").is_file():
        parser.error(f"{arguments.model} is neither a folder with config.json nor known shapes")
    if arguments.method not in methods(128):
        parser.error(f"unknown method {arguments.method!r}; known: {', '.join(methods(128))}")
    return arguments


@contextlib.contextmanager
def prepared(arguments: argparse.Namespace) -> Iterator[tuple[str, list[str], Path]]:
    """Folder of the model, arguments of the server, and its log."""
    with tempfile.TemporaryDirectory() as folder:
        model, extra = arguments.model, []
        if model in MODELS:
            method = methods(128)[arguments.method]
            model = str(write_config(Path(folder) / arguments.model, model, method))
            extra = ["--load-format", "dummy", "--skip-tokenizer-init"]
            extra += [word for name, value in method.engine.items()
                      for word in (f"--{name.replace('_', '-')}", str(value))]  # fmt: skip
        yield model, [*extra, *arguments.serve], arguments.log or Path(folder) / "log"


def main() -> int:
    from importlib import metadata

    arguments = parse()
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    with prepared(arguments) as (model, serve, log):
        config = json.loads((Path(model) / "config.json").read_text())
        vocabulary = config.get("vocab_size") or config["text_config"]["vocab_size"]
        begin = time.monotonic()
        server = Server(model, serve, log, arguments.start_limit_s)
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
