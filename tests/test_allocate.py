"""Mixed bits for --bpw: the budget is kept, bits go where they pay, and a rerun decides alike."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import write_tiny_model

from flute_vllm.checkpoint import Checkpoint
from flute_vllm.errors import FluteError
from flute_vllm.format import LayerSpec
from flute_vllm.quantize import model
from flute_vllm.quantize.allocate import allocate, error_of, shipped_options
from flute_vllm.quantize.model import Callbacks, quantize_checkpoint
from flute_vllm.quantize.plan import QuantizeSettings
from flute_vllm.validate import validate_checkpoint

BASE = LayerSpec(3, 64)
OPTIONS = shipped_options()
SETTINGS = QuantizeSettings(
    bits=3, group_size=32, recipe="best", bpw=3.6, calib="none", overrides={"o_proj": 4}
)


def stored(spec: LayerSpec, shapes: list[tuple[int, int]]) -> float:
    return sum(spec.bits_per_weight(n, k) * n * k for n, k in shapes)


@settings(max_examples=30, deadline=None)
@given(
    losses=st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=8), bpw=st.floats(2.3, 5.0)
)  # fmt: skip
def test_the_budget_is_kept_and_used(losses, bpw):
    shapes = {(f"m{i}",): [(256, 128 * (1 + i % 3))] for i in range(len(losses))}
    weights = sum(n * k for parts in shapes.values() for n, k in parts)
    found = allocate(shapes, dict(zip(shapes, losses, strict=True)), BASE, OPTIONS, bpw * weights)
    used = sum(stored(found[group], shapes[group]) for group in shapes)
    assert used <= bpw * weights
    if stored(BASE, [part for parts in shapes.values() for part in parts]) <= bpw * weights:
        unit = error_of(BASE, OPTIONS)
        predicted = [error_of(spec, OPTIONS) * loss for spec, loss in zip(
            found.values(), losses, strict=True)]  # fmt: skip
        assert sum(predicted) <= unit * sum(losses) * (1 + 1e-9)


def test_bits_go_where_an_error_costs_most():
    shapes = {(name,): [(512, 512)] for name in ("little", "much")}
    losses = {("little",): 0.001, ("much",): 0.1}
    found = allocate(shapes, losses, BASE, OPTIONS, 3.3 * 2 * 512 * 512)
    assert found["little",].bits == 2
    assert found["much",].bits == 4


def test_too_few_bits_are_told():
    shapes = {("m",): [(64, 128)]}
    with pytest.raises(FluteError, match="too few bits per weight") as caught:
        allocate(shapes, {("m",): 1.0}, BASE, OPTIONS, 2.0 * 64 * 128)
    assert "2.0000 asked for" in caught.value.why


def test_a_target_on_a_model(tmp_path, monkeypatch):
    """Mixed specs, none beyond the target; a run that was stopped measures nothing again."""
    dense = write_tiny_model(tmp_path / "dense", "llama", hidden_size=128, head_dim=32,
                             intermediate_size=256)  # fmt: skip

    def stop(report, unit) -> None:
        if unit.name == "model.layers.1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(dense, tmp_path / "out", SETTINGS, Callbacks(on_module=stop))
    measured = []
    real = model.measure_losses
    monkeypatch.setattr(model, "measure_losses", lambda *args: measured.append(1) or real(*args))
    report = quantize_checkpoint(dense, tmp_path / "out", SETTINGS)
    assert not measured
    again = quantize_checkpoint(dense, tmp_path / "again", SETTINGS)
    assert measured
    for file in (tmp_path / "again").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
    assert again["modules"].keys() == report["modules"].keys()
    config = validate_checkpoint(Checkpoint(tmp_path / "out"))
    specs = {module: config.spec_for(module) for module in report["modules"]}
    free = [specs[m] for m in specs if "o_proj" not in m]
    assert len(set(free)) > 1
    assert all(spec.bits == 4 for module, spec in specs.items() if "o_proj" in module)
    shapes = {m: Checkpoint(dense).tensors[f"{m}.weight"].shape for m in specs}
    chosen = [m for m in specs if "o_proj" not in m]
    weights = sum(shapes[m][0] * shapes[m][1] for m in chosen)
    assert sum(stored(specs[m], [shapes[m]]) for m in chosen) <= 3.6 * weights
