"""The serving plot: what it shows of a result file, and that it is well-formed."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import plot_serve  # noqa: E402
from model_shapes import MODELS, methods  # noqa: E402


def row(model: str, method: str, tp: int, ms: float) -> dict:
    decode = dict.fromkeys(plot_serve.BATCHES, ms)
    return {"model": model, "method": method, "tp": tp, "decode_ms": decode,
            "prefill_tok_s": 1000}  # fmt: skip


RECORD = {
    "device": "NVIDIA H200", "vllm": "0.26.0", "group_size": 128,
    "rows": [
        row("70b", "flute4", 1, 5.0), row("70b", "marlin", 1, 10.0),
        {"model": "70b", "method": "bf16", "tp": 1, "error": "not started: does not fit"},
        row("8b", "flute4", 1, 2.0), row("8b", "bf16", 1, 5.0), row("8b", "marlin", 1, 4.0),
    ],
}  # fmt: skip


def test_speeds_are_over_the_dense_model_or_over_marlin():
    small, large = plot_serve.panels(RECORD)
    assert (small.model, small.baseline["method"]) == ("8b", "bf16")
    assert dict(small.groups())["batch 8"] == {"bf16": 1.0, "marlin": 1.25, "flute4": 2.5}
    assert (large.model, large.baseline["method"]) == ("70b", "marlin")
    assert dict(large.groups())["batch 1"]["flute4"] == 2.0
    assert dict(large.groups())["prefill"]["flute4"] == 1.0


def test_the_table_leaves_out_rows_with_errors():
    lines = plot_serve.table(RECORD)
    assert len(lines) == 2 + 5
    assert lines[2] == "| LLaMA-3-8B | 1 | bf16 dense | 5.00 | 5.00 | 5.00 | 5.00 | 1000 |"


def test_the_plot_is_well_formed_and_inside_its_frame():
    root = ElementTree.fromstring(plot_serve.svg(RECORD))
    height = float(root.get("height"))
    bars = [bar for bar in root.iter("{http://www.w3.org/2000/svg}rect") if bar.get("class")]
    assert len(bars) == 2 + 5 * 2 + 5 * 1  # legend, both panels
    for bar in bars:
        assert 0 <= float(bar.get("x")) <= plot_serve.WIDTH - float(bar.get("width"))
        assert 0 <= float(bar.get("y")) <= height - float(bar.get("height"))
    one_row = {**RECORD, "rows": RECORD["rows"][:1]}
    assert "<rect" not in plot_serve.svg(one_row)  # nothing to compare with


def test_every_model_and_method_has_a_name():
    assert set(plot_serve.MODEL_NAMES) == set(MODELS)
    assert set(plot_serve.METHODS) == set(methods(128))


def test_a_readme_without_the_table_is_refused():
    with pytest.raises(SystemExit, match="lacks the line"):
        plot_serve.with_table("# nothing", "<!-- table: x -->", [])
