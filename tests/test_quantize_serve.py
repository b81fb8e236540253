"""From a dense model through a recipe to answers of vLLM, equal to transformers' on the dense twin.

Every family of models with the quickest recipe, every recipe with one family, all in one engine
process. Float32, greedy.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
from engine import LIGHT_ENVIRONMENT, run_jobs  # noqa: E402
from tiny_models import PROMPTS, greedy_with_transformers, write_tiny_model  # noqa: E402

from flute_vllm.checkpoint import Checkpoint  # noqa: E402
from flute_vllm.convert import dequantize_checkpoint  # noqa: E402
from flute_vllm.quantize.model import quantize_checkpoint  # noqa: E402
from flute_vllm.quantize.plan import QuantizeSettings  # noqa: E402
from flute_vllm.validate import validate_checkpoint  # noqa: E402

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples" / "stdlib_model" / "model"
FAMILIES = ("llama", "gemma2", "gemma3", "qwen2", "qwen3", "mistral", "phi3", "mixtral")
CALIBRATED = {"samples": 4, "length": 64}
CASES: dict[str, tuple[str, QuantizeSettings]] = {
    **{name: (name, QuantizeSettings(bits=3, recipe="nf")) for name in FAMILIES},
    "fast": ("llama", QuantizeSettings(bits=4)),
    "fast mixtral": ("mixtral", QuantizeSettings(bits=4)),  # rounds to nearest, with a warning
    "balanced": ("llama", QuantizeSettings(bits=3, recipe="balanced", lm_head=True, **CALIBRATED)),
    "best": ("qwen3", QuantizeSettings(bits=2, recipe="best", **CALIBRATED)),
    "mixed": (
        "llama", QuantizeSettings(bits=2, recipe="best", bpw=3.4, lm_head=True, **CALIBRATED)
    ),
    "learned": ("mistral", QuantizeSettings(recipe="learned", lm_head=True, **CALIBRATED)),
    "int": ("llama", QuantizeSettings(bits=4, table="int", recipe="nf")),
}  # fmt: skip
TOKENS = 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("serve")
    found = {}
    for name, (family, settings) in CASES.items():
        folder = root / name.replace(" ", "_")
        changes = {"vocab_size": 4096} if settings.samples else {}
        write_tiny_model(folder / "dense", family, **changes)
        for file in ("tokenizer.json", "tokenizer_config.json") if settings.samples else ():
            shutil.copyfile(MODEL / file, folder / "dense" / file)
        quantize_checkpoint(folder / "dense", folder / "quantized", settings)
        found[name] = folder
    return found


@pytest.fixture(scope="module")
def answers(folders) -> dict[str, dict]:
    jobs = [
        {"model": str(folder / "quantized"), "prompts": PROMPTS, "tokens": TOKENS}
        for folder in folders.values()
    ]
    return dict(zip(folders, run_jobs(jobs), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_served_answers_are_those_of_the_twin(name, folders, answers, tmp_path):
    assert "error" not in answers[name], answers[name].get("error")
    dequantize_checkpoint(folders[name] / "quantized", tmp_path / "twin")
    expected = greedy_with_transformers(tmp_path / "twin", tokens=TOKENS)
    for found, wanted in zip(answers[name]["outputs"], expected, strict=True):
        assert found["tokens"] == wanted["tokens"]
        assert found["logprobs"] == pytest.approx(wanted["logprobs"], abs=2e-3)


def test_mixed_bits_have_every_kind_of_layer(folders):
    checkpoint = Checkpoint(folders["mixed"] / "quantized")
    config = validate_checkpoint(checkpoint)
    modules = [n.removesuffix(".qweight") for n in checkpoint.tensors if n.endswith(".qweight")]
    specs = [config.spec_for(module) for module in modules]
    assert {spec.table_kind for spec in specs} == {"scalar", "pair"}
    assert len({spec.bits for spec in specs}) > 1
    assert len({spec.group_size for spec in specs}) > 1


def test_experts_stay_dense_and_attention_does_not(folders):
    checkpoint = Checkpoint(folders["mixtral"] / "quantized")
    config = validate_checkpoint(checkpoint)
    assert "model.layers.1.self_attn.q_proj.qweight" in checkpoint.tensors
    assert any(".experts." in name for name in checkpoint.tensors)
    assert not any("experts" in name and "qweight" in name for name in checkpoint.tensors)
    assert config.is_skipped("model.layers.0.block_sparse_moe.experts.0.w1")


def test_perplexity_and_kl_through_vllm_are_those_of_transformers(tmp_path):
    """The same windows; float32 on both sides. In a process of its own, as engines are."""
    quantize_checkpoint(MODEL, tmp_path / "out", QuantizeSettings(bits=3, recipe="nf"))
    text = tmp_path / "text.py"
    text.write_text(Path(shutil.__file__).read_text()[:3000])
    found = {}
    for engine in ("transformers", "vllm"):
        command = [
            sys.executable, "-m", "flute_vllm.cli", "eval", str(tmp_path / "out"), str(text),
            "--window", "256", "--engine", engine, "--json", "--reference", str(MODEL),
            "--top", "0",
        ]  # fmt: skip
        environment = {**os.environ, **LIGHT_ENVIRONMENT, "PYTHONPATH": str(ROOT)}
        environment["VLLM_CPU_KVCACHE_SPACE"] = "1"
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found[engine] = json.loads(done.stdout[done.stdout.index("{") :])
    assert found["vllm"]["tokens"] == found["transformers"]["tokens"]
    # vLLM computes in the model's bfloat16, transformers in float32.
    assert found["vllm"]["perplexity"] == pytest.approx(
        found["transformers"]["perplexity"], rel=0.02
    )
    assert found["vllm"]["kl"] == pytest.approx(found["transformers"]["kl"], rel=0.1)
    agreement = found["transformers"]["top1_agreement"]
    assert found["vllm"]["top1_agreement"] == pytest.approx(agreement, abs=0.03)
    assert "KL over the whole vocabulary" in found["vllm"]["protocol"]
