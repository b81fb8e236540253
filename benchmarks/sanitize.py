"""compute-sanitizer over our CUDA kernels, one launch configuration in each process.

    python benchmarks/sanitize.py LIBRARY [--tools memcheck,racecheck,synccheck,initcheck]
        [--kernels sm90,prefill] [--jobs 12] [--budget-s 420]
        [--out benchmarks/results/h200/sanitizer.json]

On long runs racecheck and synccheck overflow their table of barriers and then report hazards that
are not there, so every case starts afresh (``sanitize_case.py``) and says how many barriers its
launches have in a cluster. LIBRARY is ``nvcc -shared`` of kernels/cuda/*.cu, without torch. The
cases come in order of importance, each under all tools before the next: the first ones reach every
kernel, and what the budget leaves out is counted as not run. Exit code 1 unless every case ran and
no tool found an error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue

from sanitize_case import NAN_LEFT, Case

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from sanitize_cases import KERNELS, barriers, cases  # noqa: E402

from flute_vllm.errors import FluteError  # noqa: E402

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FINDING_LINES, MOST_FAILURES = 5, 100  # kept of a report, and in the file
FOUND = 86  # exit code that the tool gives when it has found something
FIRST_PORT, PORTS = 41000, 8  # runs side by side must not share the ports of the tool
DOUBTS = ("might be incorrect", "Internal Sanitizer Error", "Target application terminated")
SUMMARY = re.compile(r"SUMMARY: (\d+) (?:errors?|hazards?)")
REFUSED = "Device not supported"  # by the tool, on some virtual machines
CASE_SECONDS = 120  # a launch that takes longer hangs


@dataclass(frozen=True)
class Outcome:
    """What one tool says of one case: None errors when it reached no summary."""

    case: Case
    errors: int | None
    text: str  # empty when the run was clean
    seconds: float = field(default=0, compare=False)


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
        return Outcome(case, errors, "an output is NaN: not written, or computed so")
    if errors == 0 and code == 0 and not doubt:
        return Outcome(case, 0, "")
    shown = doubt or _first_finding(output) or output.strip()[-300:]
    return Outcome(case, errors, f"exit code {code}: {shown}"[:1200])


def _first_finding(output: str) -> str:
    """The first report of the tool with the lines that say where: a hazard has two places."""
    lines = [line.strip("= ") for line in output.splitlines() if line.startswith("========= ")]
    words = ("Error", "Invalid", "hazard", "Barrier", "Uninit")
    first = next((i for i, line in enumerate(lines) if any(word in line for word in words)), None)
    return "" if first is None else " | ".join(lines[first : first + FINDING_LINES])


def _is_doubt(line: str) -> bool:
    return any(text in line for text in DOUBTS)


class Runner:
    """Runs cases under one tool after another, a free range of ports for each process."""

    def __init__(self, library: str, sanitizer: str, jobs: int, deadline: float) -> None:
        self.library, self.sanitizer, self.jobs = library, sanitizer, jobs
        self.deadline, self.case_seconds = deadline, CASE_SECONDS
        self.refusal = ""  # what the tool said if it cannot reach the GPU
        help_text = subprocess.run(
            [sanitizer, "--help"], capture_output=True, text=True, check=False
        ).stdout
        self.takes_barriers = "--num-cuda-barriers" in help_text
        self.ports: SimpleQueue[int] = SimpleQueue()
        for i in range(jobs):
            self.ports.put(FIRST_PORT + PORTS * i)

    def command(self, tool: str, case: Case, port: int) -> list[str]:
        options = ["--port", str(port), "--max-connections", str(PORTS)]
        if self.takes_barriers and tool in ("racecheck", "synccheck") and barriers(case):
            options += ["--num-cuda-barriers", str(barriers(case))]
        script = str(Path(__file__).with_name("sanitize_case.py"))
        return [
            self.sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), *options,
            sys.executable, script, self.library, case.text(),
        ]  # fmt: skip

    def run(self, tool: str, case: Case) -> Outcome | None:
        """None when the time is over."""
        start = time.monotonic()
        limit = min(self.deadline - start, self.case_seconds)
        if self.deadline - start < 5:
            return None
        port = self.ports.get()
        try:
            code, output = run_group(self.command(tool, case, port), limit)
        finally:
            self.ports.put(port)
        if code is None:
            late = time.monotonic() >= self.deadline
            return None if late else Outcome(case, None, f"no end after {limit:.0f} s", limit)
        if REFUSED in output:
            self.deadline, self.refusal = 0, output
        return replace(judge(case, code, output), seconds=time.monotonic() - start)

    def run_all(self, tools: list[str], wanted: list[Case]) -> Iterator[dict[str, dict]]:
        """What is known after each case, by tool; a case runs under all tools before the next."""
        records = {tool: Record(" ".join(self.command(tool, wanted[0], FIRST_PORT)[:-1]))
                   for tool in tools}  # fmt: skip
        pairs = [(tool, case) for case in wanted for tool in tools]
        with ThreadPoolExecutor(self.jobs) as pool:
            outcomes = pool.map(lambda pair: self.run(*pair), pairs)
            for (tool, case), outcome in zip(pairs, outcomes, strict=True):
                records[tool].add(case, outcome)
                if tool == tools[-1]:
                    yield {tool: record.summary() for tool, record in records.items()}
        if self.refusal:
            raise FluteError(
                "cannot check the kernels", where=self.sanitizer, why=self.refusal.strip()[-300:],
                fix="use a machine whose GPU the tool reaches; some virtual machines hide it",
            )  # fmt: skip


def run_group(command: list[str], limit: float) -> tuple[int | None, str]:
    """Exit code, None past the limit, and output; ends the tool's child with the tool."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None, ""
    return process.returncode, output


