"""Load of a large checkpoint: what the plugin adds to reading it, in seconds and GPU memory.

    python benchmarks/bench_load.py --model 70b --scratch /tmp/load [--layers 80|auto]

Writes a random checkpoint of a known model's shapes in the native format (codes are random words,
equal in all blocks, each block a file of its own), reads it twice as vLLM's loader does (mapped,
tensor by tensor, copied to the device), and lets vLLM load it. Everything comes from the page
cache then, so the plugin gets no help from a slow disk. ``extra_s``: loading and repacking minus
the second reading; ``extra_mib``: the most memory held during the load beyond what stays.
Limits, for the whole depth of the model: 10 s, and one decoder layer. Exit code 1 beyond them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from model_shapes import methods, write_config

from flute_vllm.format import LayerSpec

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "h200" / "load.json"
LIMIT_S = 10.0  # for all layers of the model
SPARE_BYTES = 8 << 30  # of the disk, which "--layers auto" leaves free
MIB, GB = 1 << 20, 10**9
IS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if IS_GPU else "cpu")


def linear_shapes(config: dict) -> dict[str, tuple[int, int]]:
    """Rows and columns of the linear layers of a LLaMA block, as a checkpoint names them."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim", hidden // config["num_attention_heads"])
    queries, keys = (head * config[f"num_{n}_heads"] for n in ("attention", "key_value"))
    attention = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden),
                 "o_proj": (hidden, queries)}  # fmt: skip
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return {f"self_attn.{name}": shape for name, shape in attention.items()} | {
        f"mlp.{name}": shape for name, shape in mlp.items()
    }


