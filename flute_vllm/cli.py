"""The ``flute-vllm`` command. Heavy imports are inside the commands, so that --help is quick."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from flute_vllm import __version__
from flute_vllm.errors import FluteError, format_size
from flute_vllm.tools.commands import register as register_tools

if TYPE_CHECKING:
    from rich.progress import Progress

    from flute_vllm.evaluate import PerplexityResult


GROUP_SIZES = (32, 64, 128, 256, -1)
INTERRUPTED = 130  # 128 + SIGINT, what a shell reports for Ctrl-C

output = Console()
messages = Console(stderr=True)


class _Group(TyperGroup):
    """Ends every command the same way: a message instead of a traceback, and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        _configure_logging()
        try:
            return super().invoke(ctx)
        except FluteError as error:
            messages.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            messages.print("flute: interrupted, no output was written", style="red")
            raise typer.Exit(INTERRUPTED) from error


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Quantizes, converts and inspects LUT-quantized checkpoints for vLLM.",
)

Source = Annotated[str, typer.Argument(metavar="SRC", help="Checkpoint folder or hub id.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to create; must not exist.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def _group_size(value: int) -> int:
    if value not in GROUP_SIZES:
        raise typer.BadParameter(f"{value} is not one of {', '.join(map(str, GROUP_SIZES))}")
    return value


def _refuse_existing(out: Path) -> None:
    """Before a download: an output that is complete, and not one that a crash left to tidy up."""
    from flute_vllm.quantize.journal import JOURNAL
    from flute_vllm.writer import AtomicFolder

    if not (out / JOURNAL).is_file():
        AtomicFolder(out)


def _overrides(values: list[str]) -> dict[str, int]:
    parsed = {}
    for value in values:
        pattern, separator, bits = value.rpartition("=")
        if not separator or not pattern or bits not in {"2", "3", "4"}:
            raise typer.BadParameter(f"{value!r} is not PATTERN=BITS with BITS 2, 3 or 4")
        parsed[pattern] = int(bits)
    return parsed


@app.command()
def quantize(
    src: Source,
    out: Out,
    bits: Annotated[int, typer.Option(min=2, max=4, help="Bits of a code.")] = 4,
    group_size: Annotated[
        int, typer.Option(callback=_group_size, help="32, 64, 128, 256; -1: a whole row.")
    ] = 64,
    recipe: Annotated[
        str, typer.Option(help="nf, fast (no data), balanced, best; or a JSON file of steps.")
    ] = "fast",
    table: Annotated[
        str | None, typer.Option(help="nf, int, fp or a JSON file: kept as it is, not learned.")
    ] = None,
    calib: Annotated[
        str, typer.Option(help="Text for balanced and best: bundled, FILE, hf:DATASET, none.")
    ] = "bundled",
    samples: Annotated[int | None, typer.Option(min=2, help="Windows of text.")] = None,
    length: Annotated[int | None, typer.Option(min=8, help="Tokens of a window.")] = None,
    bpw: Annotated[
        float | None,
        typer.Option(help="Bits per weight to fill with mixed bits, groups and tables."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Where in the text the windows begin.")] = 0,
    scale_dtype: Annotated[
        Literal["float16", "bfloat16"] | None,
        typer.Option(help="Default: the dtype of the weights; bfloat16 for float32 ones."),
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Leave modules dense. Repeatable.")
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN=BITS", help="Such as 're:.*down_proj=4'. Repeatable."),
    ] = None,
    lm_head: Annotated[
        bool, typer.Option("--lm-head", help="Quantize the output head, too.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    ram: Annotated[
        float | None, typer.Option(help="Host memory allowed, GB; refused beforehand if too small.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard what an interrupted run left.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload the finished folder.")
    ] = None,
) -> None:
    """Quantize a dense checkpoint, one block at a time; run it again to resume."""
    overrides = _overrides(override or [])
    from flute_vllm.checkpoint import Checkpoint, resolve_source
    from flute_vllm.quantize.model import quantize_checkpoint
    from flute_vllm.quantize.plan import QuantizeSettings, plan_checkpoint
    from flute_vllm.quantize.progress import ProgressBar, check_memory, print_plan, push, summary

    settings = QuantizeSettings(
        bits=bits, group_size=group_size, recipe=recipe, scale_dtype=scale_dtype,
        skip=tuple(skip or ()), overrides=overrides, table=table, device=device, calib=calib,
        samples=samples, length=length, seed=seed, bpw=bpw, lm_head=lm_head,
    )  # fmt: skip
    _refuse_existing(out)
    folder = resolve_source(src)
    if dry_run or ram is not None:
        checkpoint = Checkpoint(folder)
        plan = plan_checkpoint(checkpoint, settings)
        check_memory(checkpoint, plan, settings, ram)
        if dry_run:
            print_plan(messages, checkpoint, plan, settings)
            return
    try:
        with ProgressBar(messages, settings) as bar:
            limit = None if ram is None else int(ram * 1e9)
            report = quantize_checkpoint(folder, out, settings, bar.callbacks, restart, limit)
    except KeyboardInterrupt as error:
        messages.print(
            f"flute: interrupted; the same command goes on where it stopped ({out}.partial)",
            style="red", highlight=False, soft_wrap=True,
        )  # fmt: skip
        raise typer.Exit(INTERRUPTED) from error
    output.print(summary(report, out), highlight=False, markup=False, soft_wrap=True)
    if push_to_hub is not None:
        output.print(push(out, push_to_hub), highlight=False, markup=False)


@app.command()
def convert(src: Source, out: Out) -> None:
    """Convert a checkpoint of another format (FLUTE zoo) to the native one, bit for bit."""
    from flute_vllm.checkpoint import resolve_source
    from flute_vllm.convert import convert_checkpoint
    from flute_vllm.writer import AtomicFolder

    AtomicFolder(out)
    _rewrite(convert_checkpoint, resolve_source(src), out)


@app.command()
def dequantize(src: Source, out: Out) -> None:
    """Write the dense twin: exactly the weights that the kernels compute with."""
    from flute_vllm.checkpoint import resolve_source
    from flute_vllm.convert import dequantize_checkpoint
    from flute_vllm.writer import AtomicFolder

    AtomicFolder(out)
    _rewrite(dequantize_checkpoint, resolve_source(src), out)


@app.command()
def info(
    src: Source,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint is; reads headers only."""
    from flute_vllm.checkpoint import resolve_source
    from flute_vllm.info import describe

    summary = describe(resolve_source(src))
    if not tensors:
        summary.pop("tensors")
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    _print_info(summary)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder or hub id.")],
    texts: Annotated[list[Path], typer.Argument(metavar="TEXT...", help="UTF-8 text files.")],
    reference: Annotated[
        str | None, typer.Option(help="Original model: adds KL divergence and agreement.")
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens of one forward pass.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows at once.")] = 1,
    device: Annotated[str, typer.Option(help="Where to compute; vLLM decides itself.")] = "cpu",
    engine: Annotated[
        Literal["transformers", "vllm"],
        typer.Option(help="transformers: float32, the format; vllm: as it is served."),
    ] = "transformers",
    top: Annotated[
        int,
        typer.Option(min=0, help="vllm: tokens a position for the KL divergence; 0: all."),
    ] = 256,
    as_json: Json = False,
) -> None:
    """Measure perplexity on texts; with a reference, KL divergence and top-1 agreement."""
    from flute_vllm.checkpoint import resolve_source
    from flute_vllm.evaluate import load_model, perplexity, read_texts

    contents = read_texts(texts)
    if engine == "vllm":
        from flute_vllm.evaluate_vllm import perplexity_vllm

        dense = None if reference is None else resolve_source(reference)
        served = perplexity_vllm(resolve_source(model), contents, window, reference=dense, top=top)
        _print_evaluation(model, served, as_json)
        return
    network, tokenizer = load_model(resolve_source(model), device=device)
    other = None
    if reference is not None:
        other, _ = load_model(resolve_source(reference), device=device)
    result = perplexity(
        network, tokenizer, contents, window=window, batch_size=batch_size, reference=other
    )
    _print_evaluation(model, result, as_json)


def _print_evaluation(model: str, result: PerplexityResult, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"model": model, "perplexity": result.ppl, **result.to_json()}, indent=2))
        return
    output.print(f"perplexity {result.ppl:.4f} over {result.tokens} tokens", highlight=False)
    if result.kl is not None:
        output.print(f"KL divergence {result.kl:.5f} nats per token", highlight=False)
        output.print(f"top-1 agreement {result.top1_agreement:.2%}", highlight=False)
    output.print(result.protocol, style="dim", highlight=False)


register_tools(app)


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def _configure_logging() -> None:
    logger = logging.getLogger("flute_vllm")
    if not any(isinstance(handler, RichHandler) for handler in logger.handlers):
        handler = RichHandler(console=messages, show_time=False, show_path=False, markup=False)
        logger.addHandler(handler)
        logger.propagate = False


@contextmanager
def _progress() -> Iterator[Progress]:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
        TextColumn("{task.fields[error]}"), TextColumn("ETA"), Remaining(),
    )  # fmt: skip
    quiet = not messages.is_terminal  # a log file gets no bar, and no blank line for it
    with Progress(*columns, console=messages, transient=True, disable=quiet) as progress:
        yield progress


def _rewrite(function: Any, folder: Path, out: Path) -> None:
    with _progress() as progress:
        task = progress.add_task("reading headers", total=None, error="")

        def on_module(module: str, done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, description=escape(module))

        function(folder, out, on_module)
    output.print(f"wrote {escape(str(out))}", highlight=False, soft_wrap=True)


def _print_info(summary: dict[str, Any]) -> None:
    per_weight = summary["bits_per_weight"]
    histogram = ", ".join(f"{count} x {bits} bit" for bits, count in summary["bits"].items())
    rows = {
        "format": f"{summary['format']} {summary['format_version'] or ''}".strip(),
        "architecture": summary["architecture"],
        "size": f"{format_size(summary['bytes'])} in {summary['files']} files",
        "parameters": f"{summary['parameters']:,}",
        "quantized modules": f"{summary['quantized_modules']} ({histogram or 'none'})",
        "dense tensors": summary["dense_tensors"],
        "bits per weight": ", ".join(
            f"{name} {value:.3f}" for name, value in per_weight.items() if value is not None
        ),
        "tensor-parallel sizes": ", ".join(map(str, summary["tensor_parallel_sizes"])),
    }
    if summary["error"] is not None:
        rows["relative squared error"] = f"{summary['error']:.3g}"
    grid = Table(title=escape(summary["path"]), show_header=False)
    for name, value in rows.items():
        grid.add_row(name, escape(str(value)))
    output.print(grid)
    if "tensors" in summary:
        listing = Table("tensor", "dtype", "shape", "bytes", "file")
        for tensor in summary["tensors"]:
            shape = " x ".join(map(str, tensor["shape"]))
            listing.add_row(
                escape(tensor["name"]), tensor["dtype"], shape, f"{tensor['bytes']:,}",
                escape(tensor["file"]),
            )  # fmt: skip
        output.print(listing)


if __name__ == "__main__":
    app()
