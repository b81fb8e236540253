"""vLLM engines on a GPU give the answers of transformers' float32 twin on the CPU.

In 16 bits they agree up to the first near tie (see agreement.py).
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

vllm = pytest.importorskip("vllm")
from agreement import assert_agrees_with_model  # noqa: E402
from engine import run_jobs  # noqa: E402

from flute_vllm.evaluate import load_model, load_twin  # noqa: E402
from flute_vllm.quantize.model import quantize_checkpoint  # noqa: E402
from flute_vllm.quantize.plan import QuantizeSettings  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "stdlib_model" / "model"
ZOO = ROOT / "tests" / "data" / "ckpt_w4"
TOKENS = 32
GRAPHS = {"enforce_eager": False}  # vLLM's defaults: torch.compile and CUDA graphs


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("quantized")
    folders = {}
    for bits in (4, 3, 2):
        folders[f"w{bits}"] = root / f"w{bits}"
        quantize_checkpoint(MODEL, folders[f"w{bits}"], QuantizeSettings(bits, 64))
    return folders


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = Path(sysconfig.get_paths()["stdlib"], "sched.py").read_text()
    short = ["def walk(path):\n    for name in os.listdir(path):\n", "import os\n\n"]
    # The long one prefills more rows than the decode kernel takes.
    return [tokenizer(text[:n], add_special_tokens=False)["input_ids"] for n in (400,)] + [
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in short
    ]


@pytest.mark.parametrize("engine", [{}, GRAPHS], ids=["eager", "compiled with graphs"])
def test_bundled_model_in_bf16(quantized, prompts, engine):
    settings = {"dtype": "bfloat16", **engine}
    jobs = [
        {"model": str(folder), "prompts": prompts, "tokens": TOKENS, "engine": settings}
        for folder in quantized.values()
    ]
    # One engine a process with CUDA graphs: they share a pool, and start-up takes a minute.
    results = run_jobs(jobs[:1], {"TORCHDYNAMO_DISABLE": "0"}) if engine else run_jobs(jobs)
    for folder, result in zip(quantized.values(), results, strict=False):
        assert "error" not in result, result["error"]
        model, _ = load_model(folder)
        for answer, prompt in zip(result["outputs"], prompts, strict=True):
            assert_agrees_with_model(answer, prompt, model)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.02), ("float32", 5e-3)])
def test_zoo_checkpoint_served_and_reloaded(dtype, tolerance):
    """float16 runs the decode kernel, float32 the canonical layout.

    vLLM's attention multiplies float32 in TF32 on a GPU, so 1e-3 as on the CPU is out of reach
    there (1.2e-3 was seen); random weights nearly tie, hence the tie of twice the tolerance.
    """
    greedy = load_file(ZOO.parent / "ref_w4.safetensors")["greedy_prompt8_plus32"].tolist()
    job = {
        "model": str(ZOO), "prompts": [greedy[:8]], "tokens": 32, "reload": True,
        "engine": {"quantization": "flute", "dtype": dtype},
    }  # fmt: skip
    (result,) = run_jobs([job])
    assert "error" not in result, result["error"]
    (answer,) = result["outputs"]
    assert_agrees_with_model(answer, greedy[:8], load_twin(ZOO), tolerance, 2 * tolerance)
    assert result["after_reload"] == result["outputs"]