def block_tensors(config: dict, spec: LayerSpec) -> dict[str, torch.Tensor]:
    """Random tensors of one decoder block; every code and every scale is a valid one."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    dtype, tensors = spec.torch_scale_dtype, {}
    for name, (rows, columns) in linear_shapes(config).items():
        layout = spec.tensor_layout(rows, columns)
        words = torch.randint(
            -(2**31), 2**31 - 1, layout["qweight"][0], generator=generator, device=DEVICE,
            dtype=torch.int64 if not IS_GPU else torch.int32,
        )  # fmt: skip
        scales = torch.rand(layout["scales"][0], generator=generator, device=DEVICE) * 0.02 + 0.01
        tensors[f"{name}.qweight"] = words.to(torch.int32).cpu()
        tensors[f"{name}.scales"] = scales.to(dtype).cpu()
        tensors[f"{name}.table"] = torch.linspace(-1, 1, layout["table"][0][0]).to(dtype)
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{name}.weight"] = torch.ones(config["hidden_size"], dtype=torch.bfloat16)
    return tensors


def outer_tensors(config: dict) -> dict[str, torch.Tensor]:
    shape = (config["vocab_size"], config["hidden_size"])
    table = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) * 0.02).cpu()
    norm = torch.ones(config["hidden_size"], dtype=torch.bfloat16)
    return {"model.embed_tokens.weight": table, "lm_head.weight": table.clone(),
            "model.norm.weight": norm}  # fmt: skip


def tensor_bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def fitting_layers(folder: Path, wanted: str, depth: int, block: int, outer: int) -> int:
    """How many layers to write. Raises SystemExit where they do not fit on the disk."""
    free = shutil.disk_usage(folder).free
    fitting = max(0, free - SPARE_BYTES - outer) // block
    layers = min(depth, fitting) if wanted == "auto" else int(wanted)
    if layers < 1 or layers > fitting:
        raise SystemExit(
            f"cannot write {wanted} layers to {folder}: {free / GB:.0f} GB are free, {fitting} "
            f"layers of {block / GB:.2f} GB fit beside {SPARE_BYTES / GB:.0f} GB to spare; choose "
            "another --scratch or fewer --layers"
        )
    return layers


def write_checkpoint(folder: Path, model: str, wanted: str, method: str) -> dict:
    """Writes the checkpoint; returns layers, bytes, bytes of a block, seconds."""
    from safetensors.torch import save_file

    begin = time.perf_counter()
    settings = methods(128)[method]
    write_config(folder, model, settings)
    config = json.loads((folder / "config.json").read_text())
    fields = settings.quantization
    spec = LayerSpec(fields["bits"], fields["group_size"], fields["scale_dtype"])
    block, outer = block_tensors(config, spec), outer_tensors(config)
    depth = config["num_hidden_layers"]
    layers = fitting_layers(folder, wanted, depth, tensor_bytes(block), tensor_bytes(outer))
    config["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    places = dict.fromkeys(outer, "outer.safetensors")
    save_file(outer, folder / "outer.safetensors", metadata={"format": "pt"})
    for layer in range(layers):
        named = {f"model.layers.{layer}.{name}": tensor for name, tensor in block.items()}
        file = f"block-{layer:03}.safetensors"
        save_file(named, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(named, file)
    total = tensor_bytes(outer) + layers * tensor_bytes(block)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return {
        "layers": layers, "depth": depth, "bytes": total, "block_bytes": tensor_bytes(block),
        "write_s": round(time.perf_counter() - begin, 1),
    }  # fmt: skip


def read_seconds(folder: Path) -> float:
    """Of reading all files, mapped, tensor by tensor, into a buffer on the device."""
    from safetensors import safe_open

    buffers: dict[tuple, torch.Tensor] = {}
    begin = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                tensor = file.get_tensor(name)
                key = (tuple(tensor.shape), tensor.dtype)
                if key not in buffers:
                    buffers[key] = torch.empty_like(tensor, device=DEVICE)
                buffers[key].copy_(tensor)
    if IS_GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


class LoadWatch:
    """Times vLLM's reading and the plugin's repacking in this process, and their memory."""

    def __init__(self) -> None:
        self.read_s = self.repack_s = 0.0
        self.repacked = self.repack_peak = self.largest_linear = 0
        self.kept = self.peak = 0

    def install(self) -> None:
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

        from flute_vllm.plugin.linear import FluteLinearMethod

        read, load = DefaultModelLoader.load_weights, DefaultModelLoader.load_model
        repack = FluteLinearMethod.process_weights_after_loading

        def timed_read(loader, *arguments, **options):
            begin = self._now()
            result = read(loader, *arguments, **options)
            self.read_s += self._now() - begin
            return result

        def timed_repack(method, layer):
            names = ("qweight", "scales", "table")
            size = tensor_bytes({name: getattr(layer, name).data for name in names})
            begin, held = self._now(), self._allocated()
            self._raise_peak()
            repack(method, layer)
            self.repack_s += self._now() - begin
            peak = torch.cuda.max_memory_allocated() if IS_GPU else 0
            self.repack_peak = max(self.repack_peak, peak - held)
            self.largest_linear = max(self.largest_linear, size)
            self.repacked += 1

        def watched_load(loader, *arguments, **options):
            self._raise_peak()
            model = load(loader, *arguments, **options)
            self._raise_peak()
            self.kept = self._allocated()
            return model

        DefaultModelLoader.load_weights = timed_read
        DefaultModelLoader.load_model = watched_load
        FluteLinearMethod.process_weights_after_loading = timed_repack

    @staticmethod
    def _now() -> float:
        if IS_GPU:
            torch.cuda.synchronize()
        return time.perf_counter()

    @staticmethod
    def _allocated() -> int:
        return torch.cuda.memory_allocated() if IS_GPU else 0

    def _raise_peak(self) -> None:
        """Takes the peak so far into account and starts counting anew."""
        if IS_GPU:
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()


def load(folder: Path) -> dict:
    """Loads the checkpoint with vLLM in this process and generates a few tokens."""
    import vllm

    watch = LoadWatch()
    watch.install()
    begin = time.perf_counter()
    llm = vllm.LLM(
        model=str(folder), dtype="bfloat16", enforce_eager=True, max_model_len=256,
        max_num_batched_tokens=256, max_num_seqs=8, kv_cache_memory_bytes=256 << 20,
        gpu_memory_utilization=0.3, skip_tokenizer_init=True, enable_prefix_caching=False,
    )  # fmt: skip
    start_s = time.perf_counter() - begin
    sampling = vllm.SamplingParams(max_tokens=4, temperature=0.0, detokenize=False)
    (answer,) = llm.generate([{"prompt_token_ids": [5, 6, 7]}], sampling, use_tqdm=False)
    return {
        "vllm": vllm.__version__, "start_s": round(start_s, 1),
        "load_s": round(watch.read_s, 2), "repack_s": round(watch.repack_s, 2),
        "repacked_layers": watch.repacked, "tokens": len(answer.outputs[0].token_ids),
        "kept_mib": watch.kept // MIB, "extra_mib": (watch.peak - watch.kept) // MIB,
        "repack_peak_mib": watch.repack_peak // MIB,
        "largest_linear_mib": watch.largest_linear // MIB,
    }  # fmt: skip


def load_apart(folder: Path, result: Path, limit_s: float) -> dict:
    """``load`` in a process of its own, whose output goes to this one's; ``error`` if it fails."""
    command = [sys.executable, __file__, "--child", str(folder), "--out", str(result)]
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
        # The engine runs in that process, where it is watched.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }  # fmt: skip
    result.unlink(missing_ok=True)
    try:
        done = subprocess.run(command, env=environment, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"vLLM was not done within {limit_s:.0f} s"}
    if done.returncode != 0 or not result.exists():
        return {"error": f"vLLM ended with {done.returncode}; its output stands in the log"}
    return json.loads(result.read_text())


