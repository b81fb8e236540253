"""What lies beside the weights of an output: the card, and the files that a source brings along."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_models import write_tiny_model

from flute_vllm.convert import convert_checkpoint, dequantize_checkpoint
from flute_vllm.quantize.model import quantize_checkpoint
from flute_vllm.quantize.plan import QuantizeSettings
from flute_vllm.quantize.report import model_name

ZOO = Path(__file__).parent / "data" / "ckpt_w4"
NF = QuantizeSettings(recipe="nf")
COPIED = {
    "tokenizer.json": "{}", "tokenizer.model": "m", "tokenizer.model.v3": "v3",
    "tekken.json": "{}", "vocab.txt": "a b", "chat_template.jinja": "{{ messages }}",
    "LICENSE": "of use", "LICENSE.txt": "of use", "Notice": "of others", "COPYING": "as GNU's",
    "LICENCE-MODEL": "of use", "USE_POLICY.md": "do no harm",
}  # fmt: skip
LEFT = {
    "model.safetensors.index.json.bak": "", "pytorch_model.bin": "", "tokenizer.bin": "",
    "training_args.pt": "", "modeling_x.py": "", "flute_config.json.old": "",
    "pytorch_model.bin.index.json": "{}",
}  # fmt: skip
TEMPLATES = {"tool_use.jinja": "{{ tools }}", "rag.jinja": "{{ documents }}"}


@pytest.fixture
def source(tmp_path) -> Path:
    folder = write_tiny_model(tmp_path / "source", "llama")
    for name, content in {**COPIED, **LEFT}.items():
        (folder / name).write_text(content)
    (folder / "additional_chat_templates").mkdir()
    for name, content in {**TEMPLATES, "notes.txt": "mine"}.items():
        (folder / "additional_chat_templates" / name).write_text(content)
    (folder / "assets").mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Dense\n")
    return folder


def test_licence_and_every_tokenizer_file_are_copied(source, tmp_path):
    quantize_checkpoint(source, tmp_path / "out", NF)
    dequantize_checkpoint(tmp_path / "out", tmp_path / "twin")
    for out in (tmp_path / "out", tmp_path / "twin"):
        for name, content in COPIED.items():
            assert (out / name).read_text() == content
        assert not {path.name for path in out.iterdir()} & {*LEFT, "assets"}
        templates = out / "additional_chat_templates"
        assert {path.name: path.read_text() for path in templates.iterdir()} == TEMPLATES


def test_transformers_finds_the_templates(source, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = Path(__file__).resolve().parents[1] / "examples" / "stdlib_model" / "model"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, source / name)
    for name in ("tokenizer.model", "tokenizer.model.v3", "tekken.json"):
        (source / name).unlink()
    quantize_checkpoint(source, tmp_path / "out", NF)
    found = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert {"tool_use", "rag"} <= set(found)


def test_a_dense_twin_is_not_called_quantized(source, tmp_path):
    quantize_checkpoint(source, tmp_path / "out", NF)
    assert "4 bits" in (tmp_path / "out" / "README.md").read_text()
    dequantize_checkpoint(tmp_path / "out", tmp_path / "twin")
    assert not (tmp_path / "twin" / "README.md").exists()
    # What another tool wrote goes along with what is still quantized.
    zoo = tmp_path / "zoo"
    shutil.copytree(ZOO, zoo)
    (zoo / "README.md").write_text("# Zoo")
    convert_checkpoint(zoo, tmp_path / "native")
    assert (tmp_path / "native" / "README.md").read_text() == "# Zoo"


@pytest.mark.parametrize(
    ("path", "name"),
    [("models--org--My-Model-8B/snapshots/0123abc", "org/My-Model-8B"),
     ("models--gpt2/snapshots/0123abc", "gpt2"), ("models/My-Model-8B", "My-Model-8B"),
     ("My-Model/snapshots/0123abc", "0123abc")],
)  # fmt: skip
def test_a_model_from_the_hub_is_called_by_its_id(path, name, tmp_path):
    assert model_name(tmp_path / path) == name


def test_the_card_has_the_id(source, tmp_path):
    """As the hub's cache has it: a folder of links, named by a hash."""
    folder = tmp_path / "models--org--dense" / "snapshots" / "9f8e"
    folder.mkdir(parents=True)
    for path in source.iterdir():
        (folder / path.name).symlink_to(path)
    quantize_checkpoint(folder, tmp_path / "out", NF)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# org/dense, 4 bits\n" in card
    assert "9f8e" not in card
    assert json.loads((tmp_path / "out" / "report.json").read_text())["totals"]["modules"] == 14
