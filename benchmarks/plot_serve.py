"""The serving figures of a result file for the README: a table, and a plot as SVG.

    python benchmarks/plot_serve.py              # writes serve.svg beside serve.json and the table
    python benchmarks/plot_serve.py --check      # only says whether both are up to date

One panel for each model and number of GPUs. Bars are speed over a baseline of the same panel: dense
bf16, or Marlin where the dense model does not fit. Rows that hold an error are left out. The SVG is
written by hand: it needs no library, and follows the reader's light or dark mode.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "h200" / "serve.json"
README = ROOT / "README.md"
# In the order of bars and rows: name, colour in light mode, in dark mode.
METHODS = {
    "bf16": ("bf16 dense", "#9ca3af", "#6b7280"),
    "machete": ("Machete W4", "#a16207", "#ca8a04"),
    "marlin": ("Marlin W4", "#d97706", "#f59e0b"),
    "humming": ("humming W4", "#0f766e", "#2dd4bf"),
    "flute4": ("ours W4", "#1d4ed8", "#60a5fa"),
    "flute4-head": ("ours W4, head too", "#1e3a8a", "#bfdbfe"),
    "flute3": ("ours W3", "#6d28d9", "#a78bfa"),
    "flute3-head": ("ours W3, head too", "#4c1d95", "#ddd6fe"),
    "flute2": ("ours W2", "#be185d", "#f472b6"),
    "flute2-head": ("ours W2, head too", "#831843", "#fbcfe8"),
}
MODEL_NAMES = {
    "8b": "LLaMA-3-8B", "70b": "LLaMA-3-70B", "gemma2-9b": "Gemma-2-9B",
    "qwen2.5-7b": "Qwen2.5-7B", "tiny": "tiny",
}  # fmt: skip
BASELINES = ("bf16", "marlin")
BATCHES = ("1", "8", "32", "128")
WIDTH, LEFT, RIGHT, BAR_AREA, PANEL, TOP = 860, 44, 12, 150, 232, 58
GAP = 0.12  # of a group's width, between groups


@dataclass(frozen=True)
class Panel:
    """Measured rows of one model on one number of GPUs."""

    model: str
    tp: int
    rows: tuple[dict, ...]

    @property
    def title(self) -> str:
        gpus = "one GPU" if self.tp == 1 else f"{self.tp} GPUs"
        return f"{MODEL_NAMES[self.model]} shapes, {gpus}"

    @property
    def baseline(self) -> dict | None:
        by_method = {row["method"]: row for row in self.rows}
        return next((by_method[name] for name in BASELINES if name in by_method), None)

    def groups(self) -> list[tuple[str, dict[str, float]]]:
        """Speed of each method over the baseline, at each batch size and in prefill."""
        base = self.baseline
        found = []
        for batch in BATCHES:
            at = {row["method"]: base["decode_ms"][batch] / row["decode_ms"][batch]
                  for row in self.rows if batch in row["decode_ms"]}  # fmt: skip
            found.append((f"batch {batch}", at))
        prefill = {row["method"]: row["prefill_tok_s"] / base["prefill_tok_s"]
                   for row in self.rows}  # fmt: skip
        return [*found, ("prefill", prefill)]


def panels(record: dict) -> list[Panel]:
    rows = [row for row in record["rows"] if "error" not in row]
    order, models = list(METHODS), list(MODEL_NAMES)
    kinds = {(row["model"], row["tp"]) for row in rows}
    return [
        Panel(model, tp, tuple(sorted(
            (row for row in rows if (row["model"], row["tp"]) == (model, tp)),
            key=lambda row: order.index(row["method"]),
        )))
        for model, tp in sorted(kinds, key=lambda kind: (models.index(kind[0]), kind[1]))
    ]  # fmt: skip


def table(record: dict) -> list[str]:
    """Lines of the README's table."""
    lines = [
        "| shapes | GPUs | linear layers | batch 1 | 8 | 32 | 128 | prefill tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for panel in panels(record):
        for row in panel.rows:
            times = [f"{row['decode_ms'][batch]:.2f}" for batch in BATCHES]
            name = METHODS[row["method"]][0]
            cells = [MODEL_NAMES[panel.model], str(panel.tp), name, *times]
            lines.append(f"| {' | '.join(cells)} | {row['prefill_tok_s']} |")
    return lines


def style() -> str:
    colours = [(name, light, dark) for name, (_, light, dark) in METHODS.items()]
    light = "".join(f".{name}{{fill:{colour}}}" for name, colour, _ in colours)
    dark = "".join(f".{name}{{fill:{colour}}}" for name, _, colour in colours)
    return (
        "text{font-family:-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;font-size:12px;"
        "fill:#1f2937}.title{font-size:14px;font-weight:600}.small{font-size:9px}"
        ".muted{fill:#6b7280}.grid{stroke:#e5e7eb}.one{stroke:#4b5563;stroke-dasharray:4 3}"
        f"{light}@media (prefers-color-scheme:dark){{text{{fill:#e5e7eb}}.muted{{fill:#9ca3af}}"
        f".grid{{stroke:#374151}}.one{{stroke:#d1d5db}}{dark}}}"
    )


def text(x: float, y: float, content: str, kind: str = "", anchor: str = "middle") -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{name}>{escape(content)}</text>'


def draw_panel(panel: Panel, top: float) -> list[str]:
    base = panel.baseline
    shown = [row["method"] for row in panel.rows if row is not base]
    groups = panel.groups()
    highest = max([1.0, *(value for _, values in groups for value in values.values())])
    scale = BAR_AREA / (highest * 1.08)
    bottom = top + 34 + BAR_AREA
    over = METHODS[base["method"]][0]
    out = [
        text(LEFT, top + 14, panel.title, "title", "start"),
        text(WIDTH - RIGHT, top + 14, f"speed over {over}, higher is better", "muted", "end"),
    ]
    step = 0.5 if highest > 1.2 else 0.25
    for tick in range(int(highest * 1.08 / step) + 1):
        y = bottom - tick * step * scale
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" '
                   'class="grid"/>')  # fmt: skip
        out.append(text(LEFT - 6, y + 4, f"{tick * step:g}", "small muted", "end"))
    group_width = (WIDTH - LEFT - RIGHT) / len(groups)
    bar = min(46.0, group_width * (1 - GAP) / max(1, len(shown)))
    for index, (name, values) in enumerate(groups):
        middle = LEFT + (index + 0.5) * group_width
        out.append(text(middle, bottom + 17, name))
        for place, method in enumerate(shown):
            if method not in values:
                continue
            height = values[method] * scale
            x = middle + (place - len(shown) / 2) * bar
            out.append(f'<rect x="{x + 1:.1f}" y="{bottom - height:.1f}" width="{bar - 2:.1f}" '
                       f'height="{height:.1f}" rx="2" class="{method}"/>')  # fmt: skip
            out.append(text(x + bar / 2, bottom - height - 3, f"{values[method]:.2f}", "small"))
    y = bottom - scale
    out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="one"/>')
    return out


