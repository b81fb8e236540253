"""The quality table: what each recipe costs in perplexity and KL divergence, at equal bits.

    python benchmarks/bench_quality.py --model build/reference --train    # GPU, below 9 minutes
    python benchmarks/bench_quality.py --model examples/stdlib_model/model --out /tmp/quality.json

Writes benchmarks/results/<machine>/quality.json row by row. Rows that are there for the same
model and commit are not measured again, so a run that was cut short goes on.

The texts are the held-out files of examples/stdlib_model, which neither training nor calibration
saw. d is the mean log-probability lost, log(ppl) - log(dense ppl).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "stdlib_model"), str(ROOT / "benchmarks")]

from heldout import load_heldout  # noqa: E402

from flute_vllm.evaluate import load_model, perplexity  # noqa: E402
from flute_vllm.quantize.model import quantize_checkpoint  # noqa: E402
from flute_vllm.quantize.plan import QuantizeSettings  # noqa: E402
from flute_vllm.quantize.recipes import load_recipe  # noqa: E402

# Largest d / d_NF of the recipes by bits (issue 6), at 2 bits the largest d.
LIMITS = {
    ("fast", 4): 0.85, ("fast", 3): 0.75, ("fast", 2): 1.0, ("balanced", 4): 0.6,
    ("balanced", 3): 0.55, ("best", 4): 0.5, ("best", 3): 0.45, ("best", 2): 0.45,
}  # fmt: skip
LADDER = ("nf", "fast", "balanced", "best")  # each never worse than the one before it
MEANS = ("dlog_ppl", "kld", "top1", "bpw", "seconds")


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown: not a git checkout"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder; its 'model' if it has")
    parser.add_argument("--train", action="store_true", help="train it there if it is missing")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<machine>/")
    parser.add_argument("--recipes", nargs="+", default=["nf", "fast", "balanced", "best"])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--lm-head", action="store_true", help="quantize the output head, too")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, help="fewer calibration windows, for a trial run")
    parser.add_argument("--files", type=int, help="of the held-out files, for a trial run")
    parser.add_argument("--stdlib", type=Path, help="lib/python3.11 with the texts, if not ours")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", default=commit(), help="where there is no git checkout")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no row after this")
    return parser.parse_args()


def machine(device: str) -> str:
    if device == "cpu":
        return "cpu"
    return torch.cuda.get_device_name(device).rpartition(" ")[2].lower()


class Measure:
    """The dense model, loaded once, and how far a quantized folder is from it."""

    def __init__(
        self, model: Path, device: str, files: int | None, stdlib: Path | None = None
    ) -> None:
        self.device = device
        heldout = load_heldout(stdlib)
        self.texts = list(heldout.texts.values())[:files]
        self.changed = len(heldout.changed)
        self.reference, self.tokenizer = load_model(model, device=device)
        self.dense = self.of(self.reference, None)

    def of(self, network: Any, reference: Any):
        return perplexity(
            network, self.tokenizer, self.texts, batch_size=8 if self.device != "cpu" else 4,
            reference=reference,
        )  # fmt: skip

    def row(self, folder: Path) -> dict[str, float]:
        network, _ = load_model(folder, device=self.device)
        found = self.of(network, self.reference)
        return {
            "ppl": round(found.ppl, 5), "dlog_ppl": round(found.nll - self.dense.nll, 6),
            "kld": round(found.kl, 6), "top1": round(found.top1_agreement, 5),
        }  # fmt: skip


def measure(options: argparse.Namespace, model: Path, ruler: Measure, recipe: str, bits: int,
            seed: int) -> dict[str, Any]:  # fmt: skip
    settings = QuantizeSettings(
        bits=bits, group_size=options.group_size, recipe=recipe, device=options.device,
        samples=options.samples, seed=seed, lm_head=options.lm_head,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        report = quantize_checkpoint(model, Path(scratch) / "out", settings)
        seconds = time.perf_counter() - started
        return {
            "recipe": recipe, "bits": bits, "group_size": options.group_size, "seed": seed,
            "bpw": round(report["totals"]["bits_per_weight"], 5),
            **ruler.row(Path(scratch) / "out"), "seconds": round(seconds, 2),
        }  # fmt: skip


def mean_of(rows: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, float]]:
    """Means over seeds by (recipe, bits)."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["recipe"], row["bits"]), []).append(row)
    return {
        key: {name: sum(row[name] for row in group) / len(group) for name in MEANS}
        | {"seeds": len(group)}
        for key, group in groups.items()
    }


