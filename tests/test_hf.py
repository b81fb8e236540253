"""transformers loads native folders: the same answers as from the dense twin."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from native_writer import write_native
from tiny_models import ARCHITECTURES, PROMPTS, write_tiny_model

import flute_vllm  # noqa: F401 - registers the quantizer
from flute_vllm.errors import FluteError
from flute_vllm.evaluate import load_twin
from flute_vllm.format import LayerSpec
from flute_vllm.hf_quantizer import FluteLinear

ROOT = Path(__file__).resolve().parents[1]
SPECS = {
    "llama": LayerSpec(4, 32), "llama_bias": LayerSpec(3, 64, "float16"),
    "gemma2": LayerSpec(2, 64), "qwen2": LayerSpec(3, 32), "mistral": LayerSpec(4, -1),
    "phi3": LayerSpec(3, 128),
}  # fmt: skip
WITH_HEAD = ("llama", "phi3")


@pytest.mark.parametrize("architecture", SPECS)
def test_logits_are_those_of_the_dense_twin(architecture, tmp_path):
    from transformers import AutoModelForCausalLM

    assert set(SPECS) <= set(ARCHITECTURES)
    dense = write_tiny_model(tmp_path / "dense", architecture)
    fields = {"modules_to_not_convert": []} if architecture in WITH_HEAD else {}
    folder = write_native(dense, tmp_path / "native", SPECS[architecture], **fields)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers = [m for m in model.modules() if isinstance(m, FluteLinear)]
    assert (model.lm_head in layers) == (architecture in WITH_HEAD)
    assert layers
    assert all(m.scales.dtype == SPECS[architecture].torch_scale_dtype for m in layers)
    twin = load_twin(folder)
    ids = torch.tensor([PROMPTS[2]])
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, twin(ids).logits, rtol=1e-3, atol=1e-3)
        answer = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert answer.shape[1] == ids.shape[1] + 4


def test_saved_again_it_is_the_same(tmp_path):
    from transformers import AutoModelForCausalLM

    dense = write_tiny_model(tmp_path / "dense", "llama")
    spec, fields = LayerSpec(4, 64), {"modules_to_not_convert": []}
    folder = write_native(dense, tmp_path / "native", spec, **fields)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    for (name, one), (_, two) in zip(
        model.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert torch.equal(one, two), name


@pytest.mark.parametrize(
    "imports", ["import flute_vllm, transformers", "import transformers, flute_vllm",
                "import transformers.quantizers.auto, flute_vllm"]
)  # fmt: skip
def test_registered_whatever_is_imported_first(imports):
    program = (
        f"{imports}\nfrom transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as found\n"
        "import inspect, transformers.quantizers.auto as auto\n"
        "assert 'flute' in found and 'register_quantizer' in inspect.getsource(auto)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


def test_missing_tensors_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    dense = write_tiny_model(tmp_path / "dense", "llama")
    folder = write_native(dense, tmp_path / "native", LayerSpec(4, 64))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.scales"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FluteError, match="model.layers.0.mlp.up_proj.scales"):
        AutoModelForCausalLM.from_pretrained(folder)
