"""vLLM's features on the quantized bundled model and on the zoo checkpoint, as jobs of engine.py.

The jobs of a group share a process; groups are started at once (``engine.run_groups``). Engines
are few: one start serves several features where they do not disturb each other.
"""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import torch
from lora import write_adapter
from safetensors.torch import load_file, save_file

from flute_vllm.convert import dense_state_dict
from flute_vllm.quantize.model import quantize_checkpoint
from flute_vllm.quantize.plan import QuantizeSettings

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "stdlib_model" / "model"
ZOO = ROOT / "tests" / "data" / "ckpt_w4"
TOKENS = 32
# vLLM's own defaults for several devices and for graphs, which engine.py turns off.
COMPILED = {"TORCHDYNAMO_DISABLE": "0"}
RANKS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
SMALL = {"max_model_len": 512, "gpu_memory_utilization": 0.05, "block_size": 32}
GRAPHS = {
    "enforce_eager": False,
    "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8]},
}
# Must be free at the start, where 70B engines hold most of each GPU.
TINY = {"gpu_memory_utilization": 0.015}
# Sleeping fails when the device has less free memory afterwards: a large cache to give back keeps
# other processes on the same GPU from causing that.
SLEEPY = {"enable_sleep_mode": True, "kv_cache_memory_bytes": 4 << 30}
STEPS = ["again", "sleep 1", "reload", "sleep 2", "reload from"]
NGRAM = {
    "method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1,
}  # fmt: skip


def write_models(root: Path) -> dict[str, Path]:
    """w4 and w4 with a pair table; ``other``: other weights, same shapes; an adapter for w4."""
    disturb(MODEL, root / "disturbed")
    table = {"bits": 2, "table_kind": "pair", "values": pair_table()}
    (root / "pairs.json").write_text(json.dumps(table))
    settings = QuantizeSettings(4, 64)
    quantize_checkpoint(MODEL, root / "w4", settings)
    quantize_checkpoint(root / "disturbed", root / "other", settings)
    pairs = QuantizeSettings(2, 32, table=str(root / "pairs.json"), recipe="nf")
    quantize_checkpoint(MODEL, root / "pairs", pairs)
    weights = dict(dense_state_dict(root / "w4")[1])
    write_adapter(weights, root / "adapter", scale=0.002)
    return {name: root / name for name in ("w4", "pairs", "other", "adapter")} | {"zoo": ZOO}


def disturb(source: Path, folder: Path) -> None:
    """A copy of a dense folder with noise on its linear weights, enough to change its answers."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(5)
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            noise = torch.randn(tensor.shape, generator=generator) * 0.3 * tensor.float().std()
            tensors[name] = (tensor.float() + noise).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for file in source.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())


def pair_table() -> list[list[float]]:
    """16 pairs in the plane that are no product of two scalar tables."""
    angles = torch.arange(8) * (torch.pi / 4)
    rings = [radius * torch.stack([torch.cos(angles + shift), torch.sin(angles + shift)], 1)
             for radius, shift in ((0.35, 0.0), (0.9, 0.4))]  # fmt: skip
    return torch.cat(rings).tolist()


def token_prompts() -> list[list[int]]:
    """One of several hundred tokens, which prefills more rows than the decode kernel takes."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = Path(sysconfig.get_paths()["stdlib"], "sched.py").read_text()
    texts = [text[:1200], "def walk(path):\n    for name in os.listdir(path):\n", "import os\n\n"]
    return [tokenizer(text, add_special_tokens=False)["input_ids"][:400] for text in texts]


def zoo_prompts() -> list[list[int]]:
    greedy = load_file(ZOO.parent / "ref_w4.safetensors")["greedy_prompt8_plus32"]
    return [greedy[:8].tolist()]


def job(models: dict[str, Path], name: str, engine: dict | None = None, **fields) -> dict:
    """A job for a model in 16 bits; the zoo's is float16."""
    is_zoo = name.startswith("zoo")
    kind = {"quantization": "flute", "dtype": "float16"} if is_zoo else {"dtype": "bfloat16"}
    return {
        "model": str(models[name]), "prompts": zoo_prompts() if is_zoo else token_prompts(),
        "tokens": TOKENS, "engine": {**SMALL, **kind, **(engine or {})}, **fields,
    }  # fmt: skip


