"""Steps that run side by side, and what becomes of their results."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from _pytest.mark.expression import Expression

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import bench_load  # noqa: E402
import gpu_serving  # noqa: E402
from steps import Step, run  # noqa: E402

REPORT = """<testsuites><testsuite time="61.5">
<testcase name="test_a"><properties><property name="agreed" value="96"/>
<property name="largest_difference" value="0.05"/></properties></testcase>
<testcase name="test_b"><failure message="assert 1 == 2">long</failure></testcase>
<testcase name="test_c"><skipped message="needs two CUDA devices"/></testcase>
</testsuite></testsuites>"""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_steps_run_side_by_side_and_survive_each_other(tmp_path):
    hanging = "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', "\
        "'import time; time.sleep(60)'], start_new_session=True); "\
        "print(child.pid, flush=True); time.sleep(60)"  # fmt: skip
    noted = []
    steps = [
        Step("bad", python("print('why'); raise SystemExit(3)"), 20),
        Step("hanging", python(hanging), 1.5),
        Step("later", python("import os; print(os.environ['WORD'])"), 20, after=("bad",),
             finish=lambda: noted.append("finished")),
        Step("unread", python("pass"), 20, finish=lambda: json.loads("{")),
    ]  # fmt: skip
    begin = time.monotonic()
    ended = run(steps, tmp_path, {"WORD": "set"}, say=lambda line: None)
    assert time.monotonic() - begin < 15
    assert {name: end["outcome"] for name, end in ended.items()} == {
        "bad": "failed", "hanging": "over its limit", "later": "passed", "unread": "passed",
    }  # fmt: skip
    assert ended["unread"]["finish"].startswith("JSONDecodeError")
    assert (tmp_path / "bad.log").read_text() == "why\n"
    assert (tmp_path / "later.log").read_text() == "set\n"
    assert noted == ["finished"]
    assert json.loads((tmp_path / "summary.json").read_text()) == ended
    assert (tmp_path / "hanging.done").exists()
    with contextlib.suppress(psutil.NoSuchProcess):  # it may wait to be reaped
        child = psutil.Process(int((tmp_path / "hanging.log").read_text()))
        deadline = time.monotonic() + 10
        while child.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, "a child of an ended step still runs"
            time.sleep(0.05)


def test_the_whole_has_a_limit(tmp_path):
    steps = [Step("slow", python("import time; time.sleep(60)"), 60)]
    ended = run(steps, tmp_path, limit_s=1.0, say=lambda line: None)
    assert ended["slow"]["outcome"] == "over its limit"


def test_steps_that_wait_for_each_other_are_refused(tmp_path):
    steps = [Step("a", [], 1, after=("b",)), Step("b", [], 1, after=("a",))]
    with pytest.raises(ValueError, match="wait for each other"):
        run(steps, tmp_path, say=lambda line: None)


@pytest.mark.parametrize(
    ("machine", "scripts"), [("one", 3), ("two", 1), ("four", 1), ("speed", 2)]
)
def test_commands_are_those_of_the_scripts(tmp_path, machine, scripts):
    """Each step's options are known to its script."""
    import bench_serve
    import soak

    arguments = gpu_serving.parse([machine, "--out", str(tmp_path), "--commit", "abc"])
    steps = gpu_serving.SETS[machine](arguments)
    (tmp_path / "w4").mkdir()
    (tmp_path / "w4" / "config.json").touch()
    parsers = {"soak.py": soak.parse, "bench_load.py": bench_load.parse,
               "bench_serve.py": bench_serve.parse}  # fmt: skip
    parsed = 0
    for step in steps:
        assert set(step.after) <= {other.name for other in steps}
        assert step.limit_s <= arguments.limit_s
        name = Path(step.command[1]).name
        if name in parsers:
            assert parsers[name](step.command[2:]).commit == "abc"
            parsed += 1
    assert parsed == scripts


def test_every_feature_test_belongs_to_one_kind_of_machine(tmp_path):
    source = (ROOT / "tests" / "test_gpu_features.py").read_text()
    names = re.findall(r"^def (test_\w+)", source, flags=re.MULTILINE)
    arguments = gpu_serving.parse(["one", "--out", str(tmp_path)])
    chosen = {}
    for machine in ("one", "two", "four"):
        (step,) = (s for s in gpu_serving.SETS[machine](arguments) if s.name.startswith("feat"))
        assert step.name in gpu_serving.FEATURES
        rule = Expression.compile(step.command[step.command.index("-k") + 1])
        chosen[machine] = [n for n in names if rule.evaluate(lambda word, n=n, **_: word in n)]
    assert sorted(sum(chosen.values(), [])) == sorted(names)
    assert chosen["two"] == ["test_two_gpus_give_the_answers_of_one"]
    assert chosen["four"] == ["test_four_gpus_give_the_answers_of_one"]


