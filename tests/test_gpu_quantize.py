"""Recipes on a GPU: as good as on the CPU, the same bytes after a stop, and loadable.

Measured on the first two blocks of the bundled model: recipes work block by block, so more of
them show nothing new and take the CPU's half of the comparison most of this file's time. The
whole model goes through every recipe in test_gpu_recipes.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import flute_vllm  # noqa: F401 - registers the quantizer for transformers
from flute_vllm.checkpoint import Checkpoint
from flute_vllm.quantize.model import Callbacks, quantize_checkpoint
from flute_vllm.quantize.plan import QuantizeSettings
from flute_vllm.validate import validate_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MODEL = Path(__file__).resolve().parents[1] / "examples" / "stdlib_model" / "model"
SMALL = {"samples": 16, "length": 256}
BLOCKS = 2


@pytest.fixture(scope="module")
def few_blocks(tmp_path_factory) -> Path:
    """The bundled model with its first blocks only: trained weights, a third of the work."""
    folder = tmp_path_factory.mktemp("few") / "dense"
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((MODEL / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": BLOCKS}))
    (source,) = MODEL.glob("*.safetensors")
    kept = {
        name: tensor
        for name, tensor in load_file(source).items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < BLOCKS
    }
    save_file(kept, folder / source.name, {"format": "pt"})
    return folder


@pytest.mark.parametrize("recipe", ["nf", "fast", "balanced", "best", "learned"])
def test_as_good_as_on_the_cpu(recipe, few_blocks, tmp_path):
    reports = {}
    for device in ("cpu", "cuda"):
        settings = QuantizeSettings(bits=3, recipe=recipe, device=device, **SMALL)
        reports[device] = quantize_checkpoint(few_blocks, tmp_path / device, settings)
        validate_checkpoint(Checkpoint(tmp_path / device))
    for field in ("mean_error", "mean_output_error"):
        cpu, gpu = (reports[device]["totals"][field] for device in ("cpu", "cuda"))
        assert (cpu is None) == (gpu is None)
        if cpu is not None:
            assert gpu == pytest.approx(cpu, rel=0.05)


def test_a_stopped_run_ends_with_the_same_bytes(few_blocks, tmp_path):
    settings = QuantizeSettings(bits=3, recipe="best", device="cuda", **SMALL)
    quantize_checkpoint(few_blocks, tmp_path / "whole", settings)

    def stop(report, unit) -> None:
        if unit.name == f"model.layers.{BLOCKS - 1}":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(few_blocks, tmp_path / "out", settings, Callbacks(on_module=stop))
    quantize_checkpoint(few_blocks, tmp_path / "out", settings)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_transformers_on_the_gpu_gives_the_answers_of_the_cpu(few_blocks, tmp_path):
    from transformers import AutoModelForCausalLM

    quantize_checkpoint(few_blocks, tmp_path / "out", QuantizeSettings(bits=4))
    ids = torch.arange(5, 45)[None]
    logits = []
    for device in ("cpu", "cuda"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        with torch.no_grad():
            logits.append(model.to(device)(ids.to(device)).logits.cpu())
    assert torch.allclose(*logits, rtol=1e-2, atol=1e-2)