def eager_jobs(models: dict[str, Path]) -> dict[str, dict]:
    """Jobs that any device runs; the first are what the others are compared with."""
    return {
        "w4": job(models, "w4"),
        "pairs": job(models, "pairs"),
        "zoo": job(models, "zoo"),
        "prefix caching": job(models, "w4", {"enable_prefix_caching": True}, then=["again"]),
        "chunked prefill": job(models, "w4", {"max_num_batched_tokens": 64}),
        "lora": job(
            models, "w4", {"enable_lora": True, "max_lora_rank": 8}, lora=str(models["adapter"])
        ),
        # Last in its process: on vLLM's CPU build engines after it fail.
        "ngram": job(
            models, "w4", {"speculative_config": NGRAM, "disable_log_stats": False}, metrics=True
        ),
    }


def sleeping_job(models: dict[str, Path], copy: Path, engine: dict) -> dict:
    """All steps in one engine, on a copy of w4 whose weights the last step overwrites."""
    copy.mkdir()
    for file in models["w4"].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    settings = {**SLEEPY, "enable_prefix_caching": True, **engine}
    fields = {"then": STEPS, "reload_from": str(models["other"])}
    return job(models, "w4", settings, **fields) | {"model": str(copy)}


Groups = dict[str, tuple[dict[str, dict], dict[str, str]]]


def one_gpu(models: dict[str, Path], scratch: Path) -> Groups:
    """Named jobs of each process and its environment. One engine a process with CUDA graphs."""
    no_graphs = {"enforce_eager": False, "compilation_config": {"cudagraph_mode": "NONE"}}
    plain_graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    plain_graphs |= GRAPHS["compilation_config"]
    return {
        "eager": (eager_jobs(models), {}),
        "sleep, eager": ({"sleep, eager": sleeping_job(models, scratch / "eager", {})}, {}),
        "sleep, graphs": (
            {"sleep, graphs": sleeping_job(models, scratch / "graphs", GRAPHS)}, COMPILED,
        ),
        "zoo, graphs": ({"zoo, graphs": job(models, "zoo", GRAPHS, then=["reload"])}, COMPILED),
        "compiled": ({"compiled": job(models, "w4", no_graphs)}, COMPILED),
        "graphs alone": (
            {"graphs alone": job(
                models, "w4", {"enforce_eager": False, "compilation_config": plain_graphs}
            )}, {},
        ),
    }  # fmt: skip


def two_gpus(models: dict[str, Path]) -> Groups:
    """Both ways to spread a model, beside one rank to compare with."""
    tensor, pipeline = {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}
    names = ("w4", "pairs", "zoo")
    return {
        "one rank": ({name: job(models, name) for name in names}, {}),
        "tp2": ({f"{name} tp2": job(models, name, tensor) for name in names}, RANKS),
        "tp2, graphs": (
            {"w4 tp2, graphs": job(models, "w4", {**GRAPHS, **tensor})}, {**COMPILED, **RANKS},
        ),
        "zoo tp2, graphs": (
            {"zoo tp2, graphs": job(models, "zoo", {**GRAPHS, **tensor})}, {**COMPILED, **RANKS},
        ),
        "pp2": ({f"{name} pp2": job(models, name, pipeline) for name in ("w4", "zoo")}, RANKS),
        "pp2, graphs": (
            {"w4 pp2, graphs": job(models, "w4", {**GRAPHS, **pipeline})}, {**COMPILED, **RANKS},
        ),
    }  # fmt: skip


def four_gpus(models: dict[str, Path]) -> Groups:
    """Both ways at four ranks, one of them two by two, beside one rank to compare with."""
    tensor = {**TINY, "tensor_parallel_size": 4}
    both = {**TINY, "tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    names = ("w4", "pairs", "zoo")
    graphs = {**COMPILED, **RANKS}
    return {
        "one rank": ({name: job(models, name, TINY) for name in names}, {}),
        "tp4": ({f"{name} tp4": job(models, name, tensor) for name in names}, RANKS),
        "tp4, graphs": ({"w4 tp4, graphs": job(models, "w4", {**GRAPHS, **tensor})}, graphs),
        "tp2 pp2": ({f"{name} tp2 pp2": job(models, name, both) for name in ("w4", "zoo")}, RANKS),
        "tp2 pp2, graphs": (
            {"w4 tp2 pp2, graphs": job(models, "w4", {**GRAPHS, **both})}, graphs,
        ),
    }  # fmt: skip
