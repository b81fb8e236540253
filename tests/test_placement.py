"""Engines on GPUs of their own: who gets which, and that they start together and take turns."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import bench_serve  # noqa: E402
import gpu_serving  # noqa: E402
from placement import Need, place, visible  # noqa: E402

H200 = 143771 << 20


def parse(*options: str):
    return bench_serve.parse(["--models", "70b", "--steps", "48", *options])


def planned(arguments) -> list[bench_serve.Run]:
    return bench_serve.plan(arguments, Path("/nowhere"))


def test_the_largest_engines_are_placed_first_and_apart():
    found = place([Need(4, 10), Need(2, 20), Need(2, 70), Need(1, 40)], 4)
    assert found.devices == [(0, 1, 2, 3), (0, 1), (2, 3), (1,)]
    assert found.load == [30, 70, 80, 80]
    assert place([Need(1, 5)] * 3, 2).devices == [(1,), (0,), (1,)]
    assert place([Need(2, 5)], 3).devices == [(0, 1)]
    assert place([Need(2, 3), Need(2, 4)], 2).load == [7, 7]
    with pytest.raises(ValueError, match="on 4 GPUs cannot be placed on 2"):
        place([Need(4, 1)], 2)


def test_devices_are_counted_among_the_visible_ones():
    assert visible((), {}) == {}
    assert visible((2, 3), {}) == {"CUDA_VISIBLE_DEVICES": "2,3"}
    assert visible((2, 3), {"CUDA_VISIBLE_DEVICES": "4,5,6,GPU-7"}) == {
        "CUDA_VISIBLE_DEVICES": "6,GPU-7"
    }
    with pytest.raises(ValueError, match="GPU 3 is none of CUDA_VISIBLE_DEVICES=0,1"):
        visible((2, 3), {"CUDA_VISIBLE_DEVICES": "0,1"})


def test_engines_of_the_set_four_fit_beside_each_other_and_the_feature_tests():
    arguments = parse("--engines", gpu_serving.ENGINES, "--gpus", "4", "--together", "9")
    runs = planned(arguments)
    assert [(run.method, run.tp) for run in runs] == [
        ("flute4", 4), ("marlin", 4), ("flute4", 2), ("marlin", 2), ("bf16", 2), ("flute4", 1),
    ]  # fmt: skip
    (group,) = bench_serve.split(arguments, runs, H200)
    found = bench_serve.place(arguments, group)
    assert [found.devices[index] for index in (2, 3, 4, 5)] == [(0, 1), (2, 3), (2, 3), (1,)]
    assert max(found.load) < H200 - (9 << 30)
    assert min(found.load) == found.load[0]  # the feature tests' engine on one GPU is there
    # Marlin on one GPU fits too, which compares all three sizes in one run.
    more = planned(parse("--engines", gpu_serving.ENGINES + ",marlin:1", "--gpus", "4"))
    assert max(bench_serve.place(arguments, more).load) == max(found.load)


def test_engines_that_do_not_fit_together_start_later():
    options = ["--engines", "bf16:2,bf16:2,bf16:2,flute4:4", "--gpus", "4", "--together", "9"]
    arguments = parse(*options)
    groups = bench_serve.split(arguments, planned(arguments), H200)
    assert [[(run.method, run.tp) for run in group] for group in groups] == [
        [("bf16", 2), ("bf16", 2)], [("bf16", 2), ("flute4", 4)],
    ]  # fmt: skip
    assert [len(g) for g in bench_serve.split(arguments, planned(arguments), None)] == [4]


def test_an_engine_on_more_gpus_than_there_are_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse("--engines", "flute4:4", "--gpus", "2")
    assert "flute4 on 4 GPUs does not go with --gpus 2" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse("--engines", "gptq:4")


ENGINE = """
import json, os, sys, time
from pathlib import Path
job = json.loads(Path(sys.argv[1]).read_text())
kind = "dies" if job["engine"]["tensor_parallel_size"] == 2 else job["method"]
if kind == "dies":
    raise SystemExit("RuntimeError: no memory")
print("flute: 4-bit MarlinLinearKernel", flush=True)
Path(job["ready"]).touch()
while not Path(job["go"]).exists():
    time.sleep(0.02)
if kind == "marlin":
    time.sleep(60)
begin = time.time()
time.sleep(0.3)
Path(sys.argv[2]).write_text(json.dumps({
    "decode_ms": {}, "decode_tok_s": {}, "prefill_tok_s": 1, "peak_gib": 1, "versions": {},
    "start_s": 1, "at": [begin, time.time()], "shown": os.environ["CUDA_VISIBLE_DEVICES"],
}))
"""


@pytest.fixture
def fake_engines(tmp_path, monkeypatch) -> Path:
    """In place of serve_engine.py: on two GPUs it dies at the start, Marlin hangs in measuring."""
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    real = subprocess.Popen

    def popen(command, **options):
        return real([sys.executable, str(script), *command[2:]], **options)

    monkeypatch.setattr(bench_serve.subprocess, "Popen", popen)
    monkeypatch.setattr(bench_serve, "gpu_total_bytes", lambda: H200)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path / "runs"


def test_engines_take_turns_and_a_failed_one_costs_its_own_row(fake_engines, tmp_path):
    (tmp_path / "go").touch()
    arguments = parse(
        "--engines", "flute4:4,marlin:4,bf16:2,flute4:1", "--gpus", "4", "--together", "9",
        "--limit-s", "20", "--measure-s", "2", "--wait-for", str(tmp_path / "go"),
    )  # fmt: skip
    begin = time.monotonic()
    runs = bench_serve.plan(arguments, fake_engines)
    rows = list(bench_serve.run_group(arguments, runs))
    assert time.monotonic() - begin < 15
    ours, hung, dead, alone = rows
    assert hung["error"].startswith("not done within 2 s")
    assert dead["error"].startswith("ended with 1: RuntimeError: no memory")
    assert (ours["gpus"], alone["gpus"], alone["together"]) == ([0, 1, 2, 3], [1], 4)
    first, last = (
        json.loads((fake_engines / name / "result.json").read_text())
        for name in ("70b-flute4-4", "70b-flute4-1")
    )
    assert first["at"][1] <= last["at"][0]
    assert (first["shown"], last["shown"]) == ("0,1,2,3", "1")
