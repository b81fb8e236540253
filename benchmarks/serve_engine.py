"""One vLLM engine, measured: ``python benchmarks/serve_engine.py JOB.json RESULT.json``.

The child of ``bench_serve.py``. A job has ``engine`` (arguments of vllm.LLM), ``batches``,
``prompt_tokens``, ``steps``, ``prefill`` (prompts, tokens of each), ``repeats``, ``vocabulary``,
``method``, and ``ready`` and ``go``: files with which engines that start together take turns; with
``profile``, a number of steps, the kernels of one decode step at each batch size are listed too.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from pathlib import Path

import step_profile

START = time.monotonic()
SHORT = 4  # steps of the run that is subtracted: it holds prefill and the first, slower steps
GIB = 1 << 30


def peak_bytes(worker) -> int:
    """In a worker: the most memory that torch ever held on its device; of the process on a CPU."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Engine:
    def __init__(self, arguments: dict, vocabulary: int) -> None:
        from vllm import LLM

        self.llm = LLM(**arguments)
        self.vocabulary, self.random = vocabulary, random.Random(0)

    def prompts(self, count: int, tokens: int) -> list[dict]:
        last = self.vocabulary - 1
        return [
            {"prompt_token_ids": [self.random.randint(3, last) for _ in range(tokens)]}
            for _ in range(count)
        ]

    def seconds(self, prompts: list[dict], new_tokens: int) -> float:
        """Of generating exactly ``new_tokens`` for every prompt. Raises ValueError otherwise."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, sampling, use_tqdm=False)
        elapsed = time.perf_counter() - start
        counts = {len(output.outputs[0].token_ids) for output in outputs}
        if counts != {new_tokens} or len(outputs) != len(prompts):
            raise ValueError(f"asked for {new_tokens} tokens each, got {sorted(counts)}")
        return elapsed

    def decode_ms(self, batch: int, prompt_tokens: int, steps: int, repeats: int) -> float:
        """Milliseconds of one decode step: what ``steps`` more tokens take, over ``steps``."""
        prompts = self.prompts(batch, prompt_tokens)
        self.seconds(prompts, SHORT)
        found = []
        for _ in range(repeats):
            short = self.seconds(prompts, SHORT)
            found.append((self.seconds(prompts, SHORT + steps) - short) / steps * 1e3)
        return statistics.median(found)

    def profile(self, batch: int, prompt_tokens: int, steps: int) -> dict:
        """Kernels of one decode step (``step_profile.py``), of the first worker."""
        prompts = self.prompts(batch, prompt_tokens)
        self.seconds(prompts, SHORT)
        self.llm.collective_rpc(step_profile.start)
        self.seconds(prompts, SHORT + steps)
        events = self.llm.collective_rpc(step_profile.stop)[0]
        return step_profile.summary(events, SHORT + steps)

    def prefill_tok_s(self, count: int, tokens: int, repeats: int) -> float:
        self.seconds(self.prompts(count, tokens), 1)
        times = [self.seconds(self.prompts(count, tokens), 1) for _ in range(repeats)]
        return count * tokens / statistics.median(times)


def wait_for(path: Path) -> None:
    """Until the parent lets this engine measure; the parent ends it when that never comes."""
    while not path.exists():
        time.sleep(0.05)


def require_kernels(method: str) -> None:
    """Raises RuntimeError where ours would run as plain torch on a GPU, for minutes a token."""
    import torch

    from flute_vllm import ops

    if method.startswith("flute") and torch.cuda.is_available() and not ops.has_cuda_kernels():
        raise RuntimeError(f"no CUDA kernels in {ops.LIBRARY}; build them there or install a wheel")


def measure(job: dict) -> dict:
    require_kernels(job["method"])
    engine = Engine(job["engine"], job["vocabulary"])
    # The first request compiles what start-up has left; it belongs to neither figure.
    started = time.monotonic() - START
    engine.seconds(engine.prompts(1, 8), 2)
    Path(job["ready"]).touch()
    wait_for(Path(job["go"]))
    decode = {
        str(batch): engine.decode_ms(batch, job["prompt_tokens"], job["steps"], job["repeats"])
        for batch in job["batches"]
    }
    prefill = engine.prefill_tok_s(*job["prefill"], job["repeats"])
    peaks = engine.llm.collective_rpc(peak_bytes)
    steps = job.get("profile", 0)
    profiles = {
        str(batch): engine.profile(batch, job["prompt_tokens"], steps)
        for batch in (job["batches"] if steps else ())
    }
    return {
        **({"profile": profiles} if steps else {}),
        "decode_ms": {batch: round(ms, 3) for batch, ms in decode.items()},
        "decode_tok_s": {batch: round(int(batch) / ms * 1e3, 1) for batch, ms in decode.items()},
        "prefill_tok_s": round(prefill), "start_s": round(started, 1),
        "peak_gib": round(max(peaks) / GIB, 2),
    }  # fmt: skip


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    result = Path(sys.argv[2])
    import torch
    import vllm

    versions = {"vllm": vllm.__version__, "torch": torch.__version__}
    result.write_text(json.dumps(measure(job) | {"versions": versions}))


if __name__ == "__main__":
    main()
