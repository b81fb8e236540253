"""Random problems shared by tests and benchmarks: layers as checkpoints store them, and oracles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flute_vllm import format as fmt


@dataclass(frozen=True)
class Problem:
    """A (fused) quantized linear layer, with the arguments of the ops in order."""

    qweight: torch.Tensor
    scales: torch.Tensor
    table: torch.Tensor
    part_sizes: list[int]
    bits: int
    group_size: int

    @property
    def weight(self) -> tuple:
        """Arguments after x of ``flute::gemm``, and all of ``flute::dequantize``."""
        return (
            self.qweight,
            self.scales,
            self.table,
            self.part_sizes,
            self.bits,
            self.group_size,
        )

    @property
    def in_features(self) -> int:
        return self.qweight.shape[1] // self.bits * fmt.UNIT

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight by the format's own definition, part by part."""
        rows = zip(
            self.qweight.split(self.part_sizes),
            self.scales.split(self.part_sizes),
            self.table,
            strict=True,
        )
        return torch.cat([fmt.dequantize(q, s, t, self.bits, dtype) for q, s, t in rows])


def make_codes(rows: int, columns: int, bits: int, generator: torch.Generator) -> torch.Tensor:
    """Random codes in which every value occurs, the top one included, when there is room."""
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    flat = codes.view(-1)
    every = torch.arange(2**bits, dtype=torch.uint8)
    flat[: every.numel()] = every
    flat[-every.numel() :] = every  # the top code ends the last word
    return codes


def make_problem(
    part_sizes: Sequence[int],
    in_features: int,
    bits: int,
    group_size: int,
    dtype: torch.dtype = torch.bfloat16,
    pair: bool = False,
    seed: int = 0,
) -> Problem:
    """Negative scales, unsorted tables with both zeros, another table for each part."""
    generator = torch.Generator().manual_seed(seed)
    rows = sum(part_sizes)
    codes = make_codes(rows, in_features, bits, generator)
    groups = 1 if group_size == fmt.PER_ROW else in_features // group_size
    scales = torch.randn(rows, groups, generator=generator) * 0.05
    shape = (4**bits, 2) if pair else (2**bits,)
    table = torch.randn(len(part_sizes), *shape, generator=generator)
    table.view(len(part_sizes), -1)[:, 1] = 0.0
    table.view(len(part_sizes), -1)[:, 2] = -0.0
    return Problem(
        fmt.pack(codes, bits), scales.to(dtype), table.to(dtype), list(part_sizes), bits, group_size
    )


def make_x(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def oracle(x: torch.Tensor, problem: Problem) -> torch.Tensor:
    """Exact product in float64, not rounded to the dtype of x."""
    return x.double() @ problem.dense().double().T


def errors(y: torch.Tensor, x: torch.Tensor, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest errors of ``y`` and of torch's own dense product, in units of ``|x| @ |W|.T``.

    That unit, and not the result, bounds what rounding can do: a result may cancel to nothing.
    """
    weight = problem.dense()
    exact = x.double() @ weight.double().T
    unit = (x.double().abs() @ weight.double().abs().T).clamp_min(1e-30)
    dense = (x.float() @ weight.float().T).to(x.dtype)

    def worst(value: torch.Tensor) -> torch.Tensor:
        return ((value.double() - exact).abs() / unit).max() if value.numel() else torch.zeros(())

    return worst(y), worst(dense)


def random_weight(
    rows: int, in_features: int, bits: int, group_size: int, dtype: torch.dtype, seed: int
) -> Problem:
    """Like :func:`make_problem`, made in a moment at any size: random words are random codes."""
    generator = torch.Generator().manual_seed(seed)
    words = in_features // fmt.UNIT * bits
    qweight = torch.randint(-(2**31), 2**31, (rows, words), generator=generator, dtype=torch.int64)
    groups = 1 if group_size == fmt.PER_ROW else in_features // group_size
    scales = torch.rand(rows, groups, generator=generator) * 0.02 + 0.01
    table = torch.linspace(-1, 1, 2**bits).unsqueeze(0)
    return Problem(
        qweight.to(torch.int32), scales.to(dtype), table.to(dtype), [rows], bits, group_size
    )
