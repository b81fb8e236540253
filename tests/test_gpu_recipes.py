"""Every recipe on a GPU, from the dense model to answers of vLLM there.

Quantized on the GPU, served on the GPU, compared with transformers' float32 twin on the CPU up to
the first near tie, in the tolerance of test_gpu_vllm.py for bf16. The CPU's counterpart, with
more families of models, is test_quantize_serve.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

vllm = pytest.importorskip("vllm")
from agreement import assert_agrees_with_model  # noqa: E402
from engine import run_jobs  # noqa: E402

from flute_vllm.checkpoint import Checkpoint  # noqa: E402
from flute_vllm.evaluate import load_model  # noqa: E402
from flute_vllm.quantize.codebooks import gaussian_lloyd  # noqa: E402
from flute_vllm.quantize.model import quantize_checkpoint  # noqa: E402
from flute_vllm.quantize.plan import QuantizeSettings  # noqa: E402
from flute_vllm.validate import validate_checkpoint  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MODEL = Path(__file__).resolve().parents[1] / "examples" / "stdlib_model" / "model"
SMALL = {"samples": 8, "length": 256}  # what is served must be right, not good
# Each bit width with a recipe that moves codes and tables, each kind of table that a user gives.
CASES: dict[str, dict] = {
    "nf": {"bits": 4, "recipe": "nf"},
    "fast": {"bits": 3, "recipe": "fast"},
    "balanced": {"bits": 4, "recipe": "balanced", **SMALL},
    "best": {"bits": 2, "recipe": "best", **SMALL},
    "learned": {"bits": 4, "recipe": "learned", **SMALL},
    "int": {"bits": 4, "recipe": "fast", "table": "int"},
    "fp4": {"bits": 4, "recipe": "fast", "table": "fp"},
    "own table": {"bits": 3, "recipe": "balanced", **SMALL},
}
PROMPTS = ("def walk(path):\n    for name in os.listdir(path):\n", "import os\n\n")
TOKENS = 24
ENGINE = {"dtype": "bfloat16"}  # the rest as tests/engine.py has it: eager


def quantize_all(root: Path, device: str) -> dict[str, Path]:
    """Folders by case; the table of "own table" is one that no recipe ships."""
    values = gaussian_lloyd(3).tolist()
    (root / "table.json").write_text(json.dumps({"bits": 3, "values": values}))
    folders = {}
    for name, chosen in CASES.items():
        folders[name] = root / name.replace(" ", "_")
        table = {"table": str(root / "table.json")} if name == "own table" else {}
        settings = QuantizeSettings(device=device, **chosen, **table)
        quantize_checkpoint(MODEL, folders[name], settings)
    return folders


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROMPTS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return quantize_all(tmp_path_factory.mktemp("recipes"), "cuda")


@pytest.fixture(scope="module")
def answers(folders, prompts) -> dict[str, dict]:
    """One process, one engine after another: vLLM's import is most of a small engine's start."""
    jobs = [
        {"model": str(folder), "prompts": prompts, "tokens": TOKENS, "engine": ENGINE}
        for folder in folders.values()
    ]
    return dict(zip(folders, run_jobs(jobs, timeout=400), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_served_on_the_gpu(name, folders, answers, prompts):
    validate_checkpoint(Checkpoint(folders[name]))
    assert "error" not in answers[name], answers[name].get("error")
    twin, _ = load_model(folders[name])
    for answer, prompt in zip(answers[name]["outputs"], prompts, strict=True):
        assert len(answer["tokens"]) == TOKENS
        assert_agrees_with_model(answer, prompt, twin)
