"""The commands ``doctor``, ``tune`` and ``bench`` of ``flute-vllm``: options and printing."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

output = Console()

Rows = Annotated[str, typer.Option(help="Rows of x, such as 1,16,256.")]
Bits = Annotated[int, typer.Option(min=2, max=4, help="For a dense model: bits to assume.")]
Group = Annotated[int, typer.Option(help="For a dense model: group size to assume.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def doctor(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Also: the kernel of each layer.")
    ] = None,
    rows: Rows = "1,8,16,32,64,1024",
    assume: Annotated[
        str | None, typer.Option(help="Choose kernels as for another device: h200 or cpu.")
    ] = None,
    bits: Bits = 4,
    group_size: Group = 128,
    as_json: Json = False,
) -> None:
    """Show versions, devices, the extension, and which kernel would run and why."""
    from flute_vllm.tools import doctor as tool
    from flute_vllm.tools.layers import parse_rows

    numbers, gpu = parse_rows(rows), _device(assume)
    gpus, library, plugin = tool.devices(), tool.extension(), tool.plugin_state()
    found = {
        "versions": tool.versions(), "plugin": plugin, "gpus": gpus, "extension": library,
        "problems": tool.problems(gpus, library, plugin),
    }  # fmt: skip
    if model is not None:
        found["kernels"] = [
            asdict(tool.choose(layer, m, gpu))
            for layer in _layers(model, bits, group_size)
            for m in numbers
        ]
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _print_doctor(found)
    if found["problems"]:
        raise typer.Exit(1)


def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder or hub id.")],
    rows: Rows = "1,8,64",
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    peers: Annotated[
        str, typer.Option(help="Others to time on a GPU, where installed; empty: none.")
    ] = "marlin,machete,humming,bnb",
    repeats: Annotated[int, typer.Option(min=1, help="Timings of each cell.")] = 7,
    bits: Bits = 4,
    group_size: Group = 128,
    as_json: Json = False,
) -> None:
    """Time this model's layers here: ours, dense, and other kernels where installed."""
    import torch

    from flute_vllm.tools import bench as tool
    from flute_vllm.tools.layers import parse_rows

    numbers = parse_rows(rows)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    layers = _layers(model, bits, group_size)
    wanted = [name for name in peers.split(",") if name] if device.startswith("cuda") else []
    place = torch.device(device)
    results = list(tool.measure(layers, numbers, place, wanted, repeats))
    if as_json:
        record = {"device": device, "results": [asdict(r) for r in results],
                  "totals": tool.totals(results)}  # fmt: skip
        print(json.dumps(record, indent=2))
        return
    _print_bench(results, tool.totals(results))


def tune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder or hub id.")],
    out: Annotated[
        str | None, typer.Option(help="Tuning file; default: the one of this GPU in the package.")
    ] = None,
    rows: Annotated[str, typer.Option(help="Largest M of each bucket; empty: all.")] = "",
    budget_s: Annotated[float, typer.Option(help="Stop after it; run again to go on.")] = 0,
    bits: Bits = 4,
    group_size: Group = 128,
) -> None:
    """Time launches of this model's layers on this GPU; write the best to a tuning file."""
    import torch

    from flute_vllm import tuning
    from flute_vllm.errors import FluteError
    from flute_vllm.tools import tune as tool
    from flute_vllm.tools.layers import parse_rows

    if not torch.cuda.is_available():
        raise FluteError(
            "nothing to tune", where="flute-vllm tune", why="torch finds no CUDA device here",
            fix="run it on the GPU host that will serve the model",
        )  # fmt: skip
    gpu = tuning.device_of(torch.device("cuda", torch.cuda.current_device()))
    if gpu.capability != 90:
        raise FluteError(
            "nothing to tune", where=gpu.name,
            why=f"its capability is {gpu.capability}; only kernels of 9.0 have measured launches",
            fix="use the computed launches as they are",
        )  # fmt: skip
    path = Path(out) if out else tuning.CONFIG_FOLDER / f"{gpu.name}.json"
    counts = parse_rows(rows) if rows else tool.TUNED_ROWS
    tool.tune(_layers(model, bits, group_size), path, rows=counts, budget_s=budget_s)


