"""Prefix caching, chunked prefill, speculation and reloading on vLLM's CPU build.

The jobs of the GPU tests (feature_jobs.py) that a CPU can run, so that those jobs are themselves
tested where there is no GPU. LoRA, graphs and ranks have tests of their own in test_vllm_engine.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm")
import feature_jobs  # noqa: E402
from agreement import assert_agrees_with_model, assert_answers_agree  # noqa: E402
from engine import run_jobs  # noqa: E402

from flute_vllm.evaluate import load_model  # noqa: E402
from flute_vllm.info import describe  # noqa: E402

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
ON_CPU = {"enable_sleep_mode": False, "kv_cache_memory_bytes": 64 << 20}
NAMES = ("w4", "pairs", "prefix caching", "chunked prefill", "ngram")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    return feature_jobs.write_models(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def results(models, tmp_path_factory) -> dict[str, dict]:
    reloading = feature_jobs.sleeping_job(models, tmp_path_factory.mktemp("copy") / "w4", ON_CPU)
    reloading["then"] = [step for step in feature_jobs.STEPS if "sleep" not in step]
    eager = feature_jobs.eager_jobs(models)
    jobs = {"reloading": reloading} | {name: eager[name] for name in NAMES}
    return dict(zip(jobs, run_jobs(list(jobs.values())), strict=True))


def test_no_job_failed(results):
    assert {name: r["error"] for name, r in results.items() if "error" in r} == {}


@pytest.mark.parametrize("name", ["w4", "pairs"])
def test_plain_engine_gives_the_answers_of_the_twin(results, models, name):
    model, _ = load_model(models[name])
    prompts = feature_jobs.token_prompts()
    for answer, prompt in zip(results[name]["outputs"], prompts, strict=True):
        assert_agrees_with_model(answer, prompt, model)


def test_features_give_the_plain_answers(results):
    plain = results["w4"]["outputs"]
    for name in ("chunked prefill", "ngram", "prefix caching", "reloading"):
        assert_answers_agree(results[name]["outputs"], plain)
    assert results["ngram"]["metrics"]["vllm:spec_decode_num_accepted_tokens"] > 0
    again = results["prefix caching"]["after"]["again"]
    assert again[0]["cached"] > 0
    assert_answers_agree(again, plain)
    assert_answers_agree(results["reloading"]["after"]["reload"], plain)


def test_reload_brings_other_weights(results, models):
    answers = results["reloading"]["after"]["reload from"]
    assert [a["tokens"] for a in answers] != [a["tokens"] for a in results["w4"]["outputs"]]
    model, _ = load_model(models["other"])
    for answer, prompt in zip(answers, feature_jobs.token_prompts(), strict=True):
        assert_agrees_with_model(answer, prompt, model)


def test_models_can_be_split_as_the_tests_on_four_gpus_do(models):
    """Those tests run on few machines, so what needs no GPU of them is looked at here."""
    import test_gpu_features

    groups = feature_jobs.four_gpus(models)
    jobs = {name: job for group, _ in groups.values() for name, job in group.items()}
    marks = test_gpu_features.test_four_gpus_give_the_answers_of_one.pytestmark
    (names,) = (mark.args[1] for mark in marks if mark.name == "parametrize")
    single = groups["one rank"][0]
    assert set(jobs) == {*names, *single}
    for name in names:
        engine = jobs[name]["engine"]
        stages = engine.get("pipeline_parallel_size", 1)
        assert engine["tensor_parallel_size"] * stages == 4
        assert name.partition(" ")[0] in single
    for name in single:
        sizes = describe(models[name])["tensor_parallel_sizes"]
        assert {1, 2, 4} <= set(sizes), name
