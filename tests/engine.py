"""Runs vLLM engines outside the test process: ``python tests/engine.py JOBS.json RESULTS.json``.

A job is a dict: ``model`` (folder), ``engine`` (arguments of vllm.LLM), ``prompts`` (token ids),
``tokens``, optional ``lora`` (folder), ``reload`` (true: answer again after reload_weights),
``reload_from`` (the same with the weights of another folder, which overwrite the model's). Jobs
of one file run one after another in one process, which saves vLLM's import each time.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LIGHT_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # Compiling the sampler's helpers takes half a minute and is not what these tests are about.
    "TORCHDYNAMO_DISABLE": "1",
    # The engine runs in the worker's process: one import less.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
}
DEFAULT_ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 128,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 32 << 20,
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
}


def run_jobs(jobs: list[dict], environment: dict[str, str] | None = None, timeout: int = 900):
    """Results of each job; a job that raised has ``error`` in place of ``outputs``."""
    with tempfile.TemporaryDirectory() as scratch:
        request, response = Path(scratch, "jobs.json"), Path(scratch, "results.json")
        request.write_text(json.dumps(jobs))
        process = subprocess.run(
            [sys.executable, __file__, str(request), str(response)],
            env={**os.environ, **LIGHT_ENVIRONMENT, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if not response.exists():
            tail = (process.stdout + process.stderr)[-6000:]
            raise RuntimeError(f"the engine process ended with {process.returncode}:\n{tail}")
        return json.loads(response.read_text())


def tensor_parallel_environment(ranks: int) -> dict[str, str]:
    """One CPU list for each rank; ranks beyond the machine's cores share them."""
    cores = sorted(os.sched_getaffinity(0))
    binding = "|".join(str(cores[rank % len(cores)]) for rank in range(ranks))
    return {"VLLM_CPU_OMP_THREADS_BIND": binding, "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}


def _run_job(job: dict) -> dict:
    from vllm import LLM, SamplingParams

    llm = LLM(model=job["model"], **{**DEFAULT_ENGINE, **job.get("engine", {})})
    sampling = SamplingParams(
        temperature=0.0, max_tokens=job.get("tokens", 24), logprobs=1, ignore_eos=True,
        detokenize=False, prompt_logprobs=job.get("prompt_logprobs"),
    )  # fmt: skip
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    extra = {}
    if "lora" in job:
        from vllm.lora.request import LoRARequest

        extra["lora_request"] = LoRARequest("adapter", 1, job["lora"])
    outputs = _answers(llm.generate(prompts, sampling, use_tqdm=False, **extra))
    result = {"outputs": outputs}
    if "reload_from" in job:  # a folder whose weights replace those of the model
        for file in Path(job["reload_from"]).glob("*.safetensors"):
            shutil.copyfile(file, Path(job["model"]) / file.name)
    if job.get("reload") or "reload_from" in job:
        llm.collective_rpc("reload_weights")
        result["after_reload"] = _answers(llm.generate(prompts, sampling, use_tqdm=False))
    _shut_down(llm)
    return result


def _answers(requests) -> list[dict]:
    answers = []
    for request in requests:
        completion = request.outputs[0]
        logprobs = [
            step[token].logprob
            for step, token in zip(completion.logprobs, completion.token_ids, strict=True)
        ]
        answer = {"tokens": list(completion.token_ids), "logprobs": logprobs}
        if request.prompt_logprobs:
            answer["prompt_logprobs"] = [
                step and {str(token): entry.logprob for token, entry in step.items()}
                for step in request.prompt_logprobs
            ]
        answers.append(answer)
    return answers


def _shut_down(llm) -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    with contextlib.suppress(AttributeError):
        llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()


def main() -> None:
    request, response = map(Path, sys.argv[1:3])
    results = []
    for job in json.loads(request.read_text()):
        try:
            results.append(_run_job(job))
        except Exception as error:  # noqa: BLE001 - the test asserts on the message
            chain, current = [], error
            while current is not None:
                chain.append(f"{type(current).__name__}: {current}")
                current = current.__cause__ or current.__context__
            results.append({"error": "\n".join(chain)})
    response.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
