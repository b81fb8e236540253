"""compute-sanitizer over our CUDA kernels, one launch configuration in each process.

    python benchmarks/sanitize.py LIBRARY [--tools memcheck,racecheck,synccheck,initcheck]
        [--jobs 12] [--budget-s 480] [--out benchmarks/results/h200/sanitizer.json]

On long runs racecheck and synccheck overflow their table of barriers and then report hazards that
are not there, so every case starts afresh (``sanitize_case.py``) and says how many barriers a block
has. LIBRARY is ``nvcc -shared`` of kernels/cuda/*.cu, without torch. Cases that the budget leaves
out are counted as not run. Exit code 1 unless every case ran and no tool found an error.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from queue import SimpleQueue

from sanitize_case import NAN_LEFT, Case

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from flute_vllm import tuning  # noqa: E402
from flute_vllm.errors import FluteError  # noqa: E402

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FOUND = 86  # exit code that the tool gives when it has found something
BARRIERS = tuning.WARPS * (tuning.MAX_SLOTS + 1)
FIRST_PORT, PORTS = 41000, 8  # runs side by side must not share the ports of the tool
DOUBTS = ("might be incorrect", "Internal Sanitizer Error", "Target application terminated")
SUMMARY = re.compile(r"SUMMARY: (\d+) (?:errors?|hazards?)")
GROUPS = ((32, 1056), (64, 1088), (128, 1152), (256, 2304), (-1, 416))


@dataclass(frozen=True)
class Outcome:
    """What one tool says of one case: None errors when it reached no summary."""

    case: Case
    errors: int | None
    text: str  # empty when the run was clean


def cases() -> Iterator[Case]:
    """All widths, groups, dtypes and kinds of table once, and every way to cut a launch."""
    dtypes = itertools.cycle(("bfloat16", "float16"))
    parts = itertools.cycle(((), (37, 63), (24,), (40, 16, 44)))
    rows = itertools.cycle((1, 16, 32, 8, 13, 31))
    for bits, (group, k), pair in itertools.product((4, 3, 2), GROUPS, (False, True)):
        sizes = next(parts)
        n = sum(sizes) or 333
        case = Case("decode", n, k, bits, group, next(dtypes), pair, sizes, next(rows))
        yield replace(case, config=astuple(select(case)))
        if not pair:
            yield replace(case, kind="dequantize", config=())
    for splits, m, overlap in itertools.product((1, 2, 4, 8), (1, 8, 16, 32), (0, 1)):
        case = Case("decode", 256, 4096, 4, 128, m=m, launches=3 if overlap else 1)
        for row_tiles, row_warps in ((2, 1), (4, 4)):
            wish = tuning.Config(row_tiles, row_warps, splits, 0)
            full = tuning.complete(problem(case), wish, tuning.H200)
            if full is not None:
                yield replace(case, config=astuple(replace(full, overlap=overlap)))


def problem(case: Case) -> tuning.Problem:
    return tuning.Problem(case.n, case.k, case.m, case.bits, case.group_size, case.parts)


def select(case: Case) -> tuning.Config:
    return tuning.select(problem(case), tuning.H200, environment={})


def find_sanitizer() -> str:
    places = (shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer")
    for place in places:
        if place and Path(place).is_file():
            return place
    raise FluteError(
        "cannot check the kernels", where="compute-sanitizer",
        why=f"it is neither on PATH nor at {places[1]}",
        fix="install the CUDA toolkit's compute-sanitizer",
    )  # fmt: skip


def read_summary(output: str) -> int | None:
    """Errors of a run: the last summary line's number, None where the tool gave none."""
    found = SUMMARY.findall(output)
    return int(found[-1]) if found else None


def judge(case: Case, code: int, output: str) -> Outcome:
    errors = read_summary(output)
    doubt = next((line.strip() for line in output.splitlines() if _is_doubt(line)), "")
    if code == NAN_LEFT:
        return Outcome(case, errors, "an output was not written")
    if errors == 0 and code == 0 and not doubt:
        return Outcome(case, 0, "")
    shown = doubt or next(
        (line.strip("= ") for line in output.splitlines() if line.startswith("========= ") and
         any(word in line for word in ("Error", "Invalid", "hazard", "Barrier", "Uninit"))), "",
    )  # fmt: skip
    return Outcome(case, errors, f"exit code {code}: {shown or output.strip()[-300:]}"[:400])


