"""What vLLM offers beyond plain serving, on GPUs, each shown to give the plain answers.

Graphs and compilation alone and together, reload_weights, both sleep levels, LoRA, prefix caching,
chunked prefill, ngram speculation, and the model spread over two GPUs and over four. Engines of all
groups start at once (feature_jobs.py), so the first test waits for them; an engine that fails costs
its own tests only.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")
import feature_jobs  # noqa: E402
from agreement import TOLERANCE, assert_agrees_with_model, assert_answers_agree  # noqa: E402
from engine import run_groups  # noqa: E402
from lora import merge  # noqa: E402

from flute_vllm.convert import dense_state_dict  # noqa: E402
from flute_vllm.evaluate import load_model, load_twin  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
needs_four = pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four CUDA devices")
LIMIT_S = 220  # of each process, below that of the step in benchmarks/gpu_serving.py
ZOO_TOLERANCE = 0.03  # float16, random weights


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    return feature_jobs.write_models(tmp_path_factory.mktemp("features"))


def run(groups: feature_jobs.Groups) -> dict[str, dict]:
    """Results by the name of the job."""
    lists = {name: (list(jobs.values()), environment)
             for name, (jobs, environment) in groups.items()}  # fmt: skip
    found = run_groups(lists, LIMIT_S)
    return {
        name: result
        for group, (jobs, _) in groups.items()
        for name, result in zip(jobs, found[group], strict=True)
    }


@pytest.fixture(scope="module")
def single(models, tmp_path_factory) -> dict[str, dict]:
    return run(feature_jobs.one_gpu(models, tmp_path_factory.mktemp("one")))


@pytest.fixture(scope="module")
def spread(models) -> dict[str, dict]:
    return run(feature_jobs.two_gpus(models))


@pytest.fixture(scope="module")
def spread_by_four(models) -> dict[str, dict]:
    return run(feature_jobs.four_gpus(models))


def outputs(result: dict) -> list[dict]:
    assert "outputs" in result, result["error"]
    return result["outputs"]


def after(result: dict, step: str) -> list[dict]:
    assert step in result.get("after", {}), result.get("error", f"no step {step}")
    return result["after"][step]


def assert_same(
    found: list[dict], results: dict, model: str, record_property, widths: int = 1
) -> None:
    """Agreement with the plain eager engine on one GPU; how close goes into the report.

    ``widths``: of the tolerance. Two engines that were each shown to be one from the float32 twin
    are at most two apart.
    """
    tolerance = widths * (ZOO_TOLERANCE if model == "zoo" else TOLERANCE)
    limits = {"tie": 2 * ZOO_TOLERANCE} if model == "zoo" else {}
    limits["tolerance"] = tolerance
    closeness = assert_answers_agree(found, outputs(results[model]), **limits)
    for key, value in closeness.items():
        record_property(key, value)


def assert_near_the_twin(found: list[dict], models: dict[str, Path], name: str) -> None:
    if name == "zoo":
        (answer,), (prompt,) = found, feature_jobs.zoo_prompts()
        twin = load_twin(models["zoo"])
        assert_agrees_with_model(answer, prompt, twin, ZOO_TOLERANCE, 2 * ZOO_TOLERANCE)
        return
    model, _ = load_model(models[name])
    for answer, prompt in zip(found, feature_jobs.token_prompts(), strict=True):
        assert_agrees_with_model(answer, prompt, model)


@pytest.mark.parametrize("name", ["w4", "pairs", "zoo"])
def test_plain_engine_gives_the_answers_of_the_twin(single, models, name):
    assert_near_the_twin(outputs(single[name]), models, name)


@pytest.mark.parametrize("name", ["compiled", "graphs alone", "sleep, graphs", "sleep, eager"])
def test_execution_modes_give_the_plain_answers(single, name, record_property):
    assert_same(outputs(single[name]), single, "w4", record_property)


def test_zoo_with_graphs_gives_the_plain_answers_also_reloaded(single, record_property):
    assert_same(outputs(single["zoo, graphs"]), single, "zoo", record_property)
    assert_same(after(single["zoo, graphs"], "reload"), single, "zoo", record_property)


@pytest.mark.parametrize("engine", ["sleep, eager", "sleep, graphs"])
@pytest.mark.parametrize("step", ["reload", "sleep 1", "sleep 2"])
def test_weights_come_back(single, engine, step, record_property):
    assert_same(after(single[engine], step), single, "w4", record_property)


@pytest.mark.parametrize("engine", ["sleep, eager", "sleep, graphs"])
def test_reload_brings_other_weights(single, models, engine):
    answers = after(single[engine], "reload from")
    plain = outputs(single["w4"])
    assert [a["tokens"] for a in answers] != [a["tokens"] for a in plain]
    model, _ = load_model(models["other"])
    for answer, prompt in zip(answers, feature_jobs.token_prompts(), strict=True):
        assert_agrees_with_model(answer, prompt, model)


@pytest.mark.parametrize("engine", ["prefix caching", "sleep, eager", "sleep, graphs"])
def test_cached_prefixes_give_the_plain_answers(single, engine, record_property):
    again = after(single[engine], "again")
    assert again[0]["cached"] > 0, "the prompt was asked before, and nothing of it was cached"
    assert_same(again, single, "w4", record_property)


def test_chunked_prefill_gives_the_plain_answers(single, record_property):
    assert_same(outputs(single["chunked prefill"]), single, "w4", record_property)


def test_ngram_speculation_gives_the_plain_answers(single, models, record_property):
    result = single["ngram"]
    assert_near_the_twin(outputs(result), models, "w4")
    assert_same(outputs(result), single, "w4", record_property, widths=2)
    for name in ("drafts", "accepted_tokens"):
        count = result["metrics"][f"vllm:spec_decode_num_{name}"]
        record_property(name, count)
        assert count > 0


def test_lora_equals_merged_weights(single, models):
    answers = outputs(single["lora"])
    assert [a["tokens"] for a in answers] != [a["tokens"] for a in outputs(single["w4"])]
    model, _ = load_model(models["w4"])
    weights = dict(dense_state_dict(models["w4"])[1])
    model.load_state_dict(merge(weights, models["adapter"]), strict=False)
    for answer, prompt in zip(answers, feature_jobs.token_prompts(), strict=True):
        assert_agrees_with_model(answer, prompt, model)


@needs_two
@pytest.mark.parametrize(
    "name",
    [
        "w4 tp2", "pairs tp2", "zoo tp2", "w4 tp2, graphs", "zoo tp2, graphs",
        "w4 pp2", "zoo pp2", "w4 pp2, graphs",
    ],
)  # fmt: skip
def test_two_gpus_give_the_answers_of_one(spread, models, name, record_property):
    model = name.partition(" ")[0]
    assert_near_the_twin(outputs(spread[name]), models, model)
    assert_same(outputs(spread[name]), spread, model, record_property, widths=2)


@needs_four
@pytest.mark.parametrize(
    "name",
    [
        "w4 tp4", "pairs tp4", "zoo tp4", "w4 tp4, graphs",
        "w4 tp2 pp2", "zoo tp2 pp2", "w4 tp2 pp2, graphs",
    ],
)  # fmt: skip
def test_four_gpus_give_the_answers_of_one(spread_by_four, models, name, record_property):
    """The models of two GPUs as they are: one rank's 64 inputs of o_proj are one group of 64 (two
    of 32), its 192 of down_proj three (six). The bundled model's two key-value heads are repeated
    on two ranks each; the zoo's four are one on each rank.
    """
    model = name.partition(" ")[0]
    assert_near_the_twin(outputs(spread_by_four[name]), models, model)
    assert_same(outputs(spread_by_four[name]), spread_by_four, model, record_property, widths=2)
