"""A real ``vllm serve`` of an unchanged upstream checkpoint, asked over HTTP."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("vllm")
import httpx  # noqa: E402
from engine import LIGHT_ENVIRONMENT  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from demo import vllm_server  # noqa: E402

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    flags = ["--quantization", "flute", "--dtype", "float32", "--skip-tokenizer-init"]
    logprobs = ["--max-logprobs", "-1", "--logprobs-mode", "raw_logits"]
    os.environ.update(LIGHT_ENVIRONMENT)
    with vllm_server(DATA / "ckpt_w4", log, extra_arguments=[*flags, *logprobs]) as address:
        yield address


def test_logits_and_greedy_tokens_over_http(url):
    reference = load_file(DATA / "ref_w4.safetensors")
    greedy = reference["greedy_prompt8_plus32"].tolist()
    request = {
        "model": "demo", "prompt": greedy[:8], "max_tokens": 32, "temperature": 0,
        "ignore_eos": True, "return_token_ids": True, "detokenize": False,
    }  # fmt: skip
    answer = httpx.post(f"{url}/v1/completions", json=request, timeout=120).raise_for_status()
    assert answer.json()["choices"][0]["token_ids"] == greedy[8:]

    ids = reference["input_ids"].tolist()
    request |= {"prompt": ids, "max_tokens": 1, "prompt_logprobs": 512}
    answer = httpx.post(f"{url}/v1/completions", json=request, timeout=120).raise_for_status()
    steps = answer.json()["choices"][0]["prompt_logprobs"]
    logits = reference["logits_fp32"]
    compared = 0
    for position, step in enumerate(steps[1:]):
        found = torch.full((512,), float("nan"))
        for token, entry in step.items():
            found[int(token)] = entry["logprob"]
        assert (found - logits[position]).abs().max() <= 1e-3  # also false for a NaN
        compared += 1
    assert compared == len(ids) - 1