def test_only_takes_what_a_step_needs_with_it(tmp_path):
    arguments = gpu_serving.parse(["one", "--out", str(tmp_path)])
    steps = gpu_serving.one_gpu(arguments)
    assert [s.name for s in gpu_serving.chosen(steps, "soak_bundled")] == [
        "quantize", "soak_bundled",
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="unknown steps nothing; known are quantize"):
        gpu_serving.chosen(steps, "nothing")


def test_report_of_the_feature_tests(tmp_path):
    (tmp_path / "r.xml").write_text(REPORT)
    found = gpu_serving.junit(tmp_path / "r.xml")
    assert (found["tests"], found["passed"], found["failure"], found["skipped"]) == (3, 1, 1, 1)
    assert found["cases"][0] == {
        "name": "test_a", "outcome": "passed", "agreed": 96, "largest_difference": 0.05,
    }  # fmt: skip
    assert found["cases"][1]["why"] == "assert 1 == 2"


def test_collect_merges_measured_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_serving, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu_serving.subprocess, "run", lambda *a, **k: None)
    (tmp_path / "results").mkdir()
    (tmp_path / "run").mkdir()
    rows = [{"model": "8b", "method": "bf16", "tp": 1}]
    old = {"command": "first", "commit": "a", "rows": rows}
    new = {"command": "second", "commit": "b", "rows": [
        {"model": "70b", "method": "flute4", "tp": 2, "decode_ms": {"1": 5.0}},
        {"model": "70b", "method": "bf16", "tp": 1, "error": "does not fit"},
    ]}  # fmt: skip
    (tmp_path / "results" / "serve.json").write_text(json.dumps(old))
    (tmp_path / "run" / "serve.json").write_text(json.dumps(new))
    (tmp_path / "run" / "load.json").write_text("{}")
    gpu_serving.collect([tmp_path / "run"])
    merged = json.loads((tmp_path / "results" / "serve.json").read_text())
    assert [row["model"] for row in merged["rows"]] == ["8b", "70b"]
    assert merged["rows"][1]["commit"] == "b"
    assert merged["command"] == "first ; second"
    assert (tmp_path / "results" / "load.json").exists()


def test_load_is_judged_at_full_depth_and_by_one_layer():
    good = {"extra_s_full_depth": 9.0, "extra_mib": 400, "block_bytes": 441 << 20}
    assert bench_load.judge(good) == []
    assert "10" in bench_load.judge(good | {"extra_s_full_depth": 10.5})[0]
    assert "one layer" in bench_load.judge(good | {"extra_mib": 500})[0]


def test_a_checkpoint_that_does_not_fit_on_the_disk_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="cannot write 80 layers"):
        bench_load.fitting_layers(tmp_path, "80", 80, 10**15, 0)
    assert bench_load.fitting_layers(tmp_path, "auto", 2, 1000, 0) == 2


def test_random_blocks_are_valid_layers():
    from flute_vllm.format import LayerSpec, dequantize

    config = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
              "num_key_value_heads": 2}  # fmt: skip
    spec = LayerSpec(4, 128, "bfloat16")
    tensors = bench_load.block_tensors(config, spec)
    words = [tensors[f"mlp.down_proj.{name}"] for name in ("qweight", "scales", "table")]
    dense = dequantize(*words, 4)
    assert dense.shape == (256, 512)
    assert dense.isfinite().all()
    assert len(dense.unique()) > 100


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_load_of_a_tiny_checkpoint(tmp_path):
    pytest.importorskip("vllm")
    command = [
        sys.executable, str(ROOT / "benchmarks" / "bench_load.py"), "--model", "tiny",
        "--scratch", str(tmp_path / "s"), "--out", str(tmp_path / "load.json"),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "load.json").read_text())
    assert record["repacked_layers"] == 8
    assert record["tokens"] == 4
    assert not (tmp_path / "s" / "checkpoint").exists()