def _is_doubt(line: str) -> bool:
    return any(text in line for text in DOUBTS)


class Runner:
    """Runs cases under one tool after another, a free range of ports for each process."""

    def __init__(self, library: str, sanitizer: str, jobs: int, deadline: float) -> None:
        self.library, self.sanitizer, self.jobs = library, sanitizer, jobs
        self.deadline = deadline
        help_text = subprocess.run(
            [sanitizer, "--help"], capture_output=True, text=True, check=False
        ).stdout
        self.takes_barriers = "--num-cuda-barriers" in help_text
        self.ports: SimpleQueue[int] = SimpleQueue()
        for i in range(jobs):
            self.ports.put(FIRST_PORT + PORTS * i)

    def command(self, tool: str, case: Case, port: int) -> list[str]:
        options = ["--port", str(port), "--max-connections", str(PORTS)]
        if self.takes_barriers and tool in ("racecheck", "synccheck"):
            options += ["--num-cuda-barriers", str(BARRIERS)]
        script = str(Path(__file__).with_name("sanitize_case.py"))
        return [
            self.sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), *options,
            sys.executable, script, self.library, case.text(),
        ]  # fmt: skip

    def run(self, tool: str, case: Case) -> Outcome | None:
        """None when the time is over."""
        left = self.deadline - time.monotonic()
        if left < 5:
            return None
        port = self.ports.get()
        try:
            done = subprocess.run(
                self.command(tool, case, port), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, timeout=left, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.ports.put(port)
        return judge(case, done.returncode, done.stdout)

    def run_tool(self, tool: str, wanted: list[Case]) -> dict:
        start = time.monotonic()
        with ThreadPoolExecutor(self.jobs) as pool:
            outcomes = list(pool.map(lambda case: self.run(tool, case), wanted))
        ran = [outcome for outcome in outcomes if outcome is not None]
        bad = [outcome for outcome in ran if outcome.text]
        return {
            "cases": len(ran), "not_run": len(wanted) - len(ran),
            "errors": sum(outcome.errors or 0 for outcome in ran), "failed_cases": len(bad),
            "seconds": round(time.monotonic() - start, 1),
            "command": " ".join(self.command(tool, wanted[0], FIRST_PORT)[:-1]) + " CASE",
            "failures": [
                {"case": json.loads(o.case.text()), "errors": o.errors, "text": o.text}
                for o in bad[:20]
            ],
        }  # fmt: skip


def spread(items: list[Case], count: int) -> list[Case]:
    """``count`` of the items, evenly from all of the list."""
    if count <= 0 or count >= len(items):
        return items
    return [items[i * len(items) // count] for i in range(count)]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("library")
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 4))
    parser.add_argument("--budget-s", type=float, default=480)
    parser.add_argument("--cases", type=int, default=0, help="only so many, spread; 0: all")
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/h200/sanitizer.json")
    return parser.parse_args()


def gpu_name() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"


def main() -> int:
    arguments = parse()
    sanitizer = find_sanitizer()
    start = time.monotonic()
    library = str(Path(arguments.library).resolve())
    runner = Runner(library, sanitizer, arguments.jobs, start + arguments.budget_s)
    version = subprocess.run([sanitizer, "--version"], capture_output=True, text=True, check=False)
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    result = {
        "device": gpu_name(), "version": version.stdout.strip().splitlines()[-1],
        "commit": arguments.commit or head.stdout.strip(),
        "command": "python " + " ".join(sys.argv), "tools": {},
    }  # fmt: skip
    wanted = spread(list(cases()), arguments.cases)
    for tool in arguments.tools.split(","):
        result["tools"][tool] = summary = runner.run_tool(tool, wanted)
        print(tool, json.dumps({k: v for k, v in summary.items() if k != "command"}), flush=True)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    clean = all(
        s["cases"] and not (s["not_run"] or s["errors"] or s["failed_cases"])
        for s in result["tools"].values()
    )
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
