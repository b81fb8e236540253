"""Tunes the real numbers of a finished quantization for the output of the whole model.

Recipes fit one matrix after another to its own output. What is left after that is how the errors
of many matrices add up, which no matrix sees. So at the end scales and tables are moved by Adam
down the KL divergence between the dense and the quantized model on calibration text; codes, norms
and embeddings stay as they are. The forward pass computes with what will be stored, the backward
pass as if nothing was rounded (straight through).

The model with its weights, their codes and the activations of some windows must fit the device.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from flute_vllm.checkpoint import Checkpoint
from flute_vllm.errors import FluteError
from flute_vllm.format import LayerSpec, unpack
from flute_vllm.quantize.calibration import Windows
from flute_vllm.quantize.journal import SCRATCH, Attempts
from flute_vllm.quantize.memory import (
    TOKENS_AT_ONCE,
    is_run_again,
    memory_totals,
    tuning_dtype,
    tuning_parts,
)
from flute_vllm.quantize.names import decoder_stacks, find_linears
from flute_vllm.quantize.plan import Plan
from flute_vllm.quantize.recipes import Finetuning
from flute_vllm.quantize.room import available_memory, is_out_of_memory
from flute_vllm.quantize.scales import round_scales
from flute_vllm.quantize.state import sum_by_index
from flute_vllm.writer import whole_file

logger = logging.getLogger(__name__)
MOST_KILLED = 2  # attempts; one may have been the user's doing, or of a machine that went down
Found = tuple[dict[str, torch.Tensor], dict[str, Any]]


class TunedLinear(nn.Module):
    """A linear layer [N, K] with fixed codes, whose scales and table are parameters.

    ``factors`` [N, K / group_size] multiply the scales that it began with, so that one rate fits
    scales of every size. ``table`` is shared by the modules of a fused group; None if it stays.
    With ``is_dense`` the layer computes with the weights of the dense model.
    """

    def __init__(
        self, linear: nn.Linear, spec: LayerSpec, codes: torch.Tensor, scales: torch.Tensor,
        table: torch.Tensor,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight, self.bias, self.spec = linear.weight, linear.bias, spec
        self.codes, self.begun, self.table = codes, scales.float(), table
        self.factors = nn.Parameter(torch.ones_like(self.begun))
        self.is_dense = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_dense:
            return functional.linear(x, self.weight, self.bias)
        return _Product.apply(x, self.factors, self.table, self)

    def stored(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and table as they would be written now."""
        dtype = self.spec.torch_scale_dtype
        return (self.begun * self.factors.detach()).to(dtype), self.table.detach().to(dtype)

    def dense(self) -> torch.Tensor:
        """float32 [N, K], rounded as the format says."""
        values, scales = self.parts()
        return (values * scales).to(self.spec.torch_scale_dtype).float()

    def parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [N, K]: table values, and the scale of each."""
        scales, table = self.stored()
        rows, columns = self.codes.shape
        index, values = self.codes, table.float()
        if table.dim() == 2:
            index = index[:, 0::2].int() * 2**self.spec.bits + index[:, 1::2].int()
        values = values.index_select(0, index.reshape(-1).int()).view(rows, columns)
        return values, scales.float().repeat_interleave(columns // scales.shape[1], 1)


class _Product(torch.autograd.Function):
    """``x W^T + b``; keeps x alone and makes W again for the gradients, to spare memory."""

    @staticmethod
    def forward(ctx, x, factors, table, layer):
        ctx.save_for_backward(x)
        ctx.layer = layer
        return functional.linear(x, layer.dense().to(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx, grad):
        (x,), layer = ctx.saved_tensors, ctx.layer
        of_x = grad @ layer.dense().to(grad.dtype) if ctx.needs_input_grad[0] else None
        slope = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        values, scales = layer.parts()
        rows, groups = layer.begun.shape
        of_factors = (slope * values).view(rows, groups, -1).sum(2, dtype=torch.float32)
        of_table = None
        if ctx.needs_input_grad[2]:
            # Sums in a fixed order: a run that is resumed must give the same bytes.
            products, index = (slope * scales).view(-1), layer.codes.view(-1)
            index = index.long() if index.device.type == "cpu" else index
            of_table = sum_by_index(products, index, layer.table.numel()).float()
        return of_x, of_factors * layer.begun, of_table, None


def tune_scales(
    folder: Path,
    output: Path,
    plan: Plan,
    windows: Windows,
    tuning: Finetuning,
    device: torch.device,
    on_step: Callable[[int, int, float], None] = lambda step, steps, loss: None,
    host_limit: int | None = None,
) -> Found:
    """Tensors to replace in the output, by name, and what was measured.

    Nothing is replaced when no epoch lowers the loss of the held-out windows, or, with a WARNING,
    when the model cannot be loaded there or earlier attempts were killed: the output is then that
    of the steps of the recipe.

    Args:
        folder: the dense model.
        output: weight files of the finished quantization; a note of the attempt lies beside them.
        plan: specs of the modules, and the files they are in.
        windows: of the calibration text; the held-out ones judge.
        tuning: rates, epochs and what is minimised.
        device: where the model is loaded.
        on_step: called with the step, their number and the loss in nats a token.
        host_limit: bytes of host memory that may be used; None: what is there.
    """
    checkpoint = Checkpoint(folder)
    attempts = Attempts(output / f"{SCRATCH}tuning.json")
    length = windows.ids.shape[1]
    why = _why_not(attempts, checkpoint, plan, length, device, host_limit)
    if not why:
        with attempts.begun() as survived:

            def told(step: int, steps: int, loss: float) -> None:
                survived()  # of the first step: the next ones need no more memory
                on_step(step, steps, loss)

            try:
                return _load_tuner(checkpoint, output, plan, windows, tuning, device).run(told)
            except (RuntimeError, MemoryError, FluteError) as error:
                if not (isinstance(error, FluteError) or is_out_of_memory(error)):
                    raise
                found = error.why if isinstance(error, FluteError) else str(error)
                why = (found.splitlines() or [type(error).__name__])[0]
    # No reason to lose what hours of work gave: the output is complete without this.
    logger.warning(
        "flute: scales and tables are not tuned for the whole model on %s (%s); the "
        "checkpoint is what the steps of recipe %s give",
        device, why, plan.recipe.name,
    )  # fmt: skip
    return {}, {"left_out": why}


def _why_not(
    attempts: Attempts, checkpoint: Checkpoint, plan: Plan, length: int, device: torch.device,
    host_limit: int | None,
) -> str:  # fmt: skip
    """What stands against an attempt, found before anything is read; empty where nothing does.

    Too much memory is not always an error that can be caught: the kernel may end the process.
    """
    if attempts.killed >= MOST_KILLED:
        return (
            f"{attempts.killed} attempts were killed before their first step was done, as the "
            "kernel does where memory ends; to try again, quantize anew: with --restart, or, once "
            "the output is complete, after removing it"
        )
    parts = tuning_parts(checkpoint, plan, length, device.type)
    on_host, on_device = memory_totals(parts, device.type)
    free = available_memory()
    there = {"the host": (on_host, free if host_limit is None else min(free, host_limit))}
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the steps used is not free until torch gives it back
        there[str(device)] = (on_device, torch.cuda.mem_get_info(device)[0])
    for place, (needed, left) in there.items():
        if needed > left:
            return f"it needs about {needed:,} bytes, {place} has {left:,}"
    return ""


def _load_tuner(
    checkpoint: Checkpoint, output: Path, plan: Plan, windows: Windows, tuning: Finetuning,
    device: torch.device,
) -> _Tuner:  # fmt: skip
    from flute_vllm.evaluate import load_dense

    dtype = tuning_dtype(checkpoint, device.type)
    model = load_dense(checkpoint.folder, dtype).eval().requires_grad_(False).to(device)
    layers = _replace_linears(model, checkpoint, output, plan, device)
    if is_run_again(checkpoint) and hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        # Blocks look at their own flag; that of what is inside would switch dropout on.
        for stack in decoder_stacks(model):
            for block in model.get_submodule(stack):
                block.training = True
    return _Tuner(model, layers, windows, tuning, device)


class _Tuner:
    """Adam with a rate that falls to zero, and the best epoch on held-out windows."""

    def __init__(
        self, model: nn.Module, layers: Mapping[str, TunedLinear], windows: Windows,
        tuning: Finetuning, device: torch.device,
    ) -> None:  # fmt: skip
        self.model, self.layers, self.tuning, self.device = model, layers, tuning, device
        cut = len(windows.ids) - windows.heldout
        self.training, self.heldout = windows.ids[:cut], windows.ids[cut:]
        length = windows.ids.shape[1]
        self.at_once = max(1, TOKENS_AT_ONCE // length)
        self.in_step = max(1, tuning.tokens // length)

    def run(self, on_step: Callable[[int, int, float], None]) -> Found:
        tuning = self.tuning
        tables = {id(t): t for t in (layer.table for layer in self.layers.values())
                  if t.requires_grad}  # fmt: skip
        factors = [layer.factors for layer in self.layers.values()]
        groups: list[dict[str, Any]] = [{"params": factors, "lr": tuning.rate}]
        if tables:
            groups.append({"params": list(tables.values()), "lr": tuning.table_rate})
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        starts = [group["lr"] for group in groups]
        order = torch.Generator().manual_seed(0)
        a_round = -(-len(self.training) // self.in_step)
        steps, step = a_round * tuning.epochs, 0
        kept: dict[str, torch.Tensor] = {}
        # Kernels of fused attention add up their gradients in any order on a GPU.
        with sdpa_kernel(SDPBackend.MATH):
            losses = [self._judge()]
            for _ in range(tuning.epochs):
                shuffled = self.training[torch.randperm(len(self.training), generator=order)]
                for ids in shuffled.split(self.in_step):
                    for group, rate in zip(optimizer.param_groups, starts, strict=True):
                        group["lr"] = rate * (1 - step / steps)
                    loss = 0.0
                    for part in ids.split(self.at_once):
                        share = self._loss(part) * (len(part) / len(ids))
                        share.backward()
                        loss += float(share.detach())
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    step += 1
                    on_step(step, steps, loss)
                losses.append(self._judge())
                if not math.isfinite(losses[-1]):
                    losses.pop()
                    break
                if losses[-1] < min(losses[:-1]):
                    kept = self._tensors()
        return kept, {"heldout_loss": [float(f"{loss:.6g}") for loss in losses]}

    def _loss(self, ids: torch.Tensor) -> torch.Tensor:
        """Mean over tokens of KL(dense || quantized), and of the text's own loss as its share."""
        ids = ids.to(self.device)
        with torch.no_grad():
            wanted = self._log_probabilities(ids, is_dense=True)
        found = self._log_probabilities(ids, is_dense=False)
        loss = functional.kl_div(found, wanted, log_target=True, reduction="none").sum(-1).mean()
        if self.tuning.text:
            told = [v[:, :-1].gather(-1, ids[:, 1:, None]) for v in (wanted, found)]
            loss = loss + self.tuning.text * (told[0] - told[1]).mean()
        return loss

    def _log_probabilities(self, ids: torch.Tensor, is_dense: bool) -> torch.Tensor:
        for layer in self.layers.values():
            layer.is_dense = is_dense
        return self.model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)

    @torch.no_grad()
    def _judge(self) -> float:
        parts = self.heldout.split(self.at_once)
        return sum(float(self._loss(part)) * len(part) for part in parts) / len(self.heldout)

    def _tensors(self) -> dict[str, torch.Tensor]:
        found = {}
        for name, layer in self.layers.items():
            scales, table = layer.stored()
            found[f"{name}.scales"] = round_scales(scales, scales.dtype, name).cpu()
            if layer.table.requires_grad:
                found[f"{name}.table"] = table.cpu()
        return found


