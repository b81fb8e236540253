"""Real vLLM engines on the CPU against transformers on the dense twin, float32, greedy.

All single-process jobs run in one engine process (see engine.py), so the first test of this file
waits for all of them.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm")
from engine import run_jobs, tensor_parallel_environment  # noqa: E402
from lora import merge, write_adapter  # noqa: E402
from native_writer import write_native  # noqa: E402
from tiny_models import PROMPTS, greedy_with_transformers, write_tiny_model  # noqa: E402
from zoo_writer import random_table, write_zoo_checkpoint  # noqa: E402

from flute_vllm.format import LayerSpec  # noqa: E402

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1500)]

ZOO = Path(__file__).parent / "data" / "ckpt_w4"
# Between them: all bits, all kinds of groups, both scale dtypes, fused on disk, biases, tied heads.
NATIVE_SPECS = {
    "llama": LayerSpec(4, 32),
    "llama_bias": LayerSpec(3, 64, "float16"),
    "gemma2": LayerSpec(4, 64, "float16"),
    "qwen2": LayerSpec(2, 32),
    "mistral": LayerSpec(4, -1),
    "phi3": LayerSpec(3, 128),
    "mixed": LayerSpec(4, 256),
}
MIXED_FIELDS = {
    "overrides": {"re:.*down_proj": {"bits": 3, "group_size": 64}, "o_proj": {"bits": 2}},
    "modules_to_not_convert": ["lm_head", "model.layers.1.self_attn"],
}
# The head is quantized, too, and its rows are no multiple of the 64 to which vLLM pads them.
HEAD_MODEL, HEAD_FIELDS, HEAD_GEOMETRY = (
    "llama",
    {"modules_to_not_convert": []},
    {"vocab_size": 500},
)
# A 2-bit file of tile 64 as FLUTE 0.4 writes it does not tell its tile: it must be found out.
ZOO_SPECS = {
    "zoo_w4_tables": {
        "bits": 4,
        "tables": {
            f"{name}_proj": random_table(4, seed)
            for seed, name in enumerate(("q", "k", "v", "gate", "up"))
        },
    },
    "zoo_w3": {"bits": 3, "dtype": torch.bfloat16},
    "zoo_w2_t64": {
        "bits": 2,
        "group_size": 32,
        "tile_p": 64,
        "flute_config": {"version": "0.4.2", "num_bits": 2, "group_size": 32},
    },
}
ZOO_GEOMETRY = {
    "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8,
    "num_key_value_heads": 8, "head_dim": 64,
}  # fmt: skip


def zoo_geometry(name: str) -> dict:
    # Tied, but for the one that is reloaded: vLLM's CPU head keeps a packed copy of a tied
    # embedding, which its reload does not renew.
    return {**ZOO_GEOMETRY, "tie_word_embeddings": name != "zoo_w4_tables"}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Folders by name; ``<name>/twin`` is the dense equivalent of ``<name>/quantized``."""
    root = tmp_path_factory.mktemp("models")
    folders = {}
    for seed, (name, spec) in enumerate(NATIVE_SPECS.items()):
        folder = root / name
        architecture = "llama" if name == "mixed" else name
        geometry = HEAD_GEOMETRY if name == HEAD_MODEL else {}
        write_tiny_model(folder / "dense", architecture, seed, **geometry)
        fields = {"mixed": MIXED_FIELDS, HEAD_MODEL: HEAD_FIELDS}.get(name, {})
        write_native(folder / "dense", folder / "quantized", spec, folder / "twin", **fields)
        folders[name] = folder
    for seed, (name, options) in enumerate(ZOO_SPECS.items()):
        folder = root / name
        write_tiny_model(folder / "dense", "llama", 100 + seed, **zoo_geometry(name))
        source = load_file(folder / "dense" / "model.safetensors")
        config = json.loads((folder / "dense" / "config.json").read_text())
        twin = write_zoo_checkpoint(folder / "quantized", source, config=config, **options)
        (folder / "twin").mkdir()
        save_file(twin, folder / "twin" / "model.safetensors", metadata={"format": "pt"})
        (folder / "twin" / "config.json").write_text(json.dumps(config))
        folders[name] = folder
    return folders


