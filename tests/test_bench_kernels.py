"""The parts of the GPU benchmarks that need no GPU: targets, peers' formats, rotation, budget."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from flute_vllm import format as fmt
from flute_vllm import ops

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import bench_kernels  # noqa: E402
import c_api  # noqa: E402
import model_shapes  # noqa: E402
import targets  # noqa: E402
import tune_block  # noqa: E402

from flute_vllm.tools import peers, timing  # noqa: E402


@pytest.mark.parametrize("script", sorted(p.stem for p in (ROOT / "benchmarks").glob("*.py")))
def test_every_script_finds_what_it_imports(script):
    """Most need a GPU to do more: a name that has moved would be found there only."""
    importlib.import_module(script)


def test_blocks_are_tuned_in_the_shapes_that_the_kernels_are_measured_in():
    shapes = bench_kernels.SHAPES
    assert model_shapes.linear_shapes("8b") == shapes["8b"]
    assert model_shapes.linear_shapes("70b", 4) == shapes["70b_tp4"]
    assert model_shapes.linear_shapes("gemma2-9b")["o"] == (3584, 16 * 256)  # head_dim of its own


def test_a_block_file_has_one_row_a_line(tmp_path):
    path, rows = tmp_path / "rows.json", [{"m": 1, "us": [[2.0, 1]]}, {"m": 8, "us": []}]
    tune_block.write({"device": "H200", "rows": rows, "left_out": []}, path)
    assert json.loads(path.read_text()) == {"device": "H200", "left_out": [], "rows": rows}
    assert sum('"m"' in line for line in path.read_text().splitlines()) == 2


def row(m: int, us: float | None, layer: str = "o", family: str = "8b", **fields) -> dict:
    base = {
        "family": family, "layer": layer, "m": m, "bits": 4, "group_size": 128, "lut": "scalar",
        "dtype": "bfloat16", "us": us, "us_overlap": None, "floor_us": 2.0, "peers": {},
    }  # fmt: skip
    return base | fields


def outcomes(item: dict) -> list[bool | None]:
    return [verdict.passed for verdict in targets.judge_row(item)]


@pytest.mark.parametrize(
    ("m", "us", "others", "expected"),
    [
        (1, 4.0, {"humming": 4.6, "cublas": 12.0}, [True, True]),
        (1, 4.1, {"humming": 4.6, "cublas": 12.0}, [False, True]),  # 1.12x
        (8, 4.9, {"humming": 9.0}, [True, False]),  # 2 / 0.88 + 2.5 = 4.77
        (16, 8.0, {"marlin": 9.0}, [False]),
        (32, 9.0, {"machete": 9.0}, [True]),
        (32, 9.1, {"machete": 9.0}, [False]),
        (128, 10.2, {"humming": 10.0}, [True]),
        (256, 10.21, {"humming": 10.0}, [False]),
        (512, 10.3, {"cublas": 10.0, "humming": 5.0}, [True]),
        (8192, 10.4, {"cublas": 10.0}, [False]),
        (2048, 1.0, {"humming": 5.0}, [None]),  # cuBLAS is the bar, and was not measured
        (16, 1.0, {}, [None]),
        (48, 1.0, {"humming": 5.0}, []),
    ],
)
def test_targets_of_a_row(m, us, others, expected):
    assert outcomes(row(m, us, peers=others)) == expected


def test_time_with_overlap_is_the_one_that_counts():
    assert outcomes(row(32, 12.0, us_overlap=8.0, peers={"humming": 9.0})) == [True]


def test_missing_rows_are_not_passed():
    gone = row(1, None, missing="time budget of 60 s was spent", peers={})
    assert outcomes(gone) == [None, None]
    text, passed = targets.report([gone])
    assert not passed
    assert "time budget of 60 s" in text


def test_block_sums():
    layers = ("qkv", "o", "gate_up", "down")
    rows = [row(1, us, layer) for layer, us in zip(layers, (6.3, 5.4, 18.1, 10.2), strict=True)]
    (verdict,) = targets.judge_blocks(rows)
    assert verdict.us == pytest.approx(40.0)
    assert verdict.passed
    (verdict,) = targets.judge_blocks(rows[:3])
    assert verdict.passed is None
    assert "down" in verdict.note
    assert list(targets.judge_blocks([row(2, 1.0, layer) for layer in layers])) == []


def test_other_formats_are_not_judged():
    assert targets.judge([row(1, 99.0, bits=3), row(1, 99.0, group_size=64)]) == []


def test_recorded_results_can_be_judged(capsys, monkeypatch):
    path = ROOT / "benchmarks" / "results" / "h200" / "kernels.json"
    monkeypatch.setattr(sys, "argv", ["targets.py", str(path)])
    targets.main()
    assert "8b block M=1" in capsys.readouterr().out


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_packing_is_a_stream_of_bits(bits):
    codes = torch.randint(0, 2**bits, (5, 96), dtype=torch.int32)
    codes[:, :32] = 2**bits - 1  # sign bits of the words
    assert torch.equal(peers.pack(codes, bits), fmt.pack(codes.to(torch.uint8), bits))


def test_quantizing_is_symmetric_and_close():
    weight = torch.randn(8, 256, dtype=torch.bfloat16)
    codes, scales, dense = peers.quantize(weight, 4, 128)
    assert scales.shape == (8, 2)
    assert 0 <= int(codes.min()) <= int(codes.max()) <= 15
    again = ((codes - 8).float().view(8, 2, 128) * scales.float().unsqueeze(-1)).view(8, 256)
    assert torch.equal(again.bfloat16(), dense)
    assert (dense - weight).abs().max() < scales.max()


def test_peers_that_cannot_load_leave_a_reason():
    usable, reasons = peers.load(["cublas", "marlin", "nonsense"])
    assert "cublas" in usable
    assert "known are cublas" in reasons["nonsense"]
    if not torch.cuda.is_available():
        assert reasons["marlin"]


def test_dense_peer_computes_its_weight():
    prepared = peers.Cublas().prepare(torch.randn(64, 128), 4, 128)
    assert peers.relative_error(prepared, 4) < 1e-5
    assert prepared.nbytes == 64 * 128 * 4


def test_refusals_name_the_rule():
    marlin = peers.Marlin.__new__(peers.Marlin)
    assert marlin.refusal(4096, 4096, 4, 128) is None
    assert "4 bits" in marlin.refusal(4096, 4096, 3, 128)
    assert "64 x 128" in marlin.refusal(100, 4096, 4, 128)


def test_relative_error_against_float64_and_nan(monkeypatch):
    monkeypatch.setattr(bench_kernels, "ERROR_BLOCK", 10)
    x, weight = torch.randn(3, 64), torch.randn(37, 64)
    assert bench_kernels.relative_error(x @ weight.t(), x, weight) < 1e-6
    assert bench_kernels.relative_error(x @ weight.t() * 1.01, x, weight) == pytest.approx(
        0.01, rel=1e-3
    )
    poisoned = torch.full((3, 37), float("nan"))
    assert bench_kernels.relative_error(poisoned, x, weight) == float("inf")


def test_graphs_hold_whole_rounds_unless_a_call_is_long():
    assert timing.calls_in_graph(33, 5.0) == 165
    assert timing.calls_in_graph(2, 70.0) == 12
    assert timing.calls_in_graph(9, 11000.0) == 2
    assert timing.copies_for(10_000_000) == 28
    assert timing.copies_for(940_000_000) == 2


def test_rows_after_the_budget_say_so():
    head = bench_kernels.row_head("8b", "o", 64, 4, 128, False, torch.bfloat16)
    missing = bench_kernels.missing_row(head, timing.Budget(60).reason())
    assert missing["us"] is None
    assert "60 s" in missing["missing"]
    json.dumps(missing)


def test_appended_rows_replace_their_own_kind_only():
    old = [row(1, 5.0), row(2, 6.0), row(4, None)]
    merged = bench_kernels.merge(old, [row(1, 4.0), row(2, None), row(4, None), row(8, 7.0)])
    assert {r["m"]: r["us"] for r in merged} == {1: 4.0, 2: 6.0, 4: None, 8: 7.0}
    assert len(merged) == 4


def test_formats_are_parsed():
    found = list(bench_kernels.parse_formats("4:128,3:64:pair,2:-1:fp16"))
    assert found == [
        (4, 128, False, torch.bfloat16),
        (3, 64, True, torch.bfloat16),
        (2, -1, False, torch.float16),
    ]


@pytest.mark.skipif(not ops.has_cuda_kernels(), reason="kernels built without CUDA")
def test_no_layout_has_more_records_than_kernels_can_count():
    """Their places are 32-bit numbers of 16 bytes (kernels/cuda/ring.cuh)."""
    library = c_api.open_library(os.environ.get("FLUTE_CUDA_LIBRARY") or str(ops.LIBRARY))

    def words(n: int, k: int) -> int:
        rows = (ctypes.c_int32 * c_api.MAX_PARTS)(n)
        matrix = c_api.Matrix(n, k, 4, 128, dtype=1, parts=1, part_rows=rows)
        return library.flute_record_words(ctypes.byref(matrix))

    record = 16 * 128 // 2 + 16 * 2  # codes and scales of 16 rows and 128 columns
    assert words(48, 256) == 3 * 2 * record // 4
    assert words(1 << 20, 1 << 16) == (1 << 16) * (1 << 9) * record // 4  # 35 GB
    assert words(1 << 20, 1 << 17) == -1  # 71 GB