def _replace_linears(
    model: nn.Module, checkpoint: Checkpoint, output: Path, plan: Plan, device: torch.device
) -> dict[str, TunedLinear]:
    """The layers that are tuned, by checkpoint name."""
    linears = find_linears(model, checkpoint, plan.specs)
    layers = {}
    for unit in plan.units:
        if not unit.groups:
            continue
        with safe_open(output / unit.file, "pt", str(device)) as file:
            for group in unit.groups:
                spec = plan.specs[group[0]]
                table = nn.Parameter(file.get_tensor(f"{group[0]}.table").float())
                # Tables of pairs stay: sums for 256 entries would take most of the time.
                is_fixed = plan.codebooks[spec.bits].is_fixed or spec.table_kind == "pair"
                table.requires_grad_(not is_fixed)
                for module in group:
                    codes = unpack(file.get_tensor(f"{module}.qweight"), spec.bits)
                    scales = file.get_tensor(f"{module}.scales")
                    parent, _, leaf = linears[module].rpartition(".")
                    owner = model.get_submodule(parent)
                    layers[module] = TunedLinear(getattr(owner, leaf), spec, codes, scales, table)
                    setattr(owner, leaf, layers[module])
    return layers


def load_or_tune(path: Path, tune: Callable[[], Found]) -> Found:
    """What was tuned, from the file that an earlier run left, else tuned and written there.

    The file is complete before anything is replaced, so a run that stops while it replaces
    begins from what the recipe's steps gave, or has all that it needs.
    """
    if path.is_file():
        with safe_open(path, "pt") as file:
            measured = json.loads(file.metadata()["measured"])
            return {name: file.get_tensor(name) for name in file.keys()}, measured  # noqa: SIM118
    tensors, measured = tune()
    with whole_file(path) as unfinished:
        save_file(tensors, unfinished, {"measured": json.dumps(measured)})
    return tensors, measured
