"""Runs vLLM engines outside the test process: ``python tests/engine.py JOBS.json RESULTS.json``.

A job is a dict: ``model`` (folder), ``engine`` (arguments of vllm.LLM), ``prompts`` (token ids),
``tokens``, optional ``lora`` (folder), ``reload`` (true: answer again after reload_weights),
``reload_from`` (the same with the weights of another folder, which overwrite the model's),
``then`` (names of STEPS, each followed by the same prompts again; answers under ``after``),
``metrics`` (true: vLLM's counters), ``log`` (true: the plugin's messages). Jobs of one file run one
after another in one process, which saves vLLM's import each time. A job that fails half way keeps
the answers it had.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ in ("__main__", "__mp_main__"):  # the second in the processes that vLLM spawns
    # vLLM's import makes objects that stay, at which the collector looks again and again
    # (benchmarks/results/cpu/setup.json: what this and leaving at once save).
    gc.set_threshold(100_000, 20, 20)
if __name__ == "__mp_main__":
    # Registered before what vLLM's import registers, so it runs after that: a worker is done when
    # vLLM has shut down. Without it the parent waits for its workers for some seconds and then
    # terminates them, as they are still leaving Python.
    atexit.register(os._exit, 0)


def set_imports_aside() -> None:
    """What is alive now is walked by no collection again; what is made later is, as ever.

    vLLM collects several times an engine, and walked the objects of its imports each time. It
    freezes them itself, but lets go of them at an engine's end; and it freezes the engine with
    them, hence no further freezing.
    """
    COLLECT()
    FREEZE()
    gc.freeze = gc.unfreeze = lambda: None


FREEZE, COLLECT = gc.freeze, gc.collect
if __name__ == "__mp_main__":

    def collect_first(generation: int = 2) -> int:
        """vLLM's first collection in a worker, which has one engine: its model is loaded."""
        gc.collect = COLLECT
        set_imports_aside()
        return 0

    gc.collect = collect_first

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
    """Results of each job; a job that raised has ``error``, mostly in place of ``outputs``."""
    with tempfile.TemporaryDirectory() as scratch:
        request, response, log = (Path(scratch, n) for n in ("jobs.json", "results.json", "log"))
        request.write_text(json.dumps(jobs))
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, __file__, str(request), str(response)],
                env={**os.environ, **LIGHT_ENVIRONMENT, **(environment or {})},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            ended = f"ended with {process.wait(timeout)}"
        except subprocess.TimeoutExpired:
            ended = f"was not done within {timeout} s"
        finally:  # workers of a stuck engine outlive it and would hold its memory
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        results = json.loads(response.read_text()) if response.exists() else []
        if len(results) < len(jobs):
            tail = log.read_text(errors="replace")[-6000:]
            if not results:
                raise RuntimeError(f"the engine process {ended}:\n{tail}")
            lost = {"error": f"the engine process {ended}:\n{tail}"}
            results += [lost] * (len(jobs) - len(results))
        return results


def run_groups(groups: dict[str, tuple[list[dict], dict[str, str]]], timeout: int = 900):
    """Groups of jobs by name, each in a process of its own, all at once; a group: (jobs,
    environment). A process that gave no results leaves its reason in each of its jobs."""

    def run(group: tuple[list[dict], dict[str, str]]) -> list[dict]:
        jobs, environment = group
        try:
            return run_jobs(jobs, environment, timeout)
        except RuntimeError as error:
            return [{"error": str(error)}] * len(jobs)

    with ThreadPoolExecutor(max_workers=len(groups)) as pool:
        return dict(zip(groups, pool.map(run, groups.values()), strict=True))