def worse_than_before(
    means: dict[tuple[str, int], dict[str, float]],
) -> list[str]:
    """What breaks "each recipe never worse than the one before it, at no more bits than NF"."""
    told = []
    for (name, bits), mean in means.items():
        if name not in LADDER:
            continue
        before = [r for r in LADDER[: LADDER.index(name)] if (r, bits) in means]
        for other in before[-1:]:
            for field in ("dlog_ppl", "kld"):
                ahead = means[other, bits][field]
                if mean[field] > ahead:
                    told.append(
                        f"{name} is worse than {other} at {bits} bits: {field} "
                        f"{mean[field]:.5f} against {ahead:.5f}"
                    )
        if ("nf", bits) in means and mean["bpw"] > means["nf", bits]["bpw"] + 1e-9:
            told.append(f"{name} at {bits} bits takes more bits per weight than nf")
    return told


def describe(rows: list[dict[str, Any]]) -> bool:
    """Prints the table with what is asked of it; whether every limit holds."""
    means = mean_of(rows)
    holds = True
    print(f"{'recipe':9} bits   bpw   seeds        d  d/d_NF  limit      kld    top1  seconds")
    for (name, bits), mean in sorted(means.items(), key=lambda item: -item[0][1]):
        base = means.get(("nf", bits))
        share = mean["dlog_ppl"] / base["dlog_ppl"] if base else math.nan
        limit = LIMITS.get((name, bits))
        judged = mean["dlog_ppl"] if bits == 2 else share
        is_met = limit is None or judged <= limit
        holds &= is_met
        told = "" if limit is None else f"{limit:.2f} {'ok' if is_met else 'NOT MET'}"
        print(
            f"{name:9} {bits:4} {mean['bpw']:.4f} {mean['seeds']:4} {mean['dlog_ppl']:9.5f} "
            f"{share:7.3f}  {told:12} {mean['kld']:.5f} {mean['top1']:.4f} {mean['seconds']:7.1f}"
        )
    broken = worse_than_before(means)
    for line in broken:
        print(line)
    return holds and not broken


def main() -> int:
    started = time.perf_counter()
    options = parse_arguments()
    command = shlex.join(["python", "benchmarks/bench_quality.py", *sys.argv[1:]])
    model = options.model / "model" if (options.model / "model").is_dir() else options.model
    if options.train and not (model / "config.json").is_file():
        import reference_model

        texts = ["--stdlib", str(options.stdlib)] if options.stdlib else []
        reference_model.main(options.model, "--device", options.device, *texts)
        model = options.model / "model"
        print(f"trained in {time.perf_counter() - started:.0f} s", flush=True)
    out = options.out or ROOT / f"benchmarks/results/{machine(options.device)}/quality.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    ruler = Measure(model, options.device, options.files, options.stdlib)
    identity = {
        "model": hashlib.sha256(b"".join(
            p.read_bytes() for p in sorted(model.glob("*.safetensors")))).hexdigest()[:16],
        "parameters": sum(p.numel() for p in ruler.reference.parameters()),
        "tokens": ruler.dense.tokens, "dense_ppl": round(ruler.dense.ppl, 5),
        "protocol": ruler.dense.protocol, "heldout_files_changed": ruler.changed,
        "commit": options.commit, "torch": torch.__version__, "device": options.device,
        **({"lm_head": True} if options.lm_head else {}),
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    if out.is_file():
        before = json.loads(out.read_text())
        if all(before.get(k) == identity[k] for k in ("model", "tokens", "commit")):
            rows = before["rows"]
    for bits in options.bits:
        for recipe in options.recipes:
            is_random = load_recipe(recipe).needs != "nothing"
            for seed in options.seeds if is_random else options.seeds[:1]:
                key = (recipe, bits, seed)
                if any((r["recipe"], r["bits"], r["seed"]) == key for r in rows):
                    continue
                if time.perf_counter() - started > options.seconds:
                    print(f"out of time before {key}; run again to go on")
                    continue
                rows.append(measure(options, model, ruler, recipe, bits, seed))
                print(json.dumps(rows[-1]), flush=True)
                document = {**identity, "command": command, "rows": rows}
                partial = out.with_suffix(".partial")
                partial.write_text(json.dumps(document, indent=1) + "\n")
                shutil.move(partial, out)
    holds = describe(rows)
    print("all limits hold" if holds else "some limits do not hold")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
