"""The script that runs one case under a sanitizer, on a stub of CUDA: packing, calls, judgement."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_sanitize import CASES, case

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import sanitize  # noqa: E402
import sanitize_case  # noqa: E402
import sanitize_cases  # noqa: E402


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_have_the_bytes_of_torch(dtype):
    raw = sanitize_case.half_bits(-0.3125, dtype)
    value = torch.tensor(-0.3125, dtype=getattr(torch, dtype)).view(torch.int16).item()
    assert struct.unpack("<h", raw)[0] == value


def test_matrix_of_a_case():
    matrix = case(n=100, parts=(37, 63), pair=True).matrix()
    assert list(matrix.part_rows[:3]) == [37, 63, 0]
    assert (matrix.parts, matrix.pair_table, matrix.dtype) == (2, 1, 1)


# Stands in for the CUDA driver and for our kernels, in host memory; writes down each launch. One of
# 8 rows leaves the last output alone, one of 7 computes a NaN; a config that begins with 9 is
# refused. What a launch may read is read, so that a wrong pointer is a crash.
STUB = """
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef struct { const void* records; int64_t total, bytes; } Ahead;
int cuInit(unsigned f) { return 0; }
int cuDevicePrimaryCtxRetain(void** c, int d) { *c = (void*)1; return 0; }
int cuCtxSetCurrent(void* c) { return 0; }
int cuMemAlloc_v2(void** p, size_t n) { *p = malloc(n); return *p == 0; }
int cuMemcpyHtoD_v2(void* d, const void* s, size_t n) { memcpy(d, s, n); return 0; }
int cuMemcpyDtoH_v2(void* d, const void* s, size_t n) { memcpy(d, s, n); return 0; }
int cuCtxSynchronize(void) { return 0; }
int64_t flute_record_words(const int32_t* m) { return (int64_t)m[0] * m[1]; }
static const void* records;
int flute_repack(const int32_t* m, const void* q, const void* s, int32_t* r, void* stream) {
  memcpy(r, q, (size_t)m[0] * m[1] / 8 * m[2]);
  records = r;
  return 0;
}
int flute_dequantize(const int32_t* m, const void* r, const void* t, void* w, void* stream) {
  memset(w, 0, 2 * (size_t)m[0] * m[1]);
  printf("dequantize %d\\n", r == records && t && !stream);
  return 0;
}
static int launch(const char* name, int fields, const int32_t* m, const int32_t* c, int32_t rows,
                  const char* x, const void* r, const void* t, char* y, void* stream) {
  const int activation = m[23];  // of the matrix, behind its parts: y is half as wide
  size_t values = (size_t)rows * m[0] / (activation ? 2 : 1);
  int sum = 0;
  if (c[0] == 9) return 7;
  for (size_t i = 0; i < 2 * (size_t)rows * m[1]; i++) sum += x[i];
  memset(y, 0, 2 * (values - (rows == 8)));
  if (rows == 7) memcpy(y, "\\xc0\\xff", 2);
  printf("%s %d, matrix", name, r == records && t && !stream && sum != 12345678);
  for (int i = 0; i < 7; i++) printf(" %d", m[i]);
  printf(", config");
  for (int i = 0; i < fields; i++) printf(" %d", c[i]);
  printf(", m %d", rows);
  if (activation) printf(", activation %d", activation);
  return 0;
}
int flute_activate(int32_t activation, int32_t dtype, int64_t m, int64_t n, const char* x, char* y,
                   void* stream) {
  memmove(y, x, 2 * m * n);  // and as much again is there to read
  memcpy(y, x + 2 * m * n, 2 * m * n);
  printf("activate %d, %d %ld %ld\\n", activation, dtype, (long)m, (long)n);
  return stream != 0;
}
int flute_rms_norm(int32_t dtype, int32_t m, int32_t n, float epsilon, float offset, const char* x,
                   const char* residual, const char* weight, char* y, char* sums, void* stream) {
  const size_t bytes = 2 * (size_t)m * n;
  memcpy(sums, x, bytes);
  memcpy(sums, residual, bytes);
  memcpy(y, weight, 2 * n);
  memset(y, 0, bytes);
  printf("norm %d %d %d, %g %g\\n", dtype, m, n, epsilon, offset);
  return stream != 0;
}
static int with_ahead(const Ahead* a, int error) {
  if (error) return error;
  if (!a) printf(", no ahead\\n");
  else printf(", ahead %d %ld %ld\\n", a->records == records, (long)a->total, (long)a->bytes);
  return 0;
}
int flute_decode(const int32_t* m, const int32_t* c, int32_t rows, const void* x, const void* r,
                 const void* t, void* y, const Ahead* a, void* stream) {
  return with_ahead(a, launch("decode", 6, m, c, rows, x, r, t, y, stream));
}
int flute_planes(const int32_t* m, const int32_t* c, int32_t rows, const void* x, const void* r,
                 const void* t, void* y, const Ahead* a, void* stream) {
  return with_ahead(a, launch("planes", 6, m, c, rows, x, r, t, y, stream));
}
int64_t flute_sm90_workspace(const int32_t* c) { return c[4] ? 0 : 4096; }
int flute_sm90_gemm(const int32_t* m, const int32_t* c, int32_t rows, const void* x, const void* r,
                    const void* t, void* y, void* workspace, const Ahead* a, void* stream) {
  const int error = launch("sm90_gemm", 8, m, c, rows, x, r, t, y, stream);
  if (workspace) memset(workspace, 0, flute_sm90_workspace(c));
  return with_ahead(a, error);
}
int64_t flute_tile_workspace(const int32_t* m, const int32_t* c, int32_t rows) {
  return c[1] > 1 ? (int64_t)c[1] * rows * m[0] * 4 : 0;
}
int flute_tile(const int32_t* m, const int32_t* c, int32_t rows, const void* x, const void* r,
               const void* t, void* y, void* workspace, void* stream) {
  const int error = launch("tile", 4, m, c, rows, x, r, t, y, stream);
  if (error) return error;
  if (workspace) memset(workspace, 0, flute_tile_workspace(m, c, rows));
  printf(", workspace %d\\n", workspace != 0);
  return 0;
}
const char* flute_error_text(int e) { return "no such configuration"; }
"""


@pytest.fixture(scope="module")
def run_case(tmp_path_factory):
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("stub")
    (folder / "stub.c").write_text(STUB)
    library = folder / "libcuda.so.1"
    command = ["cc", "-shared", "-fPIC", "-o", str(library), str(folder / "stub.c")]
    subprocess.run(command, check=True)
    script = str(ROOT / "benchmarks" / "sanitize_case.py")
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}

    def run(wanted: sanitize.Case) -> subprocess.CompletedProcess:
        command = [sys.executable, script, str(library), wanted.text()]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return run


WORDS = 333 * 1056
MATRIX = "matrix 333 1056 4 32 1 0 1"


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"kind": "decode", "m": 3}, f"decode 1, {MATRIX}, config 1 4 4 2 16 0, m 3, no ahead"),
        (
            {"kind": "decode", "m": 3, "launches": 3, "ahead": 4096},
            f"decode 1, {MATRIX}, config 1 4 4 2 16 0, m 3, ahead 1 {WORDS * 4} 4096",
        ),
        (
            {"kind": "sm90", "m": 33, "config": (64, 4, 4, 4, 2, 1, 8, 1), "launches": 2},
            f"sm90_gemm 1, {MATRIX}, config 64 4 4 4 2 1 8 1, m 33, no ahead",
        ),
        (
            {"kind": "sm90", "m": 13, "config": (16, 8, 4, 4, 2, 1, 8, 1), "ahead": 1 << 20},
            f"sm90_gemm 1, {MATRIX}, config 16 8 4 4 2 1 8 1, m 13, ahead 1 {WORDS * 4} 1048576",
        ),
        (
            {"kind": "prefill", "m": 300, "config": (192, 2, 8, 2, 2, 2, 7, 0)},
            f"sm90_gemm 1, {MATRIX}, config 192 2 8 2 2 2 7 0, m 300, no ahead",
        ),
        (
            {"kind": "tile", "m": 100, "config": (64, 1, 3, 4)},
            f"tile 1, {MATRIX}, config 64 1 3 4, m 100, workspace 0",
        ),
        (
            {"kind": "tile", "m": 129, "config": (128, 3, 5, 3), "launches": 2},
            f"tile 1, {MATRIX}, config 128 3 5 3, m 129, workspace 1",
        ),
        (
            {"kind": "tile", "m": 9, "config": (64, 2, 3, 4), "pair": True, "dtype": "float16",
             "parts": (37, 63), "n": 100, "bits": 3},
            "tile 1, matrix 100 1056 3 32 0 1 2, config 64 2 3 4, m 9, workspace 1",
        ),
        ({"kind": "dequantize", "config": ()}, "dequantize 1"),
        (
            {"kind": "decode", "m": 3, "n": 200, "parts": (100, 100), "activation": 2},
            "decode 1, matrix 200 1056 4 32 1 0 2, config 1 4 4 2 16 0, m 3, activation 2, "
            "no ahead",
        ),
        (
            {"kind": "activate", "m": 5, "n": 400, "config": (), "activation": 3, "launches": 2},
            "activate 3, 1 5 200",
        ),
        (
            {"kind": "norm", "m": 5, "k": 4096, "config": (), "dtype": "float16"},
            "norm 0 5 4096, 1e-05 1",
        ),
    ],
)  # fmt: skip
def test_each_kind_calls_its_function_with_its_arguments(run_case, fields, line):
    wanted = case(**fields)
    done = run_case(wanted)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [line] * wanted.launches


def test_case_script_judges_the_output(run_case):
    assert run_case(case(kind="dequantize", pair=True, parts=(37, 63), n=100)).returncode == 0
    for dtype in ("float16", "bfloat16"):
        for m in (7, 8):
            assert run_case(case(m=m, dtype=dtype)).returncode == sanitize_case.NAN_LEFT
    refused = run_case(case(config=(9, 4, 4, 2, 16, 0)))
    assert refused.returncode == 1
    assert "no such configuration" in refused.stderr


@pytest.mark.parametrize("kernel", sanitize_cases.KERNELS)
def test_the_first_case_of_each_kernel_runs(run_case, kernel):
    done = run_case(next(c for c in CASES if c.kind == kernel and c.m not in (7, 8)))
    assert done.returncode == 0, done.stderr


def test_a_launch_of_too_few_numbers_is_refused(run_case):
    """ctypes would fill up with zeros, a launch that no kernel takes."""
    done = run_case(case(config=(1, 4, 4, 2, 0)))
    assert done.returncode == 1
    assert "other numbers than (1, 4, 4, 2, 0)" in done.stderr
