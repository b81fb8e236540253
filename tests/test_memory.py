"""What a plan needs of memory, by arithmetic, and what a process can still get of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import write_large_headers
from tiny_models import write_tiny_model
from typer.testing import CliRunner

from flute_vllm import evaluate
from flute_vllm.checkpoint import Checkpoint
from flute_vllm.cli import app
from flute_vllm.errors import FluteError
from flute_vllm.quantize import memory, room
from flute_vllm.quantize.memory import memory_parts, memory_totals, tuning_parts
from flute_vllm.quantize.model import quantize_checkpoint
from flute_vllm.quantize.plan import QuantizeSettings, plan_checkpoint
from flute_vllm.quantize.room import available_memory

MODEL = Path(__file__).resolve().parents[1] / "examples" / "stdlib_model" / "model"
VOCABULARY = 4096
SMALL = {"samples": 8, "length": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("memory") / "dense"
    write_tiny_model(out, "llama", vocab_size=VOCABULARY)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODEL / name, out / name)
    return out


@pytest.fixture(scope="module")
def wide_folder(folder, tmp_path_factory) -> Path:
    """The same model in float32."""
    out = tmp_path_factory.mktemp("memory") / "wide"
    shutil.copytree(folder, out)
    tensors = {n: t.float() for n, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def parts_of(folder: Path, device: str, **settings) -> dict[str, int]:
    checkpoint, chosen = Checkpoint(folder), QuantizeSettings(**{**SMALL, **settings})
    parts = memory_parts(checkpoint, plan_checkpoint(checkpoint, chosen), chosen, device)
    return {part.what: part.nbytes for part in parts}


def one(parts: dict[str, int], begin: str) -> int:
    (nbytes,) = [nbytes for what, nbytes in parts.items() if what.startswith(begin)]
    return nbytes


# --- needs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["balanced", "best"])
def test_blocks_are_run_in_float32_on_a_cpu_and_where_the_model_is(recipe, folder, wide_folder):
    narrow = parts_of(folder, "cuda", recipe=recipe)
    values = 8 * 64 * 256
    paths = 2 if recipe == "best" else 1  # what goes in; and what comes out, in parts and as one
    assert one(narrow, "activations") == (paths + 2) * 2 * values
    for parts in (
        parts_of(folder, "cpu", recipe=recipe),
        parts_of(wide_folder, "cuda", recipe=recipe),
    ):
        for name in ("activations", "decoder block"):
            assert one(parts, name) == 2 * one(narrow, name)


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory) -> Path:
    """Headers of two blocks of 70B, whose whole model is what needs most."""
    return write_large_headers(tmp_path_factory.mktemp("memory") / "large")


@pytest.mark.parametrize("option", [{"recipe": "learned"}, {"recipe": "nf", "bpw": 3.0}])
def test_a_whole_model_is_in_float32_on_a_cpu(option, large_folder):
    """And on its way to a GPU in host memory."""
    nbytes = Checkpoint(large_folder).nbytes
    assert one(parts_of(large_folder, "cpu", **option), "whole model, 32 bits") == 2 * nbytes
    on_gpu = parts_of(large_folder, "cuda", **option)
    assert one(on_gpu, "whole model, 16 bits") == nbytes
    assert one(on_gpu, "whole model on its way") == nbytes


def test_phases_that_follow_each_other_are_not_added(large_folder):
    """--bpw measures the whole model before the first block is quantized."""
    alone = parts_of(large_folder, "cpu", recipe="nf")
    measured = parts_of(large_folder, "cpu", recipe="nf", bpw=3.0)
    assert not set(alone) & set(measured)
    later = parts_of(large_folder, "cpu", recipe="best")
    assert parts_of(large_folder, "cpu", recipe="best", bpw=3.0) == later  # needs more
    # Of a GPU and its host each has a worst moment of its own.
    many = {"recipe": "balanced", "skip": ("down_proj",), "samples": 128, "length": 2048}
    split = parts_of(large_folder, "cuda", bpw=3.0, **many)
    begins = ("largest tensor", "activations", "second moments",
              "whole model, 16 bits", "log-probabilities", "largest group")  # fmt: skip
    assert len(split) == len(begins)
    assert all(one(split, begin) > 0 for begin in begins)


@pytest.mark.parametrize("recipe", ["fast", "balanced", "best"])
def test_a_head_alone(recipe, folder):
    """All blocks stay dense, and are run all the same."""
    pattern = "re:model.layers.*"
    parts = parts_of(folder, "cpu", recipe=recipe, lm_head=True, skip=(pattern,))
    assert one(parts, "decoder block") > 0
    result = CliRunner().invoke(app, [
        "quantize", str(folder), "out", "--lm-head", "--skip", pattern, "--recipe", recipe,
        "--dry-run", "--device", "cpu",
    ])  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "memory, estimated" in result.stderr


def test_tuning_counts_more_than_weights(folder):
    checkpoint, settings = Checkpoint(folder), QuantizeSettings(recipe="best")
    plan = plan_checkpoint(checkpoint, settings)
    found = {p.what: p.nbytes for p in tuning_parts(checkpoint, plan, 512, "cpu")}
    assert one(found, "whole model") == 2 * checkpoint.nbytes
    scales = sum(n * k // 64 for n, k in (plan.shapes[m] for m in plan.specs))
    assert one(found, "scales, factors") == 4 * (1 + 1 + 1 + 2) * scales
    assert one(found, "logits") >= 5 * 4 * 4096 * VOCABULARY
    on_gpu = {p.what: p.nbytes for p in tuning_parts(checkpoint, plan, 512, "cuda")}
    assert one(on_gpu, "whole model on its way") == 2 * checkpoint.nbytes  # small: float32


def test_large_models_are_tuned_in_bfloat16_and_their_blocks_run_again(folder, monkeypatch):
    checkpoint, settings = Checkpoint(folder), QuantizeSettings(recipe="best")
    plan = plan_checkpoint(checkpoint, settings)
    before = tuning_parts(checkpoint, plan, 512, "cuda")
    monkeypatch.setattr(memory, "FLOAT32_PARAMETERS", 1000)
    after = tuning_parts(checkpoint, plan, 512, "cuda")
    assert after[0].nbytes == checkpoint.nbytes == before[0].nbytes // 2
    assert after[-2].nbytes < before[-2].nbytes
    assert tuning_parts(checkpoint, plan, 512, "cpu")[0].nbytes == 2 * checkpoint.nbytes


def test_the_command_tells_of_tuning_and_keeps_to_the_memory_allowed(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "SYSTEM_VALUES", 1000)  # more than such a model takes
    arguments = ["quantize", str(folder), str(tmp_path / "out"), "--recipe", "best", "--device",
                 "cpu", "--samples", "4", "--length", "64"]  # fmt: skip
    dry = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert "tuning at the end, roughly:" in dry.stderr
    none = CliRunner().invoke(app, [*arguments, "--calib", "none", "--dry-run"])
    assert "tuning" not in none.stderr
    checkpoint, settings = Checkpoint(folder), QuantizeSettings(recipe="best", samples=4, length=64)
    plan = plan_checkpoint(checkpoint, settings)
    needed, _ = memory_totals(memory_parts(checkpoint, plan, settings, "cpu"), "cpu")
    tuned, _ = memory_totals(tuning_parts(checkpoint, plan, 64, "cpu"), "cpu")
    assert needed < tuned
    result = CliRunner().invoke(app, [*arguments, "--ram", str(needed * 1.01 / 1e9)])
    assert result.exit_code == 0, result.output
    assert "it will be left out" in " ".join(result.stderr.split())
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "the host has" in report["finetuning"]["left_out"]


# --- what there is -----------------------------------------------------------------------------

GB = 1 << 30
UNLIMITED_V1 = 9223372036854771712  # what version 1 says for no limit


def system(root: Path, groups: str, files: dict[str, str], available: int = 50 * GB) -> list[Path]:
    """A /proc and a /sys/fs/cgroup with these files."""
    proc, cgroup = root / "proc", root / "cgroup"
    (proc / "self").mkdir(parents=True)
    told = f"MemTotal:       99999999 kB\nMemAvailable:   {available // 1024} kB\n"
    (proc / "meminfo").write_text(told)
    (proc / "self" / "cgroup").write_text(groups)
    for name, content in files.items():
        (cgroup / name).parent.mkdir(parents=True, exist_ok=True)
        (cgroup / name).write_text(content)
    return [proc, cgroup]


@pytest.fixture
def _large_machine(monkeypatch):
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 100 * GB // 4096}
    monkeypatch.setattr(room.os, "sysconf", lambda name: sizes[name])


def v2(folder: str, limit: object, used: int, cached: int = 0) -> dict[str, str]:
    stat = f"anon 5\nfile 77\ninactive_file {cached}\nactive_file 4096\n"
    return {f"{folder}memory.max": f"{limit}\n", f"{folder}memory.current": f"{used}\n",
            f"{folder}memory.stat": stat}  # fmt: skip


def v1(folder: str, limit: int, used: int) -> dict[str, str]:
    stat = f"cache 9\ntotal_inactive_file {GB}\ntotal_active_file 4096\ninactive_file 5\n"
    return {f"memory/{folder}memory.limit_in_bytes": f"{limit}\n",
            f"memory/{folder}memory.usage_in_bytes": f"{used}\n",
            f"memory/{folder}memory.stat": stat}  # fmt: skip


@pytest.mark.usefixtures("_large_machine")
@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("", {}, 50 * GB),
        ("0::/\n", {}, 50 * GB),  # the root of a machine has no limit
        ("0::/\n", v2("", "max", 7 * GB), 50 * GB),
        ("0::/\n", v2("", 20 * GB, 7 * GB), 13 * GB + 4096),
        # Page cache is given back before a process is ended.
        ("0::/\n", v2("", 20 * GB, 19 * GB, 15 * GB), 16 * GB + 4096),
        # A limit counts for all groups below.
        ("0::/a/b\n", {**v2("a/b/", "max", GB), **v2("a/", 20 * GB, 8 * GB)}, 12 * GB + 4096),
        ("0::/a/b\n", {**v2("a/b/", 9 * GB, GB), **v2("a/", 20 * GB, 8 * GB)}, 8 * GB + 4096),
        # In a container the path may be that of the host.
        ("0::/docker/1234\n", v2("", 20 * GB, 7 * GB), 13 * GB + 4096),
        ("5:cpu:/x\n4:memory:/x\n", v1("x/", 30 * GB, 9 * GB), 22 * GB + 4096),
        ("4:cpu,memory:/gone\n", v1("", 30 * GB, 9 * GB), 22 * GB + 4096),
        ("4:memory:/x\n", v1("x/", UNLIMITED_V1, 9 * GB), 50 * GB),
        ("0::/\n4:memory:/x\n", {**v1("x/", 30 * GB, 9 * GB), **v2("", "max", 1)}, 22 * GB + 4096),
    ],
)
def test_the_least_of_all_limits_is_what_there_is(groups, files, expected, tmp_path):
    assert available_memory(*system(tmp_path, groups, files)) == expected


@pytest.mark.usefixtures("_large_machine")
def test_without_the_files_of_linux_the_machine_is_the_limit(tmp_path):
    assert available_memory(tmp_path / "proc", tmp_path / "cgroup") == 100 * GB


def test_here():
    """On this machine, whatever it is: a positive number, not above its size."""
    assert 0 < available_memory() < 1 << 50


@pytest.mark.parametrize("place", ["load_model", "Adam"])
def test_training_that_gets_no_memory_says_so(place, folder, tmp_path, monkeypatch):
    """On a CPU it is a RuntimeError like any other but for its text."""

    def fail(*_args, **_options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

    owner = evaluate if place == "load_model" else torch.optim
    monkeypatch.setattr(owner, place, fail)
    settings = QuantizeSettings(recipe="learned", device="cpu", **SMALL)
    with pytest.raises(FluteError, match="not enough memory to train scales") as caught:
        quantize_checkpoint(folder, tmp_path / "out", settings)
    assert "can't allocate memory" in caught.value.why


def test_a_recipe_that_tunes_needs_no_more_to_be_allowed(folder, tmp_path):
    """Only what cannot be left out is compared with --ram."""
    settings = QuantizeSettings(recipe="best", samples=4, length=64, device="cpu")
    report = quantize_checkpoint(folder, tmp_path / "out", settings, host_limit=1)
    assert "the host has 1" in report["finetuning"]["left_out"]
    assert torch.isfinite(torch.tensor(report["totals"]["mean_output_error"]))
