"""The driver of compute-sanitizer, with a stand-in for the tool; and the case script's packing."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import sanitize  # noqa: E402
import sanitize_case  # noqa: E402

# Reports one hazard for 3 bits, leaves its output unwritten for pairs, is clean otherwise.
STAND_IN = """#!/usr/bin/env bash
case "$*" in
  *--help*) echo "  --num-cuda-barriers arg (=0)"; exit 0;;
  *--version*) echo "Stand-in"; echo "Version 1.2"; exit 0;;
esac
echo "$@" >> "{log}"
case "$*" in
  *'"bits": 3'*) echo "========= Error: Race reported between Write access at flute"
      echo "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"; exit 86;;
  *'"pair": true'*) echo "========= ERROR SUMMARY: 0 errors"; exit 3;;
esac
echo "========= ERROR SUMMARY: 0 errors"
"""


@pytest.fixture
def runner(tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(STAND_IN.format(log=tmp_path / "log"))
    tool.chmod(0o755)
    return sanitize.Runner("libflute.so", str(tool), 3, time.monotonic() + 60)


def case(**fields) -> sanitize.Case:
    base = {"kind": "decode", "n": 333, "k": 1056, "bits": 4, "group_size": 32}
    return sanitize.Case(**(base | {"config": (1, 4, 4, 2, 0)} | fields))


def test_cases_cover_formats_and_launches():
    found = list(sanitize.cases())
    assert len(set(found)) == len(found)
    assert {(c.bits, c.group_size, c.pair) for c in found} >= {
        (bits, group, pair)
        for bits in (2, 3, 4)
        for group in (32, 64, 128, 256, -1)
        for pair in (False, True)
    }
    assert {c.config[2] for c in found if c.config} == {1, 2, 4, 8}
    assert {c.dtype for c in found} == {"float16", "bfloat16"}
    assert any(c.config and c.config[4] for c in found)
    assert all(sanitize_case.Case.parse(c.text()) == c for c in found)
    assert len(sanitize.spread(found, 10)) == 10


def test_outcomes_are_counted(runner, tmp_path):
    wanted = [case(), case(bits=3), case(pair=True), case(bits=2)]
    summary = runner.run_tool("racecheck", wanted)
    assert (summary["cases"], summary["not_run"]) == (4, 0)
    assert (summary["errors"], summary["failed_cases"]) == (1, 2)
    texts = [failure["text"] for failure in summary["failures"]]
    assert "Race reported" in texts[0]
    assert "not written" in texts[1]
    log = (tmp_path / "log").read_text()
    assert f"--num-cuda-barriers {sanitize.BARRIERS}" in log
    assert "--tool racecheck" in log


def test_time_over_means_not_run(runner):
    runner.deadline = time.monotonic()
    assert runner.run_tool("memcheck", [case()])["not_run"] == 1


@pytest.mark.parametrize(
    ("code", "output"),
    [
        (0, "no summary at all"),
        (0, "========= Results might be incorrect\n========= ERROR SUMMARY: 0 errors"),
        (255, "========= ERROR SUMMARY: 0 errors"),
        (86, "========= Invalid __global__ read\n========= ERROR SUMMARY: 7 errors"),
    ],
)
def test_nothing_doubtful_is_called_clean(code, output):
    assert sanitize.judge(case(), code, output).text


def test_clean_run():
    output = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
    assert sanitize.judge(case(), 0, output) == sanitize.Outcome(case(), 0, "")


def test_main_writes_the_summary(tmp_path, monkeypatch, runner, capsys):
    out = tmp_path / "out.json"
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: runner.sanitizer)
    monkeypatch.setattr(
        sys, "argv",
        ["sanitize.py", "lib.so", "--cases", "5", "--out", str(out), "--tools", "memcheck"],
    )  # fmt: skip
    assert sanitize.main() == 1  # the stand-in fails some
    result = json.loads(out.read_text())
    assert result["version"] == "Version 1.2"
    assert result["tools"]["memcheck"]["cases"] == 5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_have_the_bytes_of_torch(dtype):
    raw = sanitize_case.half_bits(-0.3125, dtype)
    value = torch.tensor(-0.3125, dtype=getattr(torch, dtype)).view(torch.int16).item()
    assert struct.unpack("<h", raw)[0] == value


def test_matrix_of_a_case():
    matrix = case(n=100, parts=(37, 63), pair=True).matrix()
    assert list(matrix.part_rows[:3]) == [37, 63, 0]
    assert (matrix.parts, matrix.pair_table, matrix.dtype) == (2, 1, 1)


# Stands in for the CUDA driver and for our kernels, in host memory. A decode of 8 rows leaves the
# last output alone; a config of 9 row tiles is refused.
STUB = """
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
int cuInit(unsigned f) { return 0; }
int cuDevicePrimaryCtxRetain(void** c, int d) { *c = (void*)1; return 0; }
int cuCtxSetCurrent(void* c) { return 0; }
int cuMemAlloc_v2(void** p, size_t n) { *p = malloc(n); return *p == 0; }
int cuMemcpyHtoD_v2(void* d, const void* s, size_t n) { memcpy(d, s, n); return 0; }
int cuMemcpyDtoH_v2(void* d, const void* s, size_t n) { memcpy(d, s, n); return 0; }
int cuCtxSynchronize(void) { return 0; }
int64_t flute_record_words(const int32_t* m) { return (int64_t)m[0] * m[1]; }
int flute_repack(const int32_t* m, const void* q, const void* s, int32_t* r, void* stream) {
  memcpy(r, q, (size_t)m[0] * m[1] / 8 * m[2]);
  return 0;
}
int flute_dequantize(const int32_t* m, const void* r, const void* t, void* w, void* stream) {
  memset(w, 0, 2 * (size_t)m[0] * m[1]);
  return 0;
}
int flute_decode(const int32_t* m, const int32_t* c, int32_t rows, const void* x, const void* r,
                 const void* t, void* y, void* stream) {
  if (c[0] == 9) return 7;
  memset(y, 0, 2 * ((size_t)rows * m[0] - (rows == 8)));
  return 0;
}
const char* flute_error_text(int e) { return "no such configuration"; }
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_case_script_fills_memory_and_judges_the_output(tmp_path):
    (tmp_path / "stub.c").write_text(STUB)
    library = tmp_path / "libcuda.so.1"
    command = ["cc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "stub.c")]
    subprocess.run(command, check=True)
    script = str(ROOT / "benchmarks" / "sanitize_case.py")
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}

    def run(wanted: sanitize.Case) -> subprocess.CompletedProcess:
        command = [sys.executable, script, str(library), wanted.text()]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    assert run(case(m=1, launches=3)).returncode == 0
    assert run(case(kind="dequantize", pair=True, parts=(37, 63), n=100)).returncode == 0
    assert run(case(m=8)).returncode == sanitize_case.NAN_LEFT
    refused = run(case(config=(9, 4, 4, 2, 0)))
    assert refused.returncode == 1
    assert "no such configuration" in refused.stderr
