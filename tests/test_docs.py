"""The README says what is true: numbers, commands, variables and links."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
sys.path.insert(0, str(ROOT / "benchmarks"))
import compare_formats  # noqa: E402
import plot_serve  # noqa: E402
import targets  # noqa: E402


def test_cpu_table_equals_the_committed_results():
    path = "benchmarks/results/cpu/linear.json"
    results = json.loads((ROOT / path).read_text())["rows"]
    speedups = {(r["isa"], r["bits"], r["group_size"], r["m"]): r["speedup"] for r in results}
    table = README.split(f"<!-- table: {path} -->")[1].split("\n\n")[0].strip().splitlines()
    columns = [int(m) for m in re.findall(r"M=(\d+)", table[0])]
    assert len(table) > 8
    for line in table[2:]:
        name, setting, *values = [cell.strip() for cell in line.strip("|").split("|")]
        bits, group = map(int, setting.split(","))
        for m, value in zip(columns, values, strict=True):
            assert value == f"{speedups[name.strip('`'), bits, group, m]:.2f}"


def test_gpu_table_equals_the_committed_results():
    path = "benchmarks/results/h200/kernels.json"
    rows = json.loads((ROOT / path).read_text())["rows"]
    cells = {}
    for row in rows:
        us = targets.time_of(row)
        ratio = us / min(row["peers"].values())
        cells[f"{row['family']} {row['layer']}", row["m"]] = f"{us:.1f} ({ratio:.2f})"
    table = README.split(f"<!-- table: {path} -->")[1].split("\n\n")[0].strip().splitlines()
    counts = [int(name.strip().removeprefix("M=")) for name in table[0].split("|")[3:-1]]
    assert len(table) - 2 == len({layer for layer, _ in cells})
    for line in table[2:]:
        layer, _, *values = [cell.strip() for cell in line.strip("|").split("|")]
        assert values == [cells[layer, m] for m in counts]


def test_table_of_formats_equals_the_committed_results():
    path = "benchmarks/results/h200/kernels_formats.json"
    rows = json.loads((ROOT / path).read_text())["rows"]
    table = README.split(f"<!-- table: {path} -->")[1].split("\n\n")[0].strip().splitlines()
    assert table == compare_formats.table(rows)


def test_quality_table_equals_the_committed_results():
    path = "benchmarks/results/h200/quality.json"
    rows = json.loads((ROOT / path).read_text())["rows"]
    table = README.split(f"<!-- table: {path} -->")[1].split("\n\n")[0].strip().splitlines()
    bits = [int(cell.split()[0]) for cell in table[0].split("|")[2:-1]]
    assert len(table) - 2 == len({row["recipe"] for row in rows})
    for line in table[2:]:
        name, *values = [cell.strip() for cell in line.strip("|").split("|")]
        for width, value in zip(bits, values, strict=True):
            seeds = [r for r in rows if (r["recipe"], r["bits"]) == (name.strip("`"), width)]
            d, kld = (sum(r[k] for r in seeds) / len(seeds) for k in ("dlog_ppl", "kld"))
            assert value == f"{d:.4f} ({kld:.4f})"


def test_serving_table_and_plot_equal_the_committed_results():
    """``python benchmarks/plot_serve.py`` writes both."""
    record = json.loads(plot_serve.RESULTS.read_text())
    path = plot_serve.RESULTS.relative_to(ROOT)
    table = README.split(f"<!-- table: {path} -->")[1].split("\n\n")[0].strip().splitlines()
    assert table == plot_serve.table(record)
    plot = plot_serve.RESULTS.with_suffix(".svg")
    assert plot.read_text() == plot_serve.svg(record)
    assert f"]({plot.relative_to(ROOT)})" in README


def test_demo_table_equals_the_committed_results():
    path = "benchmarks/results/cpu/demo.json"
    rows = json.loads((ROOT / path).read_text())["rows"]
    table = README.split(f"<!-- table: {path} -->")[1].split("\n\n")[0].strip().splitlines()
    expected = [
        f"| {row['name']} | {row['bits_per_weight']:.2f} | {row['bytes'] / 1e6:.2f} MB "
        f"| {row['perplexity']:.3f} |"
        for row in rows
    ]
    assert table[2:] == expected


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "kernels/README.md"])
def test_links_and_paths_exist(document):
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / document).parent / target).exists(), target
    for name in re.findall(
        r"`((?:flute_vllm|kernels|tests|benchmarks|examples|\.ci)/[\w./-]+)`", text
    ):
        assert (ROOT / name).exists(), name


def test_every_command_is_documented_and_every_documented_command_exists():
    from flute_vllm.cli import app

    commands = set(typer.main.get_command(app).commands) - {"version"}
    documented = set(re.findall(r"^\| `flute-vllm (\w+)", README, flags=re.MULTILINE))
    assert documented == commands


def test_every_environment_variable_is_documented():
    python = [*ROOT.glob("flute_vllm/**/*.py"), ROOT / "setup.py"]
    used = set()
    for path in python:
        used |= set(re.findall(r"""["'](FLUTE_[A-Z_]+)["']""", path.read_text()))
    for path in ROOT.glob("kernels/**/*.c*"):
        used |= set(re.findall(r"""getenv\("(FLUTE_[A-Z_]+)"\)""", path.read_text()))
    used |= set(re.findall(r"(FLUTE_[A-Z_]+)", (ROOT / "Makefile").read_text()))
    documented = set(re.findall(r"^\| `(FLUTE_[A-Z_]+)`", README, flags=re.MULTILINE))
    assert used == documented


def test_format_fields_are_documented():
    from flute_vllm.schema import FluteQuantizationConfig

    fields = set(FluteQuantizationConfig.model_fields)
    section = README.split("### config.json")[1].split("### Tensors")[0]
    assert set(re.findall(r"^\| `(\w+)`", section, flags=re.MULTILINE)) == fields
