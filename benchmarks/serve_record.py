"""The result files of ``bench_serve.py``: rows of engines, and the kernels of their steps."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from placement import ask_gpu

ROOT = Path(__file__).resolve().parent.parent


def merge(rows: list[dict], new: list[dict]) -> list[dict]:
    """Old rows with the new ones in place of those of the same model, method and tp."""
    keys = {(row["model"], row["method"], row["tp"]) for row in new}
    return [r for r in rows if (r["model"], r["method"], r["tp"]) not in keys] + new


def save(arguments: argparse.Namespace, old: dict, new: list[dict]) -> None:
    versions = next((row["versions"] for row in reversed(new) if "versions" in row), {})
    versions = {name: old[name] for name in ("vllm", "torch") if name in old} | versions
    rows = [{k: v for k, v in row.items() if k != "versions"} for row in new]
    record = heading(arguments, versions, old.get("command")) | {
        "prefill": arguments.prefill, "group_size": arguments.group_size,
        "rows": merge(old.get("rows", []), rows),
    }  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


def save_profile(arguments: argparse.Namespace, row: dict, result: dict) -> None:
    """Adds one engine's kernels to ``*_profile.json`` beside the output."""
    path = arguments.out.with_name(f"{arguments.out.stem}_profile.json")
    record = json.loads(path.read_text()) if path.exists() else {"rows": []}
    rows = merge(record["rows"], [row | {"steps": result["profile"]}])
    record |= heading(arguments, result["versions"]) | {"rows": rows}
    path.write_text(json.dumps(record, indent=1) + "\n")


def heading(arguments: argparse.Namespace, versions: dict, earlier: str | None = None) -> dict:
    """What stands at the head of a result file; ``earlier``: commands of rows that it keeps."""
    commands = [*filter(None, [earlier]), "python " + " ".join(sys.argv)]
    return {
        "device": ask_gpu("name") or "CPU", "vllm": "unknown", "torch": "unknown", **versions,
        "commit": arguments.commit or head_commit(),
        "command": " ; ".join(dict.fromkeys(commands)), "prompt_tokens": arguments.prompt_tokens,
    }  # fmt: skip


def head_commit() -> str:
    command = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