def job(models: dict[str, Path], name: str, **fields) -> dict:
    engine = fields.pop("engine", {})
    if name.startswith("zoo"):
        engine = {"quantization": "flute", **engine}
    return {
        "model": str(models[name] / "quantized"),
        "prompts": PROMPTS,
        "engine": engine,
        **fields,
    }


@pytest.fixture(scope="module")
def adapter(models) -> Path:
    """A LoRA adapter of rank 8 for the llama model, in PEFT's layout."""
    weights = load_file(models["llama"] / "twin" / "model.safetensors")
    return write_adapter(weights, models["llama"] / "adapter")


@pytest.fixture(scope="module")
def broken(models) -> Path:
    """The llama checkpoint without the scales of one module."""
    folder = models["llama"] / "broken"
    folder.mkdir()
    source = models["llama"] / "quantized"
    tensors = load_file(source / "model.safetensors")
    tensors.pop("model.layers.1.mlp.down_proj.scales")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder


@pytest.fixture(scope="module")
def reloads(models) -> dict[str, Path]:
    """Copies of two checkpoints; ``other`` holds weights of the same shapes from another seed."""
    folders = {}
    for name in ("llama", "zoo_w4_tables"):
        folder = models[name] / "reload"
        shutil.copytree(models[name] / "quantized", folder)
        geometry = zoo_geometry(name) if name.startswith("zoo") else HEAD_GEOMETRY
        source = write_tiny_model(models[name] / "dense2", "llama", 77, **geometry)
        if name == HEAD_MODEL:
            spec = NATIVE_SPECS[name]
            write_native(source, folder / "other", spec, folder / "twin", **HEAD_FIELDS)
        else:
            state = load_file(source / "model.safetensors")
            config = json.loads((source / "config.json").read_text())
            twin = write_zoo_checkpoint(folder / "other", state, config=config, **ZOO_SPECS[name])
            (folder / "twin").mkdir()
            save_file(twin, folder / "twin" / "model.safetensors", metadata={"format": "pt"})
            (folder / "twin" / "config.json").write_text(json.dumps(config))
        folders[name] = folder
    return folders