def svg(record: dict) -> str:
    """The whole plot. Panels without a baseline have nothing to show and are left out."""
    drawn = [panel for panel in panels(record) if panel.baseline and len(panel.rows) > 1]
    height = TOP + PANEL * len(drawn)
    used = {row["method"] for panel in drawn for row in panel.rows if row is not panel.baseline}
    heading = f"Serving in vLLM {record['vllm']} on {record['device'].removeprefix('NVIDIA ')}"
    note = f"dummy weights, groups of {record['group_size']}, CUDA graphs and compile on"
    body = [text(LEFT, 20, f"{heading}: {note}", "muted", "start")]
    x = float(LEFT)
    for name in (name for name in METHODS if name in used):
        label = METHODS[name][0]
        body.append(f'<rect x="{x:.1f}" y="32" width="12" height="12" rx="2" class="{name}"/>')
        body.append(text(x + 17, 42, label, anchor="start"))
        x += 36 + 7.2 * len(label)
    for index, panel in enumerate(drawn):
        body += draw_panel(panel, TOP + index * PANEL)
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" role="img" aria-label="{escape(heading)}">',
        f"<style>{style()}</style>", *body, "</svg>", "",
    ])  # fmt: skip


def with_table(readme: str, marker: str, lines: list[str]) -> str:
    """The README with ``lines`` in place of the table that follows ``marker``."""
    before, found, after = readme.partition(marker)
    if not found:
        raise SystemExit(f"cannot update {README}: it lacks the line {marker}")
    _, _, rest = after.lstrip("\n").partition("\n\n")
    return before + marker + "\n" + "\n".join(lines) + "\n\n" + rest


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS)
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    record = json.loads(arguments.results.read_text())
    wanted = {arguments.results.with_suffix(".svg"): svg(record)}
    if arguments.results.resolve() == RESULTS:
        marker = f"<!-- table: {RESULTS.relative_to(ROOT)} -->"
        wanted[README] = with_table(README.read_text(), marker, table(record))
    stale = [path for path, content in wanted.items()
             if not path.exists() or path.read_text() != content]  # fmt: skip
    for path in stale:
        print(f"{'stale' if arguments.check else 'written'}: {path}")
        if not arguments.check:
            path.write_text(wanted[path])
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
