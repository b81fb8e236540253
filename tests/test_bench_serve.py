"""The benchmark of whole models: its configs, its record, and a real run of it on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flute_vllm.schema import FluteQuantizationConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import bench_serve  # noqa: E402
import model_shapes  # noqa: E402
import serve_record  # noqa: E402


@pytest.mark.parametrize("model", model_shapes.MODELS)
def test_configs_are_known_to_transformers(tmp_path, model):
    from transformers import AutoConfig

    method = model_shapes.methods(128)["flute3"]
    folder = model_shapes.write_config(tmp_path / "m", model, method)
    config = AutoConfig.from_pretrained(folder)
    assert config.num_hidden_layers == model_shapes.MODELS[model]["num_hidden_layers"]
    parsed = FluteQuantizationConfig.parse(config.quantization_config)
    assert (parsed.bits, parsed.group_size) == (3, 128)


def test_every_quantized_method_names_the_kernel_it_expects():
    for name, method in model_shapes.methods(64).items():
        assert bool(method.kernel) == (name != "bf16")
    marlin = model_shapes.methods(64)["marlin"]
    (group,) = marlin.quantization["config_groups"].values()
    assert group["weights"]["group_size"] == 64
    assert marlin.engine == {"linear_backend": "marlin"}


def test_peers_format_is_read_by_compressed_tensors():
    config = pytest.importorskip("compressed_tensors.quantization").QuantizationConfig
    quantization = {**model_shapes.methods(128)["marlin"].quantization}
    quantization.pop("quant_method")
    parsed = config.model_validate(quantization)
    assert parsed.config_groups["group_0"].weights.num_bits == 4


def test_appending_replaces_equal_rows_and_keeps_others():
    old = [{"model": "8b", "method": m, "tp": 1, "x": 1} for m in ("bf16", "marlin")]
    new = [{"model": "8b", "method": "marlin", "tp": 1, "x": 2}]
    assert [(r["method"], r["x"]) for r in serve_record.merge(old, new)] == [
        ("bf16", 1),
        ("marlin", 2),
    ]


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench_serve.parse(["--methods", "gptq"])
    assert "known are bf16, flute4" in capsys.readouterr().err


def test_engines_that_start_together_share_the_memory(monkeypatch):
    monkeypatch.setattr(bench_serve, "gpu_total_bytes", lambda: 143771 << 20)
    arguments = bench_serve.parse(["--together", "4", "--methods", "marlin"])
    (run,) = bench_serve.plan(arguments, Path("/nowhere"))
    engine = bench_serve.engine_arguments(arguments, run)
    assert 0.05 < engine["gpu_memory_utilization"] < 0.1
    assert engine["linear_backend"] == "marlin"
    assert engine["max_num_seqs"] == 128


def test_sizes_of_known_models():
    """LLaMA-3 8B has 8.03e9 parameters, 70B 70.6e9."""
    known = model_shapes.methods(128)
    assert model_shapes.weight_bytes("8b", known["bf16"]) == pytest.approx(16.06e9, rel=1e-3)
    assert model_shapes.weight_bytes("70b", known["bf16"]) == pytest.approx(141.1e9, rel=1e-3)
    assert model_shapes.weight_bytes("70b", known["flute4"]) == pytest.approx(39.5e9, rel=5e-3)
    marlin = model_shapes.weight_bytes("70b", known["marlin"])
    assert marlin == model_shapes.weight_bytes("70b", known["flute4"])
    assert model_shapes.cache_bytes("8b") == 131072
    assert model_shapes.cache_bytes("70b", 2) == 163840


def test_an_engine_that_does_not_fit_gets_a_row_that_says_so():
    arguments = bench_serve.parse(["--models", "70b", "--tp", "2,1", "--methods", "flute4,bf16"])
    runs = bench_serve.plan(arguments, Path("/nowhere"))
    h200 = 143771 << 20
    reasons = {(r.method, r.tp): bench_serve.misfit(arguments, r, h200) for r in runs}
    assert "131 GiB of weights" in reasons.pop(("bf16", 1))
    assert set(reasons.values()) == {None}
    assert bench_serve.misfit(arguments, runs[-1], None) is None


def test_groups_are_of_one_tp_and_fit_on_the_gpu_together():
    h200 = 143771 << 20
    options = ["--models", "70b", "--tp", "2,1", "--methods", "flute4,marlin,bf16"]
    arguments = bench_serve.parse([*options, "--together", "3"])
    runs = bench_serve.plan(arguments, Path("/nowhere"))[:-1]  # dense on one GPU does not fit
    groups = bench_serve.split(arguments, runs, h200)
    assert [[(r.method, r.tp) for r in group] for group in groups] == [
        [("flute4", 2), ("marlin", 2), ("bf16", 2)], [("flute4", 1), ("marlin", 1)],
    ]  # fmt: skip
    assert [len(group) for group in bench_serve.split(arguments, runs, 50 << 30)] == [1] * 5
    arguments = bench_serve.parse(["--methods", "flute4,bf16,marlin", "--together", "2"])
    runs = bench_serve.plan(arguments, Path("/nowhere"))
    assert [len(group) for group in bench_serve.split(arguments, runs, None)] == [2, 1]


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_smoke_run_measures_and_records_failures(tmp_path):
    pytest.importorskip("vllm")
    out = tmp_path / "serve.json"
    # Machete runs on one kind of GPU only: elsewhere its row must say so.
    command = [
        sys.executable, str(ROOT / "benchmarks" / "bench_serve.py"), "--smoke", "--together", "2",
        "--methods", "flute4,machete", "--out", str(out), "--append",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    record = json.loads(out.read_text())
    ours, other = record["rows"]
    assert set(ours["decode_ms"]) == {"1", "2"}
    assert ours["prefill_tok_s"] > 0
    assert ours["start_s"] > 0
    assert "MacheteLinearKernel" in other["error"]
    assert record["vllm"] != "unknown"
