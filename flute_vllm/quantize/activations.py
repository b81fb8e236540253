"""The second moments of what each group of modules reads, collected while a block runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn

from flute_vllm.errors import FluteError
from flute_vllm.quantize.blocks import WITHOUT_ACTIVATIONS, BlockRunner
from flute_vllm.quantize.state import Statistics


class Moments:
    """Sums of ``x x^T`` over the tokens of calibration and of held-out windows.

    With a second, dense path of activations x', also sums of ``x' x^T``, from which the target of
    a matrix follows (:meth:`target`).
    """

    def __init__(
        self, windows: int, heldout: int, device: torch.device, prior: float = 0.0
    ) -> None:
        self.device, self.prior = device, prior
        self.first_heldout = windows - heldout
        self.has_heldout = heldout > 0
        self.sums: dict[str, torch.Tensor] = {}
        self.tokens: Counter[str] = Counter()  # of calibration, by module, held-out ones apart

    def add(self, name: str, left: torch.Tensor, right: torch.Tensor) -> None:
        """left, right: [tokens, K], added as float32 [K, K] of ``left^T right``."""
        product = left.float().T @ right.float()
        if name in self.sums:
            self.sums[name] += product
        else:
            self.sums[name] = product

    def statistics(self, module: str) -> Statistics:
        if f"hessian {module}" not in self.sums:
            raise not_run(module)
        found = {}
        for part in ("hessian", "heldout") if self.has_heldout else ("hessian",):
            moment = self.sums[f"{part} {module}"].to(self.device)
            if not bool(moment.isfinite().all()):
                raise FluteError(
                    "activations are not finite", where=module,
                    why=f"{int((~moment.isfinite()).sum())} of {moment.numel()} second moments of "
                    "its input are NaN or infinite",
                    fix="check the weights before it; in float16 activations may overflow: use a "
                    "bfloat16 or float32 copy of the model",
                )  # fmt: skip
            found[part] = moment / moment.diagonal().mean().clamp_min(1e-30)
        if self.prior:
            found["hessian"] = self._with_prior(found["hessian"], self.tokens[module])
        return Statistics(**found)

    def _with_prior(self, hessian: torch.Tensor, tokens: int) -> torch.Tensor:
        """Pulled towards the identity: by the prior, and by its sampling noise, K / tokens."""
        share = self.prior + len(hessian) / max(1, tokens)
        raised = hessian / (1 + share)
        raised.diagonal().add_(share / (1 + share))
        return raised

    def target(self, module: str, weight: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
        """The matrix that, on x, comes closest to what the dense one makes of x'.

        ``W C H^-1`` with ``C = x' x^T``, ``H = x x^T``: least squares, as in GPTAQ
        (arXiv 2504.02692), both damped so that directions without data keep their W. Only the
        share of the correction that the held-out windows confirm is made: at 4 bits there is
        little to correct, and the whole of it, fitted to K inputs, was worse than none (d of the
        bundled model .53 of NF's against .41).
        """
        hessian = self.sums[f"hessian {module}"].to(self.device)
        cross = self.sums.pop(f"cross {module}").to(self.device)
        raised = torch.eye(len(hessian), device=hessian.device)
        raised *= damping * hessian.diagonal().mean().clamp_min(1e-30)
        moved = weight.float() @ (cross + raised)
        factor, failed = torch.linalg.cholesky_ex(hessian + raised)
        if bool(failed):
            return weight.float()
        correction = torch.cholesky_solve(moved.T, factor).T - weight.float()
        share = self._confirmed(module, weight.float(), correction)
        return weight.float().add(correction, alpha=share)

    def _confirmed(self, module: str, weight: torch.Tensor, correction: torch.Tensor) -> float:
        """The a of [0, 1] with least ``|(W + a D) x - W x'|^2`` over held-out tokens."""
        hessian = self.sums[f"heldout {module}"].to(self.device)
        cross = self.sums.pop(f"heldout cross {module}").to(self.device)
        bend = torch.linalg.vecdot(correction @ hessian, correction).sum(dtype=torch.float64)
        slope = torch.linalg.vecdot(correction @ (cross.T - hessian), weight)
        gain = float(slope.sum(dtype=torch.float64))
        return min(max(gain / float(bend), 0.0), 1.0) if float(bend) > 0 else 0.0


@torch.no_grad()
def observe(
    runner: BlockRunner,
    index: int,
    block: nn.Module,
    hidden: torch.Tensor,
    heldout: int,
    modules: Iterable[str],
    dense: nn.Module | None = None,
    dense_hidden: torch.Tensor | None = None,
    prior: float = 0.0,
    outputs: list[torch.Tensor] | None = None,
) -> Moments:
    """Runs a block on all windows and sums the moments of the inputs of some of its modules.

    Args:
        runner, index, block: the block as it is now.
        hidden: [windows, length, hidden], its input.
        heldout: the last windows, kept apart.
        modules: names inside the block.
        dense, dense_hidden: the same block with its own weights, and its input in the dense
            model; adds the cross moments.
        prior: of the Hessians; see :class:`Moments`.
        outputs: gets the outputs of the block, for who wants no second run.
    """
    moments = Moments(len(hidden), heldout, runner.device, prior)
    inputs: dict[tuple[str, str], torch.Tensor] = {}
    hooks = []
    for path, owner in (("", block), ("dense ", dense)):
        for name in modules if owner is not None else ():

            def note(_module, args, key=(path, name)) -> None:
                inputs[key] = args[0]

            hooks.append(owner.get_submodule(name).register_forward_pre_hook(note))
    done = 0
    others = runner.run(dense, index, dense_hidden) if dense is not None else None
    try:
        for output in runner.run(block, index, hidden):
            if others is not None:
                next(others)
            if outputs is not None:
                outputs.append(output)
            learnt = max(0, min(len(output), moments.first_heldout - done))
            for (path, name), read in inputs.items():
                if path:
                    continue
                x = _by_window(read, output, name)
                moments.tokens[name] += x[:learnt].shape[:-1].numel()
                for part, rows in (("hessian", slice(learnt)), ("heldout", slice(learnt, None))):
                    if part == "heldout" and not moments.has_heldout:
                        continue
                    here = x[rows].reshape(-1, x.shape[-1])
                    moments.add(f"{part} {name}", here, here)
                if others is not None:
                    other = _by_window(inputs["dense ", name], output, name)
                    for part, rows in (("", slice(learnt)), ("heldout ", slice(learnt, None))):
                        left, right = (v[rows].reshape(-1, x.shape[-1]) for v in (other, x))
                        moments.add(f"{part}cross {name}", left, right)
            done += len(output)
    finally:
        for hook in hooks:
            hook.remove()
    # One group at a time needs its moments on the device: 3.3 GB each for 28672 features.
    moments.sums = {name: moment.cpu() for name, moment in moments.sums.items()}
    return moments


def _by_window(x: torch.Tensor, output: torch.Tensor, module: str) -> torch.Tensor:
    """An input as [windows, ..., K]: some modules read the tokens of all windows as [B * T, K]."""
    windows, tokens = output.shape[:2]
    if x.dim() == 2 and len(x) == windows * tokens:
        return x.reshape(windows, tokens, -1)
    if x.dim() < 3 or len(x) != windows:
        raise FluteError(
            "cannot collect the moments of an input", where=module,
            why=f"it reads {list(x.shape)}, of {windows} windows of {tokens} tokens",
            fix=WITHOUT_ACTIVATIONS,
        )  # fmt: skip
    return x


def not_run(module: str) -> FluteError:
    """The error for a module of a block that the block does not run on text."""
    return FluteError(
        "cannot collect the moments of an input", where=module,
        why="its block does not run it on text",
        fix=f"leave it dense (--skip), or {WITHOUT_ACTIVATIONS}",
    )  # fmt: skip