def tensor_parallel_environment(ranks: int) -> dict[str, str]:
    """One CPU list for each rank; ranks beyond the machine's cores share them."""
    cores = sorted(os.sched_getaffinity(0))
    binding = "|".join(str(cores[rank % len(cores)]) for rank in range(ranks))
    return {"VLLM_CPU_OMP_THREADS_BIND": binding, "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}


def _sleep_1(llm, job: dict) -> None:
    llm.sleep(level=1)
    llm.wake_up()


def _sleep_2(llm, job: dict) -> None:
    """Level 2 forgets the weights: they come from the checkpoint again, into the same memory."""
    llm.sleep(level=2)
    llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights")
    llm.wake_up(tags=["kv_cache"])


def _reload(llm, job: dict) -> None:
    llm.collective_rpc("reload_weights")
    llm.reset_prefix_cache()  # it holds keys and values of the old weights


def _reload_from(llm, job: dict) -> None:
    """The weights of another folder replace those of the model, on disk too."""
    for file in Path(job["reload_from"]).glob("*.safetensors"):
        shutil.copyfile(file, Path(job["model"]) / file.name)
    _reload(llm, job)


STEPS: dict[str, Callable] = {
    "again": lambda llm, job: None,
    "sleep 1": _sleep_1,
    "sleep 2": _sleep_2,
    "reload": _reload,
    "reload from": _reload_from,
}


def _run_job(job: dict, result: dict) -> None:
    """Fills ``result`` step by step, so that it tells how far a failing job came."""
    from vllm import LLM, SamplingParams

    llm = LLM(model=job["model"], **{**DEFAULT_ENGINE, **job.get("engine", {})})
    try:
        sampling = SamplingParams(
            temperature=0.0, max_tokens=job.get("tokens", 24), logprobs=2, ignore_eos=True,
            detokenize=False, prompt_logprobs=job.get("prompt_logprobs"),
        )  # fmt: skip
        prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        extra = {}
        if "lora" in job:
            from vllm.lora.request import LoRARequest

            extra["lora_request"] = LoRARequest("adapter", 1, job["lora"])

        def answers(**options) -> list[dict]:
            return _answers(llm.generate(prompts, sampling, use_tqdm=False, **options))

        result["outputs"] = answers(**extra)
        for step in job.get("then", []):
            STEPS[step](llm, job)
            result.setdefault("after", {})[step] = answers()
        if job.get("reload") or ("reload_from" in job and "then" not in job):
            (_reload_from if "reload_from" in job else _reload)(llm, job)
            result["after_reload"] = answers()
        if job.get("metrics"):
            counters = [metric for metric in llm.get_metrics() if hasattr(metric, "value")]
            result["metrics"] = {metric.name: metric.value for metric in counters}
    finally:
        _shut_down(llm)


@contextlib.contextmanager
def _messages(result: dict):
    """Collects what the plugin logs meanwhile, as ``log``."""

    def keep(record: logging.LogRecord) -> bool:
        result.setdefault("log", []).append(record.getMessage())
        return True

    # Not a handler: vLLM sets logging up while an engine is made, and drops those.
    logger = logging.getLogger("vllm.flute")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _answers(requests) -> list[dict]:
    answers = []
    for request in requests:
        completion = request.outputs[0]
        steps = list(zip(completion.logprobs, completion.token_ids, strict=True))
        ordered = [sorted((entry.logprob for entry in step.values()), reverse=True)
                   for step, _ in steps]  # fmt: skip
        answer = {
            "tokens": list(completion.token_ids),
            "logprobs": [step[token].logprob for step, token in steps],
            "gaps": [best[0] - best[1] for best in ordered],  # of the two best tokens, in nats
            "cached": request.num_cached_tokens or 0,  # of the prompt, by prefix caching
        }
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
    from vllm import LLM  # noqa: F401

    results = []
    for job in json.loads(request.read_text()):
        # vLLM's import, then what the first engine imported besides; not an engine that failed,
        # which its traceback may keep alive.
        if not results or (len(results) == 1 and "error" not in results[0]):
            set_imports_aside()
        result = {}
        try:
            with _messages(result) if job.get("log") else contextlib.nullcontext():
                _run_job(job, result)
        except Exception as error:  # noqa: BLE001 - the test asserts on the message
            chain, current = [], error
            while current is not None:
                chain.append(f"{type(current).__name__}: {current}")
                current = current.__cause__ or current.__context__
            result["error"] = "\n".join(chain)
        results.append(result)
        partial = response.with_suffix(".partial")
        partial.write_text(json.dumps(results))
        partial.replace(response)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # engines are shut down; freeing vLLM's modules one by one takes seconds


if __name__ == "__main__":
    main()