def register(app: typer.Typer) -> None:
    """Adds the commands to the ``flute-vllm`` command."""
    app.command()(doctor)
    app.command()(tune)
    app.command()(bench)


def _layers(model: str, bits: int, group_size: int) -> list:
    from flute_vllm.checkpoint import resolve_source
    from flute_vllm.format import LayerSpec
    from flute_vllm.tools.layers import model_layers

    return model_layers(resolve_source(model), LayerSpec(bits, group_size))


def _device(assume: str | None):
    """The GPU to choose kernels for; None: the CPU. Raises FluteError for an unknown name."""
    import torch

    from flute_vllm import tuning
    from flute_vllm.errors import FluteError

    if assume is None:
        has_gpu = torch.cuda.is_available()
        return tuning.device_of(torch.device("cuda", 0)) if has_gpu else None
    known = {"h200": tuning.H200, "cpu": None}
    if assume not in known:
        raise FluteError(
            "unknown device", where=f"--assume {assume}",
            why=f"known are {', '.join(known)}", fix="leave it out for the device of this machine",
        )  # fmt: skip
    return known[assume]


def _print_doctor(found: dict) -> None:
    library = found["extension"]
    rows = {
        **found["versions"],
        "plugin": found["plugin"],
        "GPUs": "; ".join(
            f"{g['name']}, {g['capability']}, {g['memory_gib']} GiB" for g in found["gpus"]
        )
        or "none",
        "extension": f"{library['kernels']} ({library['path']})",
        "CPU kernels": f"{library['cpu']['in use']} of {', '.join(library['cpu']['possible'])}",
        "CUDA kernels": ", ".join(library["architectures"]) if library["cuda"] else "not built",
    }
    grid = Table(show_header=False)
    for name, value in rows.items():
        grid.add_row(name, escape(str(value)))
    output.print(grid)
    if "kernels" in found:
        table = Table("layer", "rows", "kernel", "launch", "MB of workspace", "why")
        for choice in found["kernels"]:
            launch = ",".join(map(str, choice["config"])) if choice["config"] else ""
            workspace = (
                f"{choice['workspace_bytes'] / 1e6:.1f}" if choice["workspace_bytes"] else ""
            )
            table.add_row(
                escape(choice["layer"]), str(choice["m"]), choice["kernel"], launch, workspace,
                escape(choice["why"]),
            )  # fmt: skip
        output.print(table)
    for problem in found["problems"]:
        output.print(f"problem: {problem}", style="red", markup=False, soft_wrap=True)
    if not found["problems"]:
        output.print("no problems found", style="green")


def _print_bench(results: list, totals: dict) -> None:
    names = list(dict.fromkeys(name for result in results for name in result.us))
    table = Table("layer", "out x in", "bits", "group", "rows", title="microseconds a call")
    for name in (*names, "over dense"):
        table.add_column(name, justify="right")
    for r in results:
        cells = [f"{r.us[name]:.1f}" if name in r.us else "" for name in names]
        table.add_row(
            f"{r.count} x {escape(r.layer)}", f"{r.n} x {r.k}", str(r.bits), str(r.group_size),
            str(r.m), *cells, f"{r.us['dense'] / r.us['ours']:.2f}x",
        )  # fmt: skip
    output.print(table)
    for m, sums in totals.items():
        parts = ", ".join(f"{name} {us / 1e3:.3f} ms" for name, us in sums.items())
        output.print(f"all layers, {m} rows: {parts}", highlight=False)
    missing = {name: why for result in results for name, why in result.missing.items()}
    for name, why in missing.items():
        output.print(f"{name}: not timed, {why}", style="dim", markup=False, soft_wrap=True)
