"""What a run leaves beside the weights: report.json and the model card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flute_vllm import __version__
from flute_vllm.checkpoint import Checkpoint
from flute_vllm.quantize.plan import Plan, QuantizeSettings

BEFORE_TUNING = "output_error_before_tuning"
_HUB = "models--"  # how folders of the hub's cache begin: models--org--name/snapshots/<hash>


@dataclass(frozen=True)
class ModuleReport:
    """One module when it is done.

    ``error`` is |W - W'|^2 / |W|^2. ``output_error`` is the same of the layer's output on
    held-out activations, None without calibration. ``gates`` tells each step's error, on those
    activations or else on the weights, and whether its result was kept; it belongs to the fused
    group. ``seconds`` is the module's share of its group's time.

    Where scales and table were tuned for the whole model since, ``error`` is that of the tuned
    weights, and ``output_error``, which is not measured again, is told as
    ``output_error_before_tuning`` (:func:`after_tuning`).
    """

    module: str
    bits: int
    group_size: int
    weights: int
    error: float
    output_error: float | None
    gates: list[dict[str, Any]]
    seconds: float


def after_tuning(module: dict[str, Any], error: float) -> dict[str, Any]:
    """A module's report once its scales and table were replaced, with its new ``error``."""
    before = module["output_error"]
    return {**module, "error": error, "output_error": None, BEFORE_TUNING: before}


def make_report(
    plan: Plan,
    settings: QuantizeSettings,
    modules: list[dict[str, Any]],
    checkpoint: Checkpoint,
    calibration: dict[str, Any] | None,
) -> dict[str, Any]:
    """The content of report.json; ``modules`` are :class:`ModuleReport` as JSON."""
    weights = sum(module["weights"] for module in modules)

    def mean(field: str) -> float | None:
        known = [(m[field], m["weights"]) for m in modules if m.get(field) is not None]
        total = sum(weight for _, weight in known)
        return sum(value * weight for value, weight in known) / total if total else None

    # A mean over both kinds of output errors would be of no model.
    before = {f"mean_{BEFORE_TUNING}": mean(BEFORE_TUNING)} if any(
        BEFORE_TUNING in module for module in modules) else {}  # fmt: skip
    return {
        "version": __version__,
        "settings": settings.to_json(),
        "recipe": plan.recipe.model_dump(mode="json"),
        "calibration": calibration,
        "totals": {
            "modules": len(modules),
            "weights": weights,
            "bits_per_weight": plan.bits_per_weight,
            "mean_error": mean("error"),
            "mean_output_error": None if before else mean("output_error"),
            **before,
            "source_bytes": checkpoint.nbytes,
            "output_bytes": plan.nbytes,
            "seconds": sum(module["seconds"] for module in modules),
        },
        "notes": plan.notes,
        "modules": {m["module"]: {k: v for k, v in m.items() if k != "module"} for m in modules},
    }


CARD = """---
{front}library_name: vllm
tags: [flute, quantized, {bits}-bit]
---

# {name}, {bits} bits

{name} with the weights of its linear layers stored as {bits}-bit indices into a lookup table, by
`flute-vllm quantize --recipe {recipe}` of flute_vllm {version}.

```
pip install flute-vllm
vllm serve <this folder or repository>
```

| | |
|---|---|
| bits per weight of the quantized layers, scales and tables included | {bpw:.3f} |
| group size | {group_size} |
| recipe | {recipe}: {summary} |
| calibration | {calibration} |
| quantized modules | {modules}, {weights:,} weights |
| size of the weight files | {bytes:,} bytes, of {source_bytes:,} |
| relative squared error of the weights | {error:.3g} |
| the same of the layers' outputs, on held-out calibration text | {output_error} |

`report.json` has the figures of every layer. With transformers: `import flute_vllm`, then
`AutoModelForCausalLM.from_pretrained`. Perplexity and KL divergence against the original:
`flute-vllm eval <this folder> TEXT --reference <original>`.
"""


def make_card(report: dict[str, Any], source: Path, name: str) -> str:
    """The README.md of the output; licence and base model are those of the source's card.

    Nothing in it depends on time or machine, so that equal runs give equal folders.
    """
    totals, settings = report["totals"], report["settings"]
    calibration = report["calibration"]
    described = "none"
    if calibration is not None:
        described = (
            f"{calibration['name']}, {calibration['samples']} windows of "
            f"{calibration['length']} tokens"
        )
        if "sha256" in calibration:
            described += f", SHA-256 of the text `{calibration['sha256'][:16]}`"
    return CARD.format(
        front=_front_matter(source), name=name, bits=settings["bits"], version=report["version"],
        recipe=report["recipe"]["name"], summary=report["recipe"]["summary"],
        bpw=totals["bits_per_weight"], group_size=settings["group_size"], calibration=described,
        modules=totals["modules"], weights=totals["weights"], bytes=totals["output_bytes"],
        source_bytes=totals["source_bytes"], error=totals["mean_error"],
        output_error=told_output_error(totals) or "not measured",
    )  # fmt: skip


def told_output_error(totals: dict[str, Any]) -> str:
    """The mean output error of a report for people; empty where none was measured."""
    error, before = totals["mean_output_error"], totals.get(f"mean_{BEFORE_TUNING}")
    if error is not None:
        return f"{error:.3g}"
    return "" if before is None else f"{before:.3g} before tuning for the whole model"


def model_name(folder: Path) -> str:
    """What a source is called: its id on the hub if it lies in the hub's cache, else its folder."""
    path = folder.resolve()
    if path.parent.name == "snapshots" and path.parents[1].name.startswith(_HUB):
        return path.parents[1].name.removeprefix(_HUB).replace("--", "/", 1)
    return path.name


def _front_matter(source: Path) -> str:
    """The lines of the source's card that stay true of a quantized copy."""
    card = source / "README.md"
    if not card.is_file():
        return ""
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in [x.strip() for x in lines[1:]]:
        return ""
    end = [line.strip() for line in lines].index("---", 1)
    kept = ("license", "language", "base_model", "pipeline_tag")
    found = [line for line in lines[1:end] if line.startswith(kept) and line.rstrip()[-1:] != ":"]
    return "".join(f"{line}\n" for line in found)