def judge(record: dict) -> list[str]:
    """What the record misses; empty when it holds all limits."""
    missed = []
    if record["extra_s_full_depth"] > LIMIT_S:
        missed.append(f"{record['extra_s_full_depth']} s beyond reading, limit {LIMIT_S}")
    if record["extra_mib"] > record["block_bytes"] / MIB:
        missed.append(f"{record['extra_mib']} MiB beyond the weights, more than one layer")
    return missed


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="70b", choices=["70b", "8b", "tiny"])
    parser.add_argument("--method", default="flute4", choices=["flute4", "flute3", "flute2"])
    parser.add_argument("--layers", default="auto", help='a number, or "auto": what the disk holds')
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/flute_load"))
    parser.add_argument("--limit-s", type=float, default=300, help="of vLLM's load")
    parser.add_argument("--wait-for", type=Path, help="measure once this file exists")
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> int:
    arguments = parse()
    if arguments.child:
        arguments.out.write_text(json.dumps(load(arguments.child)))
        return 0
    folder = arguments.scratch / "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        record = {
            "device": torch.cuda.get_device_name(0) if IS_GPU else "CPU",
            "torch": torch.__version__, "commit": arguments.commit,
            "command": "python " + " ".join(sys.argv), "model": arguments.model,
            "method": arguments.method,
        }  # fmt: skip
        record |= write_checkpoint(folder, arguments.model, arguments.layers, arguments.method)
        print(json.dumps(record), flush=True)
        while arguments.wait_for and not arguments.wait_for.exists():
            time.sleep(0.2)
        record["read_s"] = [round(read_seconds(folder), 2) for _ in range(2)]
        if IS_GPU:
            torch.cuda.empty_cache()
        record |= load_apart(folder, arguments.scratch / "child.json", arguments.limit_s)
    finally:
        shutil.rmtree(folder)
    if "error" not in record:
        extra = record["load_s"] + record["repack_s"] - record["read_s"][-1]
        record["extra_s"] = round(extra, 2)
        record["extra_s_full_depth"] = round(extra * record["depth"] / record["layers"], 2)
    record["missed"] = [record["error"]] if "error" in record else judge(record)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    return 1 if record["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
