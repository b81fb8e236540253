"""Tuning scales and tables for the whole model: exact gradients, gates, the same bytes again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import write_tiny_model
from torch import nn
from torch.nn import functional

from flute_vllm.checkpoint import Checkpoint
from flute_vllm.errors import FluteError
from flute_vllm.format import TENSOR_NAMES, LayerSpec, dequantize
from flute_vllm.info import describe
from flute_vllm.quantize import finetune, room
from flute_vllm.quantize.finetune import TunedLinear
from flute_vllm.quantize.model import Callbacks, quantize_checkpoint
from flute_vllm.quantize.plan import QuantizeSettings
from flute_vllm.quantize.progress import summary
from flute_vllm.validate import validate_checkpoint
from flute_vllm.writer import replace_tensors

MODEL = Path(__file__).resolve().parents[1] / "examples" / "stdlib_model" / "model"


@pytest.mark.parametrize("kind", ["scalar", "pair"])
@pytest.mark.parametrize("bits", [2, 4])
def test_gradients_are_those_of_the_unrounded_product(bits, kind):
    generator = torch.Generator().manual_seed(bits)
    linear = nn.Linear(64, 24).requires_grad_(False)
    codes = torch.randint(2**bits, (24, 64), generator=generator, dtype=torch.uint8)
    # Few significant bits, so that rounding the product to bfloat16 changes nothing.
    scales = torch.randint(1, 8, (24, 2), generator=generator).bfloat16() / 64
    size = (2**bits,) if kind == "scalar" else (4**bits, 2)
    table = nn.Parameter(torch.randint(-8, 8, size, generator=generator).float() / 8)
    table.requires_grad_(kind == "scalar")
    layer = TunedLinear(linear, LayerSpec(bits, 32, table_kind=kind), codes, scales, table)
    x = torch.randn(5, 3, 64, generator=generator, requires_grad=True)
    wanted = torch.randn(5, 3, 24, generator=generator)
    functional.mse_loss(layer(x), wanted).backward()
    found = [x.grad, layer.factors.grad, *([table.grad] if kind == "scalar" else [])]

    other, factors = x.detach().clone().requires_grad_(), torch.ones(24, 2, requires_grad=True)
    free = table.detach().clone().requires_grad_(kind == "scalar")
    index = codes.long()
    if kind == "pair":
        index = index[:, 0::2] * 2**bits + index[:, 1::2]
    values = free[index].reshape(24, 2, 32)
    weight = (values * (scales.float() * factors)[:, :, None]).view(24, 64)
    functional.mse_loss(functional.linear(other, weight, linear.bias), wanted).backward()
    expected = [other.grad, factors.grad, *([free.grad] if kind == "scalar" else [])]
    for one, two in zip(found, expected, strict=True):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tune") / "dense"
    write_tiny_model(folder, "llama", vocab_size=4096)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODEL / name, folder / name)
    return folder


@pytest.fixture
def settings(tmp_path) -> QuantizeSettings:
    return settings_of(tmp_path, {"rate": 0.01, "table_rate": 0.002, "epochs": 3, "tokens": 128})


def settings_of(folder: Path, tuning: dict | None, **changes) -> QuantizeSettings:
    recipe = {
        "name": "tuned", "summary": "for tests", "needs": "activations",
        "steps": [{"step": "search"}, {"step": "learn_table"}], "finetuning": tuning,
    }  # fmt: skip
    path = folder / f"tuned{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps(recipe))
    small = {"bits": 2, "group_size": 32, "samples": 8, "length": 64, "device": "cpu"}
    return QuantizeSettings(recipe=str(path), **{**small, **changes})


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def test_scales_and_tables_move_and_codes_stay(dense_folder, settings, tmp_path):
    report = quantize_checkpoint(dense_folder, tmp_path / "tuned", settings)
    quantize_checkpoint(dense_folder, tmp_path / "plain", settings_of(tmp_path, None))
    losses = report["finetuning"]["heldout_loss"]
    assert len(losses) == 4
    assert min(losses) < 0.99 * losses[0]
    validate_checkpoint(Checkpoint(tmp_path / "tuned"))
    plain, tuned = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "tuned")
    assert plain.keys() == tuned.keys()
    for name, before in plain.items():
        is_moved = not torch.equal(before, tuned[name])
        assert is_moved == name.endswith((".scales", ".table")), name
    fused = [tuned[f"model.layers.0.self_attn.{part}_proj.table"] for part in "qkv"]
    assert torch.equal(fused[0], fused[1])
    assert torch.equal(fused[0], fused[2])


def test_the_same_bytes_again_and_after_a_stop(dense_folder, settings, tmp_path, monkeypatch):
    quantize_checkpoint(dense_folder, tmp_path / "whole", settings)

    def stop(path, layout, tensors) -> None:
        replace_tensors(path, layout, tensors)
        if path.name.startswith("model-00002"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("flute_vllm.quantize.model.replace_tensors", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(dense_folder, tmp_path / "out", settings)
    quantize_checkpoint(dense_folder, tmp_path / "out", settings)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name
    assert not list((tmp_path / "out").glob("flute-*"))
    one, two = (without_times(tmp_path / name) for name in ("whole", "out"))
    assert one == two


def without_times(folder: Path) -> dict:
    report = json.loads((folder / "report.json").read_text())
    for entry in (report["totals"], *report["modules"].values()):
        entry.pop("seconds")
    return report


def test_reported_errors_are_those_of_the_tuned_weights(dense_folder, settings, tmp_path):
    """And what was only measured before is told as that."""
    report = quantize_checkpoint(dense_folder, tmp_path / "tuned", settings)
    before = quantize_checkpoint(dense_folder, tmp_path / "plain", settings_of(tmp_path, None))
    tuned, dense = tensors_of(tmp_path / "tuned"), tensors_of(dense_folder)
    for name, module in report["modules"].items():
        weight = dense[f"{name}.weight"].double()
        stored = dequantize(*(tuned[f"{name}.{part}"] for part in TENSOR_NAMES), bits=2).double()
        error = float((stored - weight).square().sum() / weight.square().sum())
        assert module["error"] == pytest.approx(error, rel=1e-4)
        assert module["error"] != before["modules"][name]["error"]
        assert module["output_error"] is None
        assert module["output_error_before_tuning"] == before["modules"][name]["output_error"]
    totals, earlier = report["totals"], before["totals"]
    assert totals["mean_error"] > earlier["mean_error"]  # Lloyd's table had the least
    assert totals["mean_output_error"] is None
    assert totals["mean_output_error_before_tuning"] == earlier["mean_output_error"]
    assert "mean_output_error_before_tuning" not in earlier
    card = (tmp_path / "tuned" / "README.md").read_text()
    assert f"{earlier['mean_output_error']:.3g} before tuning for the whole model |" in card
    assert f"| {totals['mean_error']:.3g} |" in card
    assert describe(tmp_path / "tuned")["error"] == totals["mean_error"]
    told = f"{earlier['mean_output_error']:.3g} before tuning for the whole model"
    assert told in summary(report, tmp_path / "tuned")


def test_a_rate_that_harms_changes_nothing(dense_folder, tmp_path):
    wild = {"rate": 3.0, "table_rate": 3.0, "epochs": 1, "tokens": 64}
    report = quantize_checkpoint(dense_folder, tmp_path / "out", settings_of(tmp_path, wild))
    assert report["finetuning"]["heldout_loss"][1] > report["finetuning"]["heldout_loss"][0]
    quantize_checkpoint(dense_folder, tmp_path / "plain", settings_of(tmp_path, None))
    plain, found = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "out")
    assert all(torch.equal(plain[name], found[name]) for name in plain)
    assert report["totals"]["mean_output_error"] > 0  # of these weights, so it is told as ever


def test_a_table_of_the_user_stays(dense_folder, tmp_path):
    chosen = settings_of(tmp_path, {"rate": 0.01, "epochs": 1, "tokens": 64}, bits=3, table="int")
    quantize_checkpoint(dense_folder, tmp_path / "out", chosen)
    tables = {n: t for n, t in tensors_of(tmp_path / "out").items() if n.endswith(".table")}
    assert len(tables) == 14
    assert all(torch.equal(t, next(iter(tables.values()))) for t in tables.values())


def test_a_device_that_is_too_small_leaves_it_out_with_a_warning(
    dense_folder, settings, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(room.os, "sysconf", lambda name: 1000)
    report = quantize_checkpoint(dense_folder, tmp_path / "out", settings)
    assert report["finetuning"]["left_out"] in caplog.text
    (told,) = [r.getMessage() for r in caplog.records if "not tuned" in r.getMessage()]
    assert "the host has 1,000,000" in told
    validate_checkpoint(Checkpoint(tmp_path / "out"))


@pytest.mark.parametrize("limits", [{"host_limit": 300_000_000}, {"available_memory": 300_000_000}])
def test_it_needs_room_for_logits_and_adam_and_not_for_the_weights_alone(
    limits, dense_folder, settings, tmp_path, monkeypatch
):
    """A model of 10 MB and 200 MB of logits, where 300 MB are free or allowed."""
    assert Checkpoint(dense_folder).nbytes < 10_000_000
    if "available_memory" in limits:
        free = limits.pop("available_memory")
        monkeypatch.setattr(finetune, "available_memory", lambda: free)
    report = quantize_checkpoint(dense_folder, tmp_path / "out", settings, **limits)
    assert "the host has 300,000,000" in report["finetuning"]["left_out"]


@pytest.mark.parametrize(
    ("error", "is_caught"),
    [(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
     (torch.OutOfMemoryError("CUDA out of memory"), True), (MemoryError(), True),
     (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
     (RuntimeError("a size does not fit"), False), (KeyError("x"), False)],
)  # fmt: skip
def test_an_allocation_that_fails_leaves_it_out_and_other_errors_stop(
    error, is_caught, dense_folder, settings, tmp_path, monkeypatch
):
    def fail(*_args, **_options):
        raise error

    monkeypatch.setattr(finetune._Tuner, "_judge", fail)
    if not is_caught:
        with pytest.raises(type(error)):
            quantize_checkpoint(dense_folder, tmp_path / "out", settings)
        assert not attempt(tmp_path / "out.partial").exists()
        return
    report = quantize_checkpoint(dense_folder, tmp_path / "out", settings)
    told = str(error) or "MemoryError"
    assert report["finetuning"]["left_out"] == told


def test_the_allocator_of_a_cpu_is_known_by_its_message():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 45)  # 128 TiB, which no address space of Linux has
    assert room.is_out_of_memory(caught.value)


def attempt(partial: Path) -> Path:
    return partial / "flute-scratch-tuning.json"


@pytest.mark.parametrize("moment", [1, 2])
def test_an_attempt_is_noted_until_its_first_step_and_interrupting_it_does_not_count(
    moment, dense_folder, settings, tmp_path, monkeypatch
):
    notes = []
    real = finetune._Tuner._judge

    def judge(self) -> float:
        notes.append(json.loads(attempt(tmp_path / "out.partial").read_text()))
        if moment == 1:
            raise KeyboardInterrupt
        return real(self)

    def on_training(step: int, steps: int, loss: float) -> None:
        assert not attempt(tmp_path / "out.partial").exists()
        raise KeyboardInterrupt

    callbacks = Callbacks(on_training=on_training)
    for _ in range(3):  # never the second time either
        with monkeypatch.context() as patched:
            patched.setattr(finetune._Tuner, "_judge", judge)
            with pytest.raises(KeyboardInterrupt):
                quantize_checkpoint(dense_folder, tmp_path / "out", settings, callbacks)
        assert notes.pop() == {"begun": 1}
        assert not attempt(tmp_path / "out.partial").exists()
    report = quantize_checkpoint(dense_folder, tmp_path / "out", settings)
    assert "left_out" not in report["finetuning"]


def test_only_what_the_file_has_is_replaced(tmp_path):
    layout = {"a": ((2,), torch.float32)}
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(200))
    with pytest.raises(FluteError, match="unexpected tensor"):
        replace_tensors(path, layout, {"a": torch.zeros(3)})


def test_a_head_that_was_tied_is_tuned_too(tmp_path):
    """It is in no file of the source, so names must come from the plan."""
    dense = tmp_path / "dense"
    write_tiny_model(dense, "qwen2", vocab_size=4096)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODEL / name, dense / name)
    tuning = {"rate": 0.01, "table_rate": 0.002, "epochs": 1, "tokens": 128}
    report = quantize_checkpoint(
        dense, tmp_path / "out", settings_of(tmp_path, tuning, lm_head=True)
    )
    assert "lm_head" in report["modules"]
    assert "left_out" not in report["finetuning"]
