"""The bundled model: small enough to ship, good enough to measure, and writing valid Python."""

from __future__ import annotations

import ast
import json
import logging
import sys
from pathlib import Path

import pytest
import torch

from flute_vllm.errors import FluteError
from flute_vllm.evaluate import load_model

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "stdlib_model"
FOLDER = EXAMPLE / "model"
MEASURED = ("multiprocessing/sharedctypes.py", "sched.py", "turtledemo/penrose.py")  # short ones
sys.path.insert(0, str(EXAMPLE))

from heldout import evaluate_heldout, load_heldout  # noqa: E402


@pytest.fixture(scope="module")
def loaded():
    return load_model(FOLDER)


@pytest.fixture(scope="module")
def metrics() -> dict:
    return json.loads((EXAMPLE / "metrics.json").read_text())


def test_files_and_size():
    names = {path.name for path in FOLDER.iterdir()}
    assert names >= {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja", "README.md",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 12_000_000


def test_geometry(loaded, metrics):
    model, tokenizer = loaded
    assert sum(p.numel() for p in model.parameters()) == metrics["parameters"]
    assert len(tokenizer) == model.config.vocab_size == 4096
    assert model.config.tie_word_embeddings
    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.in_features % (4 * 64) == 0, name


def test_heldout_perplexity(loaded, metrics):
    heldout = load_heldout(paths=MEASURED)
    result = evaluate_heldout(*loaded, heldout.texts)
    recorded = metrics["heldout_files"]
    for path, found in result["files"].items():
        assert 2 < found["ppl"] < 30
        if path not in heldout.changed:
            assert found["tokens"] == recorded[path]["tokens"]
            assert found["ppl"] == pytest.approx(recorded[path]["ppl"], rel=0.01)


def test_changed_library_warns_once(tmp_path, caplog):
    for name in ("sched.py", "opcode.py"):
        (tmp_path / name).write_text("another = 'version'\n")
    with caplog.at_level(logging.WARNING):
        heldout = load_heldout(tmp_path, ["sched.py", "opcode.py"])
    assert heldout.changed == ["sched.py", "opcode.py"]
    assert len(caplog.records) == 1
    assert "not comparable" in caplog.text


def test_missing_library_file(tmp_path):
    with pytest.raises(FluteError, match="held-out text missing"):
        load_heldout(tmp_path, ["sched.py"])


@pytest.mark.parametrize(
    "prompt",
    ["def read_file(filename):\n", "def load(filename):\n    with open(filename) as f:\n"],
)
def test_greedy_function_parses(loaded, prompt):
    model, tokenizer = loaded
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False
    )
    text = tokenizer.decode(out[0], skip_special_tokens=True)
    assert text.startswith(prompt)
    lines = text.splitlines()
    end = next(n for n, line in enumerate(lines) if n and line[:1].strip())  # column 0 again
    (function,) = ast.parse("\n".join(lines[:end])).body
    assert isinstance(function, ast.FunctionDef)
    assert isinstance(function.body[-1], ast.Return)


def test_text_survives_tokenizer(loaded):
    text = 'class A:\n\n    def f(self, x=0x1F):\n\treturn "é\\n"  # 日本\n\n\n'
    ids = loaded[1](text)["input_ids"]
    assert ids[0] == loaded[1].bos_token_id
    assert loaded[1].decode(ids, skip_special_tokens=True) == text


def test_chat_template(loaded):
    messages = [{"role": "user", "content": "add\ntwo"}, {"role": "assistant", "content": "a + b"}]
    text = loaded[1].apply_chat_template(messages, tokenize=False)
    assert text == "<|begin|># add\n# two\na + b\n\n"