@pytest.fixture(scope="module")
def incomplete(models) -> Path:
    """The llama checkpoint without its last norm, which is no part of a quantized layer."""
    folder = models["llama"] / "incomplete"
    folder.mkdir()
    source = models["llama"] / "quantized"
    tensors = load_file(source / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder


@pytest.fixture(scope="module")
def single(models, adapter, broken, incomplete, reloads) -> dict[str, dict]:
    """Results of every job that needs one process."""
    jobs = {name: job(models, name) for name in models}
    for name, folder in reloads.items():
        jobs[f"{name} reloaded"] = {
            **job(models, name), "model": str(folder), "reload_from": str(folder / "other"),
        }  # fmt: skip
    lora = {"enable_lora": True, "max_lora_rank": 8}
    jobs["lora"] = job(models, "llama", engine=lora, lora=str(adapter))
    jobs["fp16 as bf16"] = job(models, "llama_bias", engine={"dtype": "bfloat16"})
    jobs["bf16 as fp16"] = job(models, "mistral", engine={"dtype": "float16"})
    jobs["dummy"] = job(models, "phi3", engine={"load_format": "dummy"})
    jobs["zoo file"] = {
        "model": str(ZOO), "prompts": PROMPTS, "engine": {"quantization": "flute"},
    }  # fmt: skip
    jobs["broken"] = {"model": str(broken), "prompts": PROMPTS}
    jobs["incomplete"] = {"model": str(incomplete), "prompts": PROMPTS}
    jobs["other flag"] = job(models, "llama", engine={"quantization": "gptq"})
    return dict(zip(jobs, run_jobs(list(jobs.values())), strict=True))


def assert_equal_answers(answers: list[dict], expected: list[dict], tolerance: float) -> None:
    for answer, reference in zip(answers, expected, strict=True):
        assert answer["tokens"] == reference["tokens"]
        for found, wanted in zip(answer["logprobs"], reference["logprobs"], strict=True):
            assert abs(found - wanted) <= tolerance


def outputs(result: dict) -> list[dict]:
    assert "error" not in result, result["error"]
    return result["outputs"]


@pytest.mark.parametrize("name", [*NATIVE_SPECS, *ZOO_SPECS])
def test_answers_equal_transformers_on_the_dense_twin(single, models, name):
    expected = greedy_with_transformers(models[name] / "twin")
    assert_equal_answers(outputs(single[name]), expected, tolerance=1e-3)


@pytest.mark.parametrize("name", ["llama", "zoo_w4_tables"])
def test_reloaded_weights_give_the_answers_of_the_new_ones(single, reloads, name):
    result = single[f"{name} reloaded"]
    assert outputs(result) == outputs(single[name])
    expected = greedy_with_transformers(reloads[name] / "twin")
    assert_equal_answers(result["after_reload"], expected, tolerance=1e-3)


def test_lora_over_quantized_linears_equals_merged_weights(single, models, adapter, tmp_path):
    weights = load_file(models["llama"] / "twin" / "model.safetensors")
    merged = merge(weights, adapter)
    save_file(merged, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((models["llama"] / "twin/config.json").read_bytes())
    expected = greedy_with_transformers(tmp_path)
    assert expected != greedy_with_transformers(models["llama"] / "twin")
    assert_equal_answers(outputs(single["lora"]), expected, tolerance=1e-3)


@pytest.mark.parametrize(
    ("name", "model"), [("fp16 as bf16", "llama_bias"), ("bf16 as fp16", "mistral")]
)
def test_activations_of_the_other_16_bit_dtype(single, models, name, model):
    """16-bit activations may part from the float32 tokens later; the first ones must not."""
    reference = outputs(single[model])
    for answer, wanted in zip(outputs(single[name]), reference, strict=True):
        assert answer["tokens"][0] == wanted["tokens"][0]
        assert abs(answer["logprobs"][0] - wanted["logprobs"][0]) < 0.3


def test_dummy_weights_generate(single):
    assert all(len(answer["tokens"]) == 24 for answer in outputs(single["dummy"]))


def test_missing_tensor_stops_the_engine_and_is_named(single):
    error = single["broken"]["error"]
    assert "flute: missing tensor" in error
    assert "model.layers.1.mlp.down_proj" in error
    assert "scales" in error


def test_missing_dense_tensor_stops_the_engine_and_is_named(single):
    error = single["incomplete"]["error"]
    assert "flute: missing tensor" in error
    assert "model.norm.weight" in error


def test_contradicting_quantization_flag_is_refused(single):
    assert "does not match" in single["other flag"]["error"]


@pytest.fixture(scope="module")
def ranks_results(models) -> Callable[[int], dict[str, dict]]:
    """Results of the jobs at a number of ranks; those of one number share a process, one engine
    after another."""

    @functools.cache
    def results(ranks: int) -> dict[str, dict]:
        engine = {"tensor_parallel_size": ranks}
        zoo = {"quantization": "flute", **engine}
        jobs = {
            "llama": job(models, "llama", engine=engine),
            "zoo file": {"model": str(ZOO), "prompts": PROMPTS, "engine": zoo},
        }
        if ranks == 2:
            jobs["zoo_w4_tables"] = job(models, "zoo_w4_tables", engine=engine)
        found = run_jobs(list(jobs.values()), tensor_parallel_environment(ranks))
        return dict(zip(jobs, found, strict=True))

    return results


@pytest.mark.parametrize("ranks", [2, 4])
def test_tensor_parallel_answers_equal_one_rank(single, ranks_results, ranks):
    for name in ("llama", "zoo file"):
        answers = outputs(ranks_results(ranks)[name])
        assert_equal_answers(answers, outputs(single[name]), tolerance=1e-4)


def test_zoo_with_different_tables_on_two_ranks(single, ranks_results):
    answers = outputs(ranks_results(2)["zoo_w4_tables"])
    assert_equal_answers(answers, outputs(single["zoo_w4_tables"]), tolerance=1e-4)


def test_compiled_pipeline_of_two_stages(single, models):
    """vLLM's CPU build runs pipelines only in compiled mode, so this covers torch.compile too."""
    staged = job(
        models, "llama", engine={"pipeline_parallel_size": 2, "enforce_eager": False}, tokens=24
    )
    environment = {
        **tensor_parallel_environment(2),
        "TORCHDYNAMO_DISABLE": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }
    (result,) = run_jobs([staged], environment)
    assert_equal_answers(outputs(result), outputs(single["llama"]), tolerance=1e-4)
