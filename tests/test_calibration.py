"""Calibration text, windows, the block runner, and what a calibrated run reports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import write_tiny_model

from flute_vllm.checkpoint import Checkpoint
from flute_vllm.errors import FluteError
from flute_vllm.quantize.activations import Moments, observe
from flute_vllm.quantize.blocks import BlockRunner
from flute_vllm.quantize.calibration import calibration_text, cut
from flute_vllm.quantize.model import quantize_checkpoint
from flute_vllm.quantize.plan import QuantizeSettings, plan_checkpoint
from flute_vllm.quantize.recipes import Calibration
from flute_vllm.resources import data_path

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples" / "stdlib_model" / "model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("calibration") / "dense"
    write_tiny_model(
        out, "llama", vocab_size=4096, hidden_size=128, head_dim=32, intermediate_size=192
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODEL / name, out / name)
    return out


def test_bundled_text_shares_nothing_with_the_heldout_files():
    import sysconfig

    text = calibration_text("bundled")
    assert 200_000 < len(text) < 1_000_000
    library = Path(sysconfig.get_paths()["stdlib"])
    record = json.loads((ROOT / "examples" / "stdlib_model" / "heldout.json").read_text())
    for name in (*record["files"], *record["validation"]):
        source = (library / name).read_text(encoding="utf-8")
        middle = source[len(source) // 2 :][:200]
        assert middle not in text, name
    assert "PSF License" in data_path("configs", "calibration", "README.md").read_text()


def test_windows_do_not_overlap_and_depend_on_the_seed(folder):
    wanted = Calibration(samples=8, length=100, heldout_share=0.25)
    checkpoint = Checkpoint(folder)
    one, again = (cut(checkpoint, "bundled", wanted, None, 0) for _ in range(2))
    other = cut(checkpoint, "bundled", wanted, None, 1)
    assert one.ids.shape == (8, 100)
    assert one.heldout == 2
    assert (one.ids[:, 0] == 0).all()  # the begin token
    assert torch.equal(one.ids, again.ids)
    assert not torch.equal(one.ids, other.ids)
    assert len({tuple(row) for row in one.ids.tolist()}) == 8
    assert cut(checkpoint, "bundled", wanted, 32, 0).ids.shape == (8, 32)
    assert one.origin["sha256"] == other.origin["sha256"]


def test_a_short_text_gives_short_windows(folder, tmp_path):
    (tmp_path / "short.txt").write_text("def f(x):\n    return x + 1\n")
    windows = cut(Checkpoint(folder), str(tmp_path / "short.txt"), Calibration(), None, 0)
    assert len(windows.ids) == 2
    assert windows.heldout == 1


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [("missing.txt", None, "FileNotFound"), ("empty.txt", b" \n", "none of them visible"),
     ("binary.txt", b"\xff\xfe\x00", "UnicodeDecode")],
)  # fmt: skip
def test_unusable_texts_are_told(name, content, told, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(FluteError) as caught:
        calibration_text(str(tmp_path / name))
    assert told in caught.value.why


def test_no_tokenizer_is_told(tmp_path):
    dense = write_tiny_model(tmp_path / "dense", "llama")
    settings = QuantizeSettings(recipe="balanced")
    with pytest.raises(FluteError, match="cannot calibrate without a tokenizer") as caught:
        quantize_checkpoint(dense, tmp_path / "out", settings)
    assert "--recipe fast" in caught.value.fix


@pytest.mark.parametrize("recipe", ["balanced", "best"])
def test_calibrating_a_mixture_of_experts_is_refused(recipe, tmp_path):
    dense = write_tiny_model(tmp_path / "dense", "mixtral", vocab_size=4096)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODEL / name, dense / name)
    settings = QuantizeSettings(recipe=recipe, samples=2, length=16)
    with pytest.raises(FluteError, match="cannot run this architecture block by block"):
        quantize_checkpoint(dense, tmp_path / "out", settings)
    assert not (tmp_path / "out.partial").exists()


def test_fast_needs_no_text_and_goes_on_without_running_the_model(tmp_path, caplog):
    """Experts are stored under other names than transformers', so blocks cannot be run."""
    dense = write_tiny_model(tmp_path / "dense", "mixtral")
    report = quantize_checkpoint(dense, tmp_path / "out", QuantizeSettings(recipe="fast"))
    assert report["calibration"] is None
    gates = report["modules"]["model.layers.0.self_attn.o_proj"]["gates"]
    assert [gate["step"] for gate in gates] == ["search", "learn_table"]
    told = [r.getMessage() for r in caplog.records if "rounds to nearest" in r.getMessage()]
    assert len(told) == 1
    assert "the checkpoint has no tensor" in told[0]


