"""From a dense model to HTTP answers of its quantized twins; run it with ``make demo``.

Quantizes the bundled model (``examples/stdlib_model``) to 4 and 3 bits, measures all three on
held-out files of Python's standard library, serves each quantized folder with a real
``vllm serve``, asks it to continue a prompt through the OpenAI-compatible API and stops it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "stdlib_model" / "model"
BINARIES = Path(sys.executable).parent
PROMPT = """def walk(path):
    for name in os.listdir(path):
"""
START_LIMIT_S = 300  # generous: importing vLLM is slow on a busy machine
console = Console()


def flute(*arguments: str | Path) -> str:
    """Output of the flute-vllm command."""
    command = [str(BINARIES / "flute-vllm"), *map(str, arguments)]
    shown = [_short(word) for word in command[1:] if not word.endswith(".py")]
    console.print(f"[dim]$ flute-vllm {' '.join(shown)}[/]", highlight=False)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        console.print(done.stdout + done.stderr)
        raise SystemExit(f"demo: `{' '.join(command)}` ended with {done.returncode}")
    return done.stdout


def _short(argument: str) -> str:
    path = Path(argument)
    return str(path.relative_to(ROOT)) if path.is_absolute() and ROOT in path.parents else argument


@contextlib.contextmanager
def vllm_server(model: Path, log: Path, extra_arguments: Sequence[str] = ()) -> Iterator[str]:
    """Starts ``vllm serve`` on a free local port, yields its base URL and stops it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(BINARIES / "vllm"), "serve", str(model), "--host", "127.0.0.1", "--port", str(port),
        "--served-model-name", "demo", "--max-model-len", "512", "--max-num-seqs", "8",
        *extra_arguments,
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    import torch

    if not torch.cuda.is_available():
        # Compilation on the CPU costs more than this demo runs; serving works with it as well.
        command += ["--enforce-eager", "--kv-cache-memory-bytes", str(64 << 20)]
        environment |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    console.print(f"[dim]$ vllm serve {_short(str(model))} --port {port} ...[/]", highlight=False)
    started = time.monotonic()
    with log.open("w") as output:
        server = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(server, url, log)
            console.print(f"[dim]ready after {time.monotonic() - started:.0f} s[/]")
            yield url
        finally:
            _stop(server)


def _wait_until_ready(server: subprocess.Popen, url: str, log: Path) -> None:
    import httpx

    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            tail = "\n".join(log.read_text().splitlines()[-30:])
            raise SystemExit(f"demo: the server ended with {server.returncode}, {log}:\n{tail}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        time.sleep(0.5)
    raise SystemExit(f"demo: the server was not ready within {START_LIMIT_S} s, see {log}")


def _stop(server: subprocess.Popen) -> None:
    """Ends the server and its workers, which share a process group of their own."""
    for sign, patience_s in ((signal.SIGTERM, 20), (signal.SIGKILL, 5)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(patience_s)
    console.print("[dim]server stopped[/]")


def complete(url: str, prompt: str) -> str:
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    answer = client.completions.create(model="demo", prompt=prompt, max_tokens=48, temperature=0)
    return answer.choices[0].text


def measure(model: Path, texts: list[Path]) -> float:
    return json.loads(flute("eval", model, *texts, "--json"))["perplexity"]


def write_results(path: Path, rows: list[tuple[str, dict, float]], files: int) -> None:
    import torch
    import vllm

    results = {
        "model": _short(str(MODEL)), "heldout_files": files, "python": platform.python_version(),
        "torch": torch.__version__, "vllm": vllm.__version__,
        "command": f"python examples/demo.py {' '.join(sys.argv[1:])}".strip(),
        "rows": [
            {
                "name": name, "bits_per_weight": info["bits_per_weight"]["linears"],
                "bytes": info["bytes"], "perplexity": perplexity,
            }
            for name, info, perplexity in rows
        ],
    }  # fmt: skip
    path.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "demo-out", help="replaced if it exists")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--group-size", type=int, default=64)
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)

    sys.path.insert(0, str(ROOT / "examples" / "stdlib_model"))
    from heldout import load_heldout

    stdlib = Path(sysconfig.get_paths()["stdlib"])
    texts = [stdlib / path for path in load_heldout().texts]
    rows = []
    for name, bits in [("dense bf16", None), *((f"{bits}-bit", bits) for bits in options.bits)]:
        folder = MODEL
        if bits is not None:
            folder = options.out / f"stdlib-w{bits}g{options.group_size}"
            flute("quantize", MODEL, folder, "--bits", str(bits),
                  "--group-size", str(options.group_size))  # fmt: skip
        info = json.loads(flute("info", folder, "--json"))
        rows.append((name, info, measure(folder, texts)))
        if bits is None:
            continue
        with vllm_server(folder, options.out / f"server-w{bits}.log") as url:
            completion = complete(url, PROMPT)
        code = Syntax(PROMPT + completion, "python", background_color="default")
        console.print(Panel(code, title=f"{name}: prompt and completion over HTTP"))
        if not completion.strip():
            raise SystemExit("demo: the completion is empty")

    write_results(options.out / "results.json", rows, len(texts))
    table = Table(title=f"{MODEL.parent.name}, {len(texts)} held-out files")
    for column in ("model", "bits per weight", "file size", "perplexity"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, info, perplexity in rows:
        bpw = info["bits_per_weight"]["linears"]
        table.add_row(name, f"{bpw:.2f}", f"{info['bytes'] / 1e6:.2f} MB", f"{perplexity:.3f}")
    console.print(table)


if __name__ == "__main__":
    main()
