"""The soak script: its judgements, and a short real run against vLLM on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flute_vllm.quantize.model import QuantizeSettings, quantize_checkpoint

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import soak  # noqa: E402
import soak_server  # noqa: E402

MIB = soak.MIB
GOOD = {
    "requests": 9, "failed": 0, "errors": [],
    "probes_alone": {"equal": 8, "near tie": 0, "different": 0},
    "probes_under_load": {"equal": 3, "near tie": 1, "different": 0},
    "memory_mib": {"host": {"growth": 3.0}, "gpu": None},
}  # fmt: skip


def test_an_answer_may_leave_the_quiet_one_at_a_near_tie_only():
    quiet = soak.Answer((5, 6, 7), (1.0, 0.05, 2.0))
    assert soak.compare(quiet, quiet) == "equal"
    assert soak.compare(quiet, soak.Answer((5, 9, 1), (1.0, 0.02, 0.1))) == "near tie"
    assert soak.compare(quiet, soak.Answer((4, 6, 7), (0.0, 0.0, 0.0))) == "different"
    assert soak.compare(quiet, soak.Answer((5, 6), (1.0, 0.05))) == "different"


def test_growth_compares_the_last_third_with_the_one_before():
    assert soak.growth([0] * 10 + [100] * 10 + [100] * 10) == 0  # warming up is no leak
    assert soak.growth(list(range(0, 300, 10))) == 100
    assert soak.growth([1, 2, 3]) is None


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, None),
        ({"failed": 2, "errors": ["Timeout"]}, "2 requests failed"),
        ({"requests": 0}, "no request was finished"),
        ({"probes_alone": {"equal": 7, "near tie": 0, "different": 1}}, "probes_alone"),
        ({"probes_under_load": dict.fromkeys(soak.WORDS, 0)}, "no probe"),
        ({"probes_alone": None, "probes_under_load": None}, None),
        ({"memory_mib": {"host": {"growth": 129}, "gpu": None}}, "host memory grew"),
        ({"memory_mib": {"host": {"growth": None}, "gpu": {"growth": 65}}}, "gpu memory grew"),
    ],
)
def test_problems(change, text):
    found = soak.problems(GOOD | change, server_ended=False)
    assert (text is None) == (not found)
    assert text is None or text in found[0]


def test_a_server_that_ended_is_a_problem():
    assert soak.problems(GOOD, server_ended=True) == ["the server ended by itself"]


def test_arguments_after_the_dashes_go_to_the_server():
    arguments = soak.parse(["tiny", "--streams", "3", "--", "--max-model-len", "512"])
    assert arguments.streams == 3
    assert arguments.serve == ["--max-model-len", "512"]


def test_memory_of_the_servers_own_processes(monkeypatch):
    answers = {"compute-apps=pid,used_memory": ["7, 300", "8, 40", "9, [N/A]"],
               "gpu=memory.used": ["1000", "20"]}  # fmt: skip
    monkeypatch.setattr(soak_server, "ask_gpus", answers.get)
    assert soak_server.gpu_bytes() == 1020 * MIB
    assert soak_server.gpu_bytes({8, 7, 5}) == 340 * MIB
    assert soak_server.gpu_bytes({9}) is None  # listed without its memory
    assert soak_server.gpu_bytes({1}) is None


def test_unknown_model_is_refused(capsys):
    with pytest.raises(SystemExit):
        soak.parse(["/nowhere"])
    assert "neither a folder" in capsys.readouterr().err


def test_a_server_that_does_not_start_tells_why(tmp_path):
    with pytest.raises(RuntimeError, match="ended with"):
        soak_server.Server(str(tmp_path), ["--no-such-flag"], tmp_path / "log", 120)


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_short_run(tmp_path):
    pytest.importorskip("vllm")
    model = ROOT / "examples" / "stdlib_model" / "model"
    quantize_checkpoint(model, tmp_path / "w4", QuantizeSettings(4, 64))
    out = tmp_path / "soak.json"
    command = [
        sys.executable, str(ROOT / "benchmarks" / "soak.py"), str(tmp_path / "w4"),
        "--duration-s", "12", "--streams", "2", "--prompt-tokens", "8", "60",
        "--new-tokens", "4", "16", "--out", str(out), "--", "--max-model-len", "256",
        "--max-num-seqs", "4", "--enforce-eager", "--kv-cache-memory-bytes", str(32 << 20),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if not torch.cuda.is_available():
        environment |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(out.read_text())
    assert record["passed"]
    assert record["requests"] > 0
    assert record["probes_alone"]["equal"] == soak.PROBES


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_shapes_without_weights(tmp_path):
    """The tiny shapes, load only: no tokenizer, dummy weights."""
    pytest.importorskip("vllm")
    out = tmp_path / "soak.json"
    command = [
        sys.executable, str(ROOT / "benchmarks" / "soak.py"), "tiny", "--no-probes",
        "--duration-s", "8", "--streams", "2", "--prompt-tokens", "8", "60", "--new-tokens",
        "4", "16", "--out", str(out), "--", "--max-model-len", "256", "--max-num-seqs", "4",
        "--enforce-eager", "--kv-cache-memory-bytes", str(32 << 20),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if not torch.cuda.is_available():
        environment |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(out.read_text())
    assert record["requests"] > 0
    assert record["probes_alone"] is None
