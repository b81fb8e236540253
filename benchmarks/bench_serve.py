"""Speed of whole models in vLLM: ours beside bf16, Marlin, Machete and humming, without weights.

    python benchmarks/bench_serve.py --models 8b --methods flute4,bf16,humming,marlin [--append]
    python benchmarks/bench_serve.py --smoke          # a tiny model, also on a CPU

Milliseconds of a decode step at each batch size, tokens/s of prefill, start-up and load seconds and
peak memory. Shapes are those of the named model with ``--load-format dummy``. One engine a
process; ``--together 4`` starts four at once on the same GPU and lets them measure one after
another, which saves minutes and is noted in the rows (their start_s is then longer). With
``--wait-for FILE`` they start at once and measure when the file appears, when other work on the
GPU is done. With ``--gpus 4`` engines of several tensor-parallel sizes start together, on GPUs
that placement.py chooses by memory. An engine that fails, runs into its time limit or does not fit
into the GPU's memory leaves the reason as ``error`` in its row.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import placement
from model_shapes import MODELS, Method, cache_bytes, methods, weight_bytes, write_config
from placement import gpu_total_bytes
from serve_record import save, save_profile

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "h200" / "serve.json"
GRAPH_SIZES = [1, 2, 4, 8, 16, 32, 64, 128]
LOADED = re.compile(r"Model loading took .*?([\d.]+) seconds")
GIB = 1 << 30
WORKING_BYTES = 5 * GIB  # of an engine beside weights and cache: activations, graphs, libraries


@dataclass
class Run:
    """One engine: its row, its folder and, once started, its process."""

    model: str
    method: str
    tp: int
    settings: Method
    folder: Path
    together: int = 1  # engines that started at once with it, itself included
    devices: tuple[int, ...] = ()  # its GPUs; none: all that are visible
    process: subprocess.Popen | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        return f"{self.model} {self.method} tp={self.tp}"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None


def engine_arguments(arguments: argparse.Namespace, run: Run) -> dict:
    common = {
        "model": str(run.folder / "model"), "load_format": "dummy", "dtype": "bfloat16",
        "skip_tokenizer_init": True, "enable_prefix_caching": False, "seed": 0,
        "tensor_parallel_size": run.tp, "max_num_seqs": max(arguments.batches),
    }  # fmt: skip
    if arguments.smoke:
        return common | {
            "enforce_eager": True, "max_model_len": 128, "kv_cache_memory_bytes": 64 << 20,
        } | run.settings.engine  # fmt: skip
    tokens = arguments.prefill[1]
    return common | {
        "max_model_len": tokens + 256,
        # All prompts of a batch are prefilled in the first step, so that steps are comparable.
        "max_num_batched_tokens": 8192, "kv_cache_memory_bytes": kv_bytes(arguments, run),
        # Only what must be free at the start: others may have loaded by then.
        "gpu_memory_utilization": share_of_gpu(arguments, run),
        "compilation_config": {"cudagraph_capture_sizes": GRAPH_SIZES},
    } | run.settings.engine  # fmt: skip


def kv_bytes(arguments: argparse.Namespace, run: Run) -> int:
    """On each GPU: what the largest of the measured batches needs, unless it was given."""
    if arguments.kv_gib:
        return int(arguments.kv_gib * GIB)
    prompts, tokens = arguments.prefill
    decoded = max(arguments.batches) * (arguments.prompt_tokens + arguments.steps + 32)
    needed = max(prompts * (tokens + 32), decoded, 2 * (tokens + 256))
    return int(1.1 * needed * cache_bytes(run.model, run.tp))


def needed_bytes(arguments: argparse.Namespace, run: Run) -> int:
    """On each GPU."""
    weights = weight_bytes(run.model, run.settings) // run.tp
    return weights + kv_bytes(arguments, run) + WORKING_BYTES


def share_of_gpu(arguments: argparse.Namespace, run: Run) -> float:
    total = gpu_total_bytes()
    share = needed_bytes(arguments, run) / total if total else 1 / arguments.together
    return round(min(0.95, share), 3)


def misfit(arguments: argparse.Namespace, run: Run, total: int | None) -> str | None:
    """Why the engine cannot fit on GPUs of ``total`` bytes; None when it can, or without a GPU."""
    needed = needed_bytes(arguments, run)
    if total is None or needed <= total:
        return None
    weights = weight_bytes(run.model, run.settings) // run.tp
    return (
        f"not started: {weights / GIB:.0f} GiB of weights, with cache and activations "
        f"{needed / GIB:.0f} GiB on each GPU, which has {total / GIB:.0f}"
    )


def start(arguments: argparse.Namespace, run: Run) -> None:
    write_config(run.folder / "model", run.model, run.settings)
    for name in ("ready", "go", "late", "result.json"):  # of an earlier run
        (run.folder / name).unlink(missing_ok=True)
    job = {
        "engine": engine_arguments(arguments, run), "batches": arguments.batches,
        "prompt_tokens": arguments.prompt_tokens, "steps": arguments.steps,
        "prefill": arguments.prefill, "repeats": arguments.repeats,
        "vocabulary": MODELS[run.model]["vocab_size"], "method": run.method,
        "profile": arguments.profile_steps,
        "ready": str(run.folder / "ready"), "go": str(run.folder / "go"),
    }  # fmt: skip
    (run.folder / "job.json").write_text(json.dumps(job))
    script = str(Path(__file__).with_name("serve_engine.py"))
    command = [sys.executable, script, *(str(run.folder / n) for n in ("job.json", "result.json"))]
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
        # peak_bytes travels to the workers as a function
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }  # fmt: skip
    environment |= placement.visible(run.devices, environment)
    if arguments.smoke:  # compiling a tiny model for the CPU takes longer than measuring it
        environment["TORCHDYNAMO_DISABLE"] = "1"
        environment.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with run.log.open("w") as log:
        run.process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    run.started = time.monotonic()


def stop(run: Run) -> None:
    """Ends the engine with its workers, which share a process group of their own."""
    for sign, patience_s in ((signal.SIGTERM, 15), (signal.SIGKILL, 5)):
        if not run.is_running():
            break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.process.wait(patience_s)
    with contextlib.suppress(ProcessLookupError):  # workers that outlived their parent
        os.killpg(run.process.pid, signal.SIGKILL)


def failure(run: Run, why: str) -> str:
    """The reason with the last error lines of the log, as one line."""
    lines = run.log.read_text(errors="replace").splitlines() if run.log.exists() else []
    errors = [
        line.strip()
        for line in lines
        if re.search(r"\w(Error|Exception)\b.*:", line) and "WARNING" not in line
    ]
    return f"{why}: {' | '.join(dict.fromkeys(errors[-4:])) or ' | '.join(lines[-3:])}"[:800]


def wait(runs: list[Run], limit_s: float, is_done) -> None:
    """Until each run is done, has ended or is over its limit, which ends it."""
    while any(run.is_running() and not is_done(run) for run in runs):
        for run in runs:
            if run.is_running() and not is_done(run) and time.monotonic() - run.started > limit_s:
                (run.folder / "late").touch()
                stop(run)
        time.sleep(0.1)


def row_of(run: Run) -> dict:
    return {"model": run.model, "method": run.method, "tp": run.tp}


def finish(run: Run, arguments: argparse.Namespace) -> dict:
    """Lets one engine measure and returns its row."""
    row, limit_s = row_of(run), arguments.limit_s
    if run.is_running():
        limit_s = arguments.measure_s or arguments.limit_s
        (run.folder / "go").touch()
        wait([run], time.monotonic() - run.started + limit_s, lambda r: False)
    stop(run)
    log = run.log.read_text(errors="replace")
    loads = [float(text) for text in LOADED.findall(log)]
    if run.has("late"):
        return row | {"error": failure(run, f"not done within {limit_s:.0f} s")}
    if not run.has("result.json"):
        return row | {"error": failure(run, f"ended with {run.process.returncode}")}
    if run.settings.kernel not in log:
        shown = sorted(set(re.findall(r"Using (\w+Kernel)\b", log))) or "no kernel's name"
        return row | {"error": f"expected {run.settings.kernel!r} in the log, found {shown}"}
    result = json.loads((run.folder / "result.json").read_text())
    row |= {key: result[key] for key in ("decode_ms", "decode_tok_s", "prefill_tok_s", "start_s")}
    if "profile" in result:
        save_profile(arguments, row_of(run), result)
    return row | {
        "load_s": max(loads) if loads else None, "peak_gib": result["peak_gib"],
        "together": run.together, "gpus": list(run.devices or range(run.tp)),
        "versions": result["versions"],
    }  # fmt: skip


def run_group(arguments: argparse.Namespace, runs: list[Run]):
    """Starts the runs at once, waits until all can measure, and yields their rows in turn."""
    try:
        for run, devices in zip(runs, place(arguments, runs).devices, strict=True):
            run.together, run.devices = len(runs), devices if arguments.gpus else ()
            start(arguments, run)
        wait(runs, arguments.limit_s, lambda run: run.has("ready"))
        while arguments.wait_for and not arguments.wait_for.exists():
            time.sleep(0.1)
        for run in runs:
            yield finish(run, arguments)
    finally:
        for run in runs:
            if run.is_running():
                stop(run)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="8b", help=f"of {', '.join(MODELS)}")
    usual = [name for name in methods(128) if not name.endswith("-head")]
    parser.add_argument("--methods", default=",".join(usual))
    parser.add_argument("--tp", default="1", help="tensor-parallel sizes, such as 1,2")
    parser.add_argument("--engines", default="", help="METHOD:TP,... instead of these two")
    parser.add_argument("--batches", default="1,8,32,128")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--prefill", default="8x2048", help="prompts x tokens of each")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile-steps", type=int, default=0, help="also list a step's kernels")
    parser.add_argument("--kv-gib", type=float, default=0, help="on each GPU; 0: what is needed")
    parser.add_argument("--together", type=int, default=1, help="engines that start at once")
    parser.add_argument("--gpus", type=int, default=0, help="to place engines on; 0: the first tp")
    parser.add_argument("--limit-s", type=float, default=400, help="of start-up, and of measuring")
    parser.add_argument("--measure-s", type=float, default=0, help="of measuring, if another")
    parser.add_argument("--budget-s", type=float, default=0, help="no new engine after it; 0: none")
    parser.add_argument("--wait-for", type=Path, help="measure once this file exists")
    parser.add_argument("--append", action="store_true", help="keep other rows of the output")
    parser.add_argument("--keep-logs", type=Path, help="folder for the engines' logs")
    parser.add_argument("--commit", default="")
    parser.add_argument("--smoke", action="store_true", help="tiny model, eager, two batch sizes")
    parser.add_argument("--out", type=Path, default=None, help=f"default: {RESULTS.name}")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.models, arguments.batches = "tiny", "1,2"
        arguments.steps, arguments.prefill, arguments.repeats = 8, "2x64", 1
        if arguments.methods == parser.get_default("methods"):
            arguments.methods = "flute4,bf16"
    arguments.out = arguments.out or (Path("serve_smoke.json") if arguments.smoke else RESULTS)
    arguments.batches = [int(batch) for batch in arguments.batches.split(",")]
    arguments.prefill = [int(number) for number in arguments.prefill.split("x")]
    known = methods(arguments.group_size)
    arguments.engines = engines(arguments)
    for name, tp in arguments.engines:
        if name not in known:
            parser.error(f"unknown method {name!r}; known are {', '.join(known)}")
        if arguments.gpus and tp > arguments.gpus:
            parser.error(f"{name} on {tp} GPUs does not go with --gpus {arguments.gpus}")
    for name in arguments.models.split(","):
        if name not in MODELS:
            parser.error(f"unknown model {name!r}; known are {', '.join(MODELS)}")
    return arguments


def engines(arguments: argparse.Namespace) -> list[tuple[str, int]]:
    """Method and tensor-parallel size of each engine, in the order of measuring."""
    if arguments.engines:
        pairs = (engine.partition(":") for engine in arguments.engines.split(","))
        return [(method, int(tp or 1)) for method, _, tp in pairs]
    sizes = map(int, arguments.tp.split(","))
    return [(method, tp) for tp in sizes for method in arguments.methods.split(",")]


def plan(arguments: argparse.Namespace, root: Path) -> list[Run]:
    known = methods(arguments.group_size)
    return [
        Run(model, method, tp, known[method], root / f"{model}-{method}-{tp}")
        for model in arguments.models.split(",")
        for method, tp in arguments.engines
    ]


def place(arguments: argparse.Namespace, runs: list[Run]) -> placement.Places:
    """GPUs of engines that start at once: without --gpus the first ones for all."""
    needs = [placement.Need(run.tp, needed_bytes(arguments, run)) for run in runs]
    return placement.place(needs, arguments.gpus or max(run.tp for run in runs))


def can_start_together(arguments: argparse.Namespace, runs: list[Run], total: int | None) -> bool:
    """Without --gpus only engines of one tp, as they all start at the first GPU."""
    is_mixed = len({run.tp for run in runs}) > 1
    if len(runs) > arguments.together or (is_mixed and not arguments.gpus):
        return False
    return total is None or max(place(arguments, runs).load) <= total


def split(arguments: argparse.Namespace, runs: list[Run], total: int | None) -> list[list[Run]]:
    """Groups that start at once, in order: as many as were asked for that fit on the GPUs."""
    groups: list[list[Run]] = []
    for run in runs:
        if groups and can_start_together(arguments, [*groups[-1], run], total):
            groups[-1].append(run)
        else:
            groups.append([run])
    return groups


def main() -> int:
    arguments = parse()
    begin, new = time.monotonic(), []
    is_kept = arguments.append and arguments.out.exists()
    old = json.loads(arguments.out.read_text()) if is_kept else {}
    with tempfile.TemporaryDirectory() as scratch:
        runs = plan(arguments, arguments.keep_logs or Path(scratch))
        total = gpu_total_bytes()
        refused = {run.name: why for run in runs if (why := misfit(arguments, run, total))}
        for run in runs:
            if run.name in refused:
                new.append(row_of(run) | {"error": refused[run.name]})
                print(json.dumps(new[-1]), flush=True)
        for group in split(arguments, [r for r in runs if r.name not in refused], total):
            if arguments.budget_s and time.monotonic() - begin > arguments.budget_s:
                why = f"not started: the budget of {arguments.budget_s:.0f} s was spent"
                rows = (row_of(run) | {"error": why} for run in group)
            else:
                rows = run_group(arguments, group)
            for row in rows:
                new.append(row)
                print(f"{time.monotonic() - begin:5.0f}s {json.dumps(row)}", flush=True)
                save(arguments, old, new)
    return 1 if any("error" in row for row in new[len(refused) :]) else 0


if __name__ == "__main__":
    sys.exit(main())
