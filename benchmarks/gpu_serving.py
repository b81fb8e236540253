"""Everything about serving that needs GPUs, in one command for each kind of machine.

    python benchmarks/gpu_serving.py one --out DIR     # one GPU, about 7 minutes
    python benchmarks/gpu_serving.py two --out DIR     # two GPUs, about 7 minutes
    python benchmarks/gpu_serving.py four --out DIR    # four GPUs, about 7 minutes
    python benchmarks/gpu_serving.py speed --out DIR   # one GPU, about 6 minutes
    python benchmarks/gpu_serving.py collect DIR...    # results to benchmarks/results/h200

``one``: features of vLLM (tests/test_gpu_features.py), load of a 70B checkpoint, two servers under
load. ``two``: tensor and pipeline parallel against one GPU, and 70B shapes on two GPUs and on one.
``four``: the same on four GPUs and both ways at once, and 70B shapes on four, two and one.
``speed``: 8B shapes with every method, two more models with the most important ones.
What only has to work runs side by side; what is timed waits until the rest is done, but for the
servers under load, which are there all the time. Needs vLLM and the compiled kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

import placement
import serve_record
from steps import Step, run

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "h200"
MODEL = ROOT / "examples" / "stdlib_model" / "model"
PYTHON = sys.executable
FEATURES = ("features", "features_two", "features_four")
COPIED = (*(f"{name}.json" for name in FEATURES), "load.json", "soak.json")
# Of the set four, in the order of measuring: ours beside what it is compared with.
ENGINES = "flute4:4,marlin:4,flute4:2,marlin:2,bf16:2,flute4:1"
# NVLink multicast needs a fabric that shared hosts and virtual machines may lack; none of what is
# measured here needs it.
NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
}  # fmt: skip
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**QUIET, **NO_MULTICAST, "PYTHONPATH": path}


def script(name: str, *arguments: object) -> list[str]:
    return [PYTHON, str(ROOT / "benchmarks" / name), *map(str, arguments)]


def record(arguments: argparse.Namespace) -> dict:
    """What stands at the head of every result file."""
    versions = {name: metadata.version(name) for name in ("vllm", "torch")}
    return {
        "device": placement.ask_gpu("name") or "CPU", **versions,
        "commit": arguments.commit, "command": "python " + " ".join(sys.argv),
    }  # fmt: skip


def features(arguments: argparse.Namespace, name: str, choice: str, limit_s: float) -> Step:
    """The feature tests; their report becomes NAME.json."""
    report = arguments.out / f"{name}.xml"
    command = [
        PYTHON, "-m", "pytest", str(ROOT / "tests" / "test_gpu_features.py"), "-k", choice,
        "-p", "no:cacheprovider", "-rA", "-q", f"--junitxml={report}",
    ]  # fmt: skip

    def finish() -> None:
        found = {**record(arguments), **junit(report)}
        (arguments.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")

    return Step(name, command, limit_s, finish=finish)


def junit(path: Path) -> dict:
    """Counts and cases of a pytest report."""
    suite = ElementTree.parse(path).getroot().find("testsuite")
    cases = []
    for case in suite.iter("testcase"):
        bad = [child for child in case if child.tag in ("failure", "error", "skipped")]
        row = {"name": case.get("name"), "outcome": bad[0].tag if bad else "passed"}
        if bad:
            row["why"] = bad[0].get("message", "")[:300]
        for found in case.iter("property"):
            value = found.get("value")
            row[found.get("name")] = json.loads(value) if is_number(value) else value
        cases.append(row)
    counts = {kind: sum(row["outcome"] == kind for row in cases)
              for kind in ("passed", "failure", "error", "skipped")}  # fmt: skip
    return {"tests": len(cases), **counts, "seconds": float(suite.get("time")), "cases": cases}


def is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def soak(arguments: argparse.Namespace, name: str, model: str, own: list, serve: list) -> Step:
    """One server under load; both runs end up in soak.json."""
    command = script(
        "soak.py", model, "--duration-s", arguments.soak_s, "--shared-gpu", "--commit",
        arguments.commit, "--log", arguments.out / f"{name}_server.log",
        "--out", arguments.out / f"{name}.json", *own, "--", *serve,
    )  # fmt: skip

    def finish() -> None:
        runs = {path.stem: json.loads(path.read_text())
                for path in sorted(arguments.out.glob("soak_*.json"))}  # fmt: skip
        together = {**record(arguments), "runs": runs}
        (arguments.out / "soak.json").write_text(json.dumps(together, indent=1) + "\n")

    return Step(name, command, arguments.soak_s + 220, after=("quantize",), finish=finish)


def one_gpu(arguments: argparse.Namespace) -> list[Step]:
    model = arguments.out / "w4"
    quantize = [
        PYTHON, "-m", "flute_vllm.cli", "quantize", str(MODEL), str(model), "--bits", "4",
        "--group-size", "64", "--recipe", "nf",
    ]  # fmt: skip
    small = ["--gpu-memory-utilization", 0.05, "--kv-cache-memory-bytes", 2 << 30,
             "--max-model-len", 1024, "--max-num-seqs", 72]  # fmt: skip
    large = ["--gpu-memory-utilization", 0.2, "--kv-cache-memory-bytes", 16 << 30,
             "--max-model-len", 2048, "--max-num-seqs", 72]  # fmt: skip
    lengths = ["--prompt-tokens", 8, 700, "--new-tokens", 8, 256]
    load = script(
        "bench_load.py", "--model", "70b", "--layers", arguments.layers, "--scratch",
        arguments.scratch, "--wait-for", arguments.out / "features.done",
        "--commit", arguments.commit, "--out", arguments.out / "load.json",
    )  # fmt: skip
    return [
        Step("quantize", quantize, 120),
        features(arguments, "features", "not two_gpus and not four_gpus", 300),
        soak(arguments, "soak_bundled", str(model), lengths, small),
        soak(arguments, "soak_8b", "8b", ["--no-probes"], large),
        Step("load", load, 440),
    ]


def two_gpus(arguments: argparse.Namespace) -> list[Step]:
    speed = script(
        "bench_serve.py", "--models", "70b", "--tp", "2,1", "--methods", "flute4,marlin,bf16",
        "--together", 3, "--limit-s", 300, "--budget-s", 320, "--steps", 48, "--repeats", 2,
        "--wait-for", arguments.out / "features_two.done", "--keep-logs", arguments.out / "engines",
        "--commit", arguments.commit, "--out", arguments.out / "serve.json",
    )  # fmt: skip
    return [
        features(arguments, "features_two", "two_gpus", 270),
        Step("serve", speed, 520),
    ]


def four_gpus(arguments: argparse.Namespace) -> list[Step]:
    """One group of engines on GPUs of their own; a hanging one costs its minute, not the others."""
    speed = script(
        "bench_serve.py", "--models", "70b", "--engines", arguments.engines, "--gpus", 4,
        "--together", 9, "--limit-s", 260, "--measure-s", 60, "--budget-s", 260, "--steps", 48,
        "--repeats", 2, "--wait-for", arguments.out / "features_four.done",
        "--keep-logs", arguments.out / "engines", "--commit", arguments.commit,
        "--out", arguments.out / "serve.json",
    )  # fmt: skip
    return [
        features(arguments, "features_four", "four_gpus", 250),
        Step("serve", speed, 420),
    ]


def speed(arguments: argparse.Namespace) -> list[Step]:
    """Both steps write one file, so the second waits for the first."""

    def step(name: str, models: str, methods: str, after: tuple[str, ...] = ()) -> Step:
        command = script(
            "bench_serve.py", "--models", models, "--methods", methods, "--together", 9, "--append",
            "--limit-s", 240, "--keep-logs", arguments.out / "engines", "--commit",
            arguments.commit, "--out", arguments.out / "serve.json",
        )  # fmt: skip
        return Step(name, command, 300, after)

    every = "flute4,bf16,humming,marlin,machete,flute3,flute2"
    others = step("serve_others", "gemma2-9b,qwen2.5-7b", "flute4,bf16,marlin", ("serve_8b",))
    return [step("serve_8b", "8b", every), others]


SETS = {"one": one_gpu, "two": two_gpus, "four": four_gpus, "speed": speed}


def collect(folders: list[Path]) -> list[Path]:
    """Copies results to their place in the repository, rows of serve.json beside those there."""
    written = []
    for folder in folders:
        for name in COPIED:
            if (folder / name).exists():
                written.append(RESULTS / name)
                written[-1].write_text((folder / name).read_text())
        if (folder / "serve.json").exists():
            new = json.loads((folder / "serve.json").read_text())
            written.append(RESULTS / "serve.json")
            old = json.loads(written[-1].read_text())
            good = [row for row in new["rows"] if "error" not in row]
            for row in good:  # what differs from the head of the file stands in the row
                row |= {"commit": new["commit"]}
            old["rows"] = serve_record.merge(old["rows"], good)
            old["command"] += " ; " + new["command"]
            written[-1].write_text(json.dumps(old, indent=1) + "\n")
            subprocess.run(script("plot_serve.py"), check=True)
    return written


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("set", choices=[*SETS, "collect"])
    parser.add_argument("folders", type=Path, nargs="*", help="of collect")
    parser.add_argument("--out", type=Path, help="folder for results and logs")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/flute_load"), help="40 GB")
    parser.add_argument("--layers", default="auto", help="of the 70B checkpoint that is loaded")
    parser.add_argument("--engines", default=ENGINES, help="METHOD:TP,... of the set four")
    parser.add_argument("--soak-s", type=float, default=300)
    parser.add_argument("--limit-s", type=float, default=560, help="of the whole")
    parser.add_argument("--only", default="", help="names of steps, such as features,load")
    parser.add_argument("--commit", default=serve_record.head_commit())
    arguments = parser.parse_args(argv)
    if arguments.set == "collect":
        if not arguments.folders:
            parser.error("collect needs the folders with the results")
        return arguments
    if arguments.out is None:
        parser.error("--out is missing: the folder for results and logs")
    arguments.out = arguments.out.resolve()
    return arguments


def chosen(steps: list[Step], only: str) -> list[Step]:
    """The named steps and those they come after; all without names."""
    if not only:
        return steps
    names = set(only.split(","))
    unknown = names - {step.name for step in steps}
    if unknown:
        known = ", ".join(step.name for step in steps)
        raise SystemExit(f"unknown steps {', '.join(sorted(unknown))}; known are {known}")
    for step in steps:
        names |= set(step.after) if step.name in names else set()
    return [step for step in steps if step.name in names]


def main() -> int:
    arguments = parse()
    if arguments.set == "collect":
        print("\n".join(map(str, collect(arguments.folders))))
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    steps = chosen(SETS[arguments.set](arguments), arguments.only)
    for waited in FEATURES:  # nothing to wait for
        if waited not in {step.name for step in steps}:
            (arguments.out / f"{waited}.done").touch()
    ended = run(steps, arguments.out, environment(), ROOT, arguments.limit_s, flushed)
    return 0 if all(end["outcome"] == "passed" for end in ended.values()) else 1


def flushed(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
