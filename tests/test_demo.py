"""The demo from end to end: quantize, a real server, an answer over HTTP, figures, no leftovers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


def test_demo_quantizes_serves_and_measures(tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py"), "--bits", "4", "--out", str(out)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "server stopped" in done.stdout
    dense, quantized = json.loads((out / "results.json").read_text())["rows"]
    assert quantized["bytes"] < dense["bytes"] / 2
    assert dense["perplexity"] < quantized["perplexity"] < 1.05 * dense["perplexity"]
    served = subprocess.run(["pgrep", "-f", str(out)], capture_output=True, text=True, check=False)
    assert served.stdout == ""