def test_random_tokens_are_trusted_as_far_as_the_prior_says(tmp_path):
    dense = write_tiny_model(tmp_path / "dense", "llama")
    settings = QuantizeSettings(recipe="fast", bits=3)
    report = quantize_checkpoint(dense, tmp_path / "out", settings)
    assert report["calibration"] == {
        "name": "random tokens", "samples": 32, "length": 256, "heldout": 0,
    }  # fmt: skip
    assert "random tokens, 32 windows" in (tmp_path / "out" / "README.md").read_text()
    moments = Moments(4, 0, torch.device("cpu"), prior=0.5)
    x = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 17)
    moments.add("hessian m", x, x)
    moments.tokens["m"] = len(x)
    hessian = moments.statistics("m").hessian
    share = 0.5 + 16 / 4096
    plain = x.T @ x / (x.T @ x).diagonal().mean()
    assert torch.allclose(hessian, (plain + share * torch.eye(16)) / (1 + share), atol=1e-5)
    assert moments.statistics("m").heldout is None


def test_only_what_held_out_text_confirms_is_corrected():
    """A correction fitted to few tokens is cut back; one that holds everywhere is made."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 32, generator=generator)
    for tokens, holds in ((40, False), (4000, True)):
        moments = Moments(2, 1, torch.device("cpu"))
        for part in ("", "heldout "):
            dense = torch.randn(tokens, 32, generator=generator)
            bent = dense @ (torch.eye(32) * 0.9) if holds else dense
            bent = bent + 0.1 * torch.randn(tokens, 32, generator=generator)
            name = part or "hessian "
            moments.add(f"{name}m", bent, bent)
            moments.add(f"{part}cross m", dense, bent)
        moved = float((moments.target("m", weight) - weight).norm() / weight.norm())
        assert (0.07 < moved < 0.15) if holds else moved < 0.05


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3", "qwen3", "phi3"])
def test_blocks_one_by_one_are_the_model(architecture, tmp_path):
    from transformers import AutoModelForCausalLM

    dense = write_tiny_model(tmp_path / "dense", architecture)
    runner = BlockRunner(Checkpoint(dense), torch.device("cpu"))
    ids = torch.randint(3, 500, (6, 300), generator=torch.Generator().manual_seed(0))
    hidden = runner.embed(ids)
    for index in range(len(runner.blocks)):
        with runner.block(index) as block:
            hidden = torch.cat(list(runner.run(block, index, hidden)))
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    with torch.no_grad():
        expected = model.model(ids)[0]
        assert torch.allclose(model.model.norm(hidden), expected, rtol=1e-4, atol=1e-4)


def test_moments_are_those_of_the_inputs(folder):
    """Against hooks on the whole model; the last windows are kept apart."""
    from transformers import AutoModelForCausalLM

    runner = BlockRunner(Checkpoint(folder), torch.device("cpu"))
    ids = torch.randint(3, 4000, (6, 40), generator=torch.Generator().manual_seed(1))
    hidden = runner.embed(ids)
    with runner.block(0) as block:
        moments = observe(runner, 0, block, hidden, 2, ["mlp.down_proj"])
    statistics = moments.statistics("mlp.down_proj")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen = []
    layer = model.model.layers[0].mlp.down_proj
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
    for part, rows in (("hessian", slice(4)), ("heldout", slice(4, 6))):
        x = seen[0][rows].reshape(-1, layer.in_features)
        expected = x.T @ x
        expected /= expected.diagonal().mean()
        assert torch.allclose(getattr(statistics, part), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("recipe", ["balanced", "best"])
def test_report_and_card_of_a_calibrated_run(recipe, folder, tmp_path):
    settings = QuantizeSettings(bits=2, recipe=recipe, samples=4, length=32, device="cpu")
    report = quantize_checkpoint(folder, tmp_path / "out", settings)
    assert report["calibration"]["samples"] == 4
    assert len(report["calibration"]["sha256"]) == 64
    for module in report["modules"].values():
        errors = [gate["error"] for gate in module["gates"] if gate["is_kept"]]
        assert errors == sorted(errors, reverse=True)
        told = "output_error_before_tuning" if recipe == "best" else "output_error"
        assert module[told] > 0
        assert "error_feedback" in {gate["step"] for gate in module["gates"]}
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| recipe | {recipe}:" in card
    assert report["calibration"]["sha256"][:16] in card
    assert "vllm serve" in card


def test_card_keeps_licence_and_language_of_the_source(tmp_path):
    quantize_checkpoint(MODEL, tmp_path / "out", QuantizeSettings(recipe="nf"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: other\nlicense_name: psf-2.0\nlanguage: [code]\n")
    assert "calibration | none" in card


def test_calib_none_leaves_the_data_free_steps_and_says_so(folder, tmp_path, caplog):
    with caplog.at_level("WARNING", logger="flute_vllm"):
        settings = QuantizeSettings(recipe="balanced", calib="none")
        report = quantize_checkpoint(folder, tmp_path / "out", settings)
    assert report["calibration"] is None


def test_dry_run_sizes_are_the_real_bytes(folder, tmp_path):
    settings = QuantizeSettings(bits=3, recipe="nf", overrides={"down_proj": 4}, skip=("o_proj",))
    plan = plan_checkpoint(Checkpoint(folder), settings)
    quantize_checkpoint(folder, tmp_path / "out", settings)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert {file.name for file in files} == {unit.file for unit in plan.units}
    assert plan.file_nbytes == sum(file.stat().st_size for file in files)
    assert plan.nbytes == Checkpoint(tmp_path / "out").nbytes