@dataclass
class Record:
    """One tool's outcomes."""

    command: str
    ran: list[Outcome] = field(default_factory=list)
    left_out: list[Case] = field(default_factory=list)

    def add(self, case: Case, outcome: Outcome | None) -> None:
        if outcome is None:
            self.left_out.append(case)
        else:
            self.ran.append(outcome)

    def summary(self) -> dict:
        bad = [outcome for outcome in self.ran if outcome.text]
        return {
            "cases": len(self.ran), "not_run": len(self.left_out),
            "errors": sum(outcome.errors or 0 for outcome in self.ran), "failed_cases": len(bad),
            "cases_of_kernel": Counter(outcome.case.kind for outcome in self.ran),
            "not_run_of_kernel": Counter(case.kind for case in self.left_out),
            "slowest_s": round(max((outcome.seconds for outcome in self.ran), default=0), 1),
            "command": f"{self.command} CASE",
            "failures": [
                {"case": json.loads(o.case.text()), "errors": o.errors, "text": o.text}
                for o in bad[:MOST_FAILURES]
            ],
        }  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("library")
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 4))
    parser.add_argument("--budget-s", type=float, default=420)
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--cases", type=int, default=0, help="only the first so many; 0: all")
    parser.add_argument("--skip", type=int, default=0, help="so many cases, which ran before")
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
        "command": "python " + " ".join(sys.argv), "skipped": arguments.skip, "tools": {},
    }  # fmt: skip
    tools = arguments.tools.split(",")
    kernels = arguments.kernels.split(",")
    wanted = [c for c in cases() if c.kind in kernels][arguments.skip :][: arguments.cases or None]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for done, summaries in enumerate(runner.run_all(tools, wanted), start=1):
        result["tools"] = summaries
        result["seconds"] = round(time.monotonic() - start, 1)
        if done % 10 == 0 or done == len(wanted):  # whoever ends this early keeps what there is
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    for tool, summary in result["tools"].items():
        told = {k: v for k, v in summary.items() if k not in ("command", "failures")}
        print(tool, json.dumps(told))
        for failure in summary["failures"][:5]:
            print(" ", json.dumps(failure), flush=True)
    clean = all(
        s["cases"] and not (s["not_run"] or s["errors"] or s["failed_cases"])
        for s in result["tools"].values()
    )
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
