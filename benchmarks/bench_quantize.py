"""What quantizing costs: time for an 8B model by extrapolation, memory of a 10 GB checkpoint.

    python benchmarks/bench_quantize.py cost --recipes fast balanced best    # on a GPU
    python benchmarks/bench_quantize.py memory                               # 40 blocks, 10 GB

``cost`` makes blocks of LLaMA-3-8B's shapes with random weights, times a run of the quantizer after
a small one to warm up, and lets the median of the blocks after the first stand for the rest: the
difference between runs of 1 and 5 blocks was negative once, as the first run loads CUDA. ``memory``
quantizes a synthetic checkpoint in a process of its own and reports its ru_maxrss. Results go to
benchmarks/results/<machine>/quantize_<mode>.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from bench_quality import commit, machine  # noqa: E402

from flute_vllm.checkpoint import Checkpoint  # noqa: E402
from flute_vllm.quantize.model import Callbacks, choose_device, quantize_checkpoint  # noqa: E402
from flute_vllm.quantize.plan import QuantizeSettings, Unit, plan_checkpoint  # noqa: E402
from flute_vllm.quantize.report import ModuleReport  # noqa: E402
from flute_vllm.writer import AtomicFolder  # noqa: E402

TOKENIZER = ROOT / "examples" / "stdlib_model" / "model"
LLAMA_8B = {"hidden": 4096, "mlp": 14336, "heads": 32, "kv_heads": 8, "blocks": 32}
WARM_UP = {"hidden": 512, "mlp": 1024, "heads": 8, "kv_heads": 4}
SYNTHETIC = {"hidden": 4096, "mlp": 6784, "heads": 32, "kv_heads": 8}  # 0.25 GB a block
GB = 1e9
LIMIT_GB = 4.0  # resident, issue 6


def write_model(folder: Path, shape: dict[str, int], blocks: int, device: torch.device) -> int:
    """A LLaMA folder of random bfloat16 weights, a file for each block; bytes of tensors."""
    hidden, mlp = shape["hidden"], shape["mlp"]
    head = hidden // shape["heads"]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": mlp, "num_hidden_layers": blocks, "head_dim": head,
        "num_attention_heads": shape["heads"], "num_key_value_heads": shape["kv_heads"],
        "vocab_size": 4096, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    linears = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden),
        "self_attn.k_proj": (shape["kv_heads"] * head, hidden),
        "self_attn.v_proj": (shape["kv_heads"] * head, hidden),
        "mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }  # fmt: skip
    generator = torch.Generator(device).manual_seed(0)

    def random(rows: int, columns: int) -> torch.Tensor:
        values = torch.randn(rows, columns, generator=generator, device=device)
        return values.mul_(columns**-0.5).bfloat16()

    total = 0
    with AtomicFolder(folder) as out:
        for index in range(blocks):
            block = f"model.layers.{index}"
            tensors = {f"{block}.{name}.weight": random(*size) for name, size in linears.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{block}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
            out.write_tensors(f"model-{index:05}.safetensors", tensors)
            total += sum(tensor.nbytes for tensor in tensors.values())
        outside = {
            "model.embed_tokens.weight": random(4096, hidden),
            "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        }
        out.write_tensors("model-outside.safetensors", outside)
        total += sum(tensor.nbytes for tensor in outside.values())
        out.commit(config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    return total


def cost(options: argparse.Namespace, scratch: Path) -> dict:
    device = choose_device(options.device)
    text = (ROOT / "configs" / "calibration" / "python.txt").read_text()
    (scratch / "text.txt").write_text(text * 4)  # random weights do not mind; 128 x 2048 tokens
    blocks = options.blocks[0]
    write_model(scratch / "warm", WARM_UP, 2, device)
    write_model(scratch / "source", LLAMA_8B, blocks, device)
    rows = []
    for recipe in options.recipes:
        settings = QuantizeSettings(
            bits=options.bits, recipe=recipe, device=options.device,
            calib=str(scratch / "text.txt"), samples=options.samples, length=options.length,
        )  # fmt: skip
        # CUDA's context, its libraries' handles and the kernels' first loading took 5 s.
        few = replace(settings, samples=4, length=64)
        quantize_checkpoint(scratch / "warm", scratch / f"warm-{recipe}", few)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds, times = timed(scratch / "source", scratch / f"out-{recipe}", settings)
        shutil.rmtree(scratch / f"out-{recipe}")
        a_block = statistics.median(times)
        whole = seconds + a_block * (LLAMA_8B["blocks"] - blocks)
        rows.append({
            "recipe": recipe, "bits": options.bits, "measured_blocks": blocks,
            "seconds": round(seconds, 2), "seconds_of_blocks_after_the_first":
            [round(time, 2) for time in times], "seconds_a_block": round(a_block, 2),
            "extrapolated_minutes_32_blocks": round(whole / 60, 2),
            "gpu_peak_gb": round(torch.cuda.max_memory_allocated() / GB, 2)
            if device.type == "cuda" else None,
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return {"shapes": "LLaMA-3-8B, random weights; embeddings of 128256 x 4096 not included",
            "method": f"one run of {blocks} blocks; the median of those after the first stands "
            "for the blocks that were not run", "rows": rows}  # fmt: skip


def timed(source: Path, out: Path, settings: QuantizeSettings) -> tuple[float, list[float]]:
    """Seconds of a whole run, and of each block after the first."""
    ends: dict[str, float] = {}

    def on_module(report: ModuleReport, unit: Unit) -> None:
        ends[unit.name] = time.perf_counter()  # the last module of a unit stays

    started = time.perf_counter()
    quantize_checkpoint(source, out, settings, Callbacks(on_module=on_module))
    seconds = time.perf_counter() - started
    moments = list(ends.values())
    return seconds, [after - before for before, after in zip(moments, moments[1:], strict=False)]


def memory(options: argparse.Namespace, scratch: Path) -> dict:
    source = scratch / "source"
    nbytes = write_model(source, SYNTHETIC, options.blocks[0], torch.device("cpu"))
    program = [
        sys.executable, "-m", "flute_vllm.cli", "quantize", str(source), str(scratch / "out"),
        "--recipe", options.recipes[0], "--device", options.device,
    ]  # fmt: skip
    planned = plan_checkpoint(Checkpoint(source), QuantizeSettings(recipe=options.recipes[0]))
    started = time.perf_counter()
    subprocess.run(program, check=True, cwd=ROOT)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    written = sum(path.stat().st_size for path in (scratch / "out").glob("*.safetensors"))
    row = {
        "recipe": options.recipes[0], "blocks": options.blocks[0], "source_bytes": nbytes,
        "peak_resident_gb": round(peak / GB, 3), "limit_gb": LIMIT_GB,
        "dry_run_bytes": planned.file_nbytes, "written_bytes": written,
        "holds": peak <= LIMIT_GB * GB and planned.file_nbytes == written,
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip
    print(json.dumps(row))
    return {"rows": [row]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=("cost", "memory"))
    parser.add_argument("--recipes", nargs="+", default=["fast"])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--blocks", type=int, nargs=1, help="default: 5 for cost, 40 for memory")
    parser.add_argument("--samples", type=int, help="default: what the recipe says")
    parser.add_argument("--length", type=int, help="default: what the recipe says")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scratch", type=Path, help="a disk with room; default: a temporary one")
    options = parser.parse_args()
    options.blocks = options.blocks or ([5] if options.mode == "cost" else [40])
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        run = cost if options.mode == "cost" else memory
        result = run(options, Path(scratch))
    out = ROOT / f"benchmarks/results/{machine(options.device)}/quantize_{options.mode}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "benchmarks/bench_quantize.py", *sys.argv[1:]])
    whole = {"command": command, "commit": commit(), "torch": torch.__version__, **result}
    out.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
