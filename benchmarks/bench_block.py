"""Times the linear layers of a decoder block with the norms and the activation between them.

    python benchmarks/bench_block.py LIBRARY [--families 8b,70b] [--ms 1,8,32,128] [--out FILE]

Microseconds per block inside a CUDA graph, weights rotating over more than 280 MB. ``vllm``: norms
and activation as torch.compile makes them, which is what vLLM runs. The others put ours in their
place: ``norms``, ``activation`` (a launch of its own), ``gated`` (in the launch of the product,
where the plan says so), and both. Attention stands as one elementwise kernel over the queries.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from bench_kernels import SHAPES, head_commit
from kernel_library import Layer, Library, device

from flute_vllm import tuning
from flute_vllm.ops import Activation
from flute_vllm.tools.timing import copies_for, graph_us

EPSILON = 1e-5
SILU = Activation.SILU
# Whose norms, and how the activation runs.
VARIANTS = {
    "vllm": ("torch", "torch"),
    "norms": ("ours", "torch"),
    "activation": ("torch", "ours"),
    "gated": ("torch", "gated"),
    "norms and activation": ("ours", "ours"),
    "norms and gated": ("ours", "gated"),
}


@torch.compile(dynamic=False)
def torch_norm(x, residual, weight):
    total = x.float() + residual.float()
    y = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPSILON)
    return (y.to(weight.dtype) * weight).to(x.dtype), total.to(x.dtype)


@torch.compile(dynamic=False)
def torch_activation(x):
    half = x.shape[-1] // 2
    return torch.nn.functional.silu(x[..., :half]) * x[..., half:]


@torch.compile(dynamic=False)
def attention(qkv, width: int):
    return qkv[:, :width] * 0.5


@dataclass
class Block:
    """Copies of the four layers of a block, and which kernel runs with m rows."""

    library: Library
    gpu: tuning.Device
    shapes: dict[str, tuple[int, int]]  # of qkv, o, gate_up and down

    def __post_init__(self) -> None:
        count = copies_for(sum(n * k // 2 for n, k in self.shapes.values()))
        first = {name: self.make(name) for name in self.shapes}
        self.copies = [
            {name: replace(layer, records=layer.records.clone()) for name, layer in first.items()}
            for _ in range(count)
        ]
        order = [layer for copy in self.copies for layer in copy.values()]
        for layer, after in zip(order, [*order[1:], order[0]], strict=True):
            layer.next, layer.next_bytes = after.records, tuning.AHEAD_BYTES

    def make(self, name: str) -> Layer:
        n, k = self.shapes[name]
        return self.library.random_layer(n, k, 4, 128, torch.bfloat16, parts=self.parts(name))

    def parts(self, name: str) -> tuple[int, ...]:
        n = self.shapes[name][0]
        return (n // 2, n // 2) if name == "gate_up" else (n,)

    def entries(self, m: int) -> dict[str, tuning.Entry]:
        return {
            name: tuning.entry_of(
                tuning.entries(
                    n, k, 4, 128, self.parts(name), self.gpu, overlap=1, environment={}
                ), m)
            for name, (n, k) in self.shapes.items()
        }  # fmt: skip

    def calls(
        self, m: int, norms: str, activation: str, *,
        entries: dict[str, tuning.Entry] | None = None, attention: Callable = attention,
    ) -> list[Callable]:  # fmt: skip
        """One for each copy. ``entries`` replaces the plan's."""
        shapes, entries = self.shapes, entries or self.entries(m)
        hidden, width = shapes["o"]
        new = functools.partial(torch.empty, device="cuda", dtype=torch.bfloat16)
        x, residual = (torch.randn(m, hidden, device="cuda").bfloat16() for _ in range(2))
        weight = torch.ones(hidden, device="cuda").bfloat16()
        norm = torch_norm
        if norms == "ours":
            norm = functools.partial(self.library.add_rms_norm, epsilon=EPSILON)

        def product(copy: dict[str, Layer], name: str, x: torch.Tensor) -> torch.Tensor:
            return self.library.run(copy[name], entries[name], x, new((m, shapes[name][0])))

        def call(copy: dict[str, Layer]) -> torch.Tensor:
            y, total = norm(x, residual, weight)
            y, total = norm(product(copy, "o", attention(product(copy, "qkv", y), width)),
                            total, weight)  # fmt: skip
            half, entry = new((m, shapes["gate_up"][0] // 2)), entries["gate_up"]
            if activation == "gated" and entry.gates:
                gated = self.library.run(copy["gate_up"], entry, y, half, activation=SILU)
            elif activation == "torch":
                gated = torch_activation(product(copy, "gate_up", y))
            else:
                gated = self.library.activate(product(copy, "gate_up", y), SILU, half)
            return product(copy, "down", gated)

        return [functools.partial(call, copy) for copy in self.copies]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("library")
    parser.add_argument("--families", default="8b,70b")
    parser.add_argument("--ms", default="1,8,32,128")
    parser.add_argument("--replays", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=3, help="of all variants; the median counts")
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path, default=Path("block.json"))
    arguments = parser.parse_args()
    library, gpu, rows = Library(arguments.library), device(), []
    for family in arguments.families.split(","):
        block = Block(library, gpu, SHAPES[family])
        for m in map(int, arguments.ms.split(",")):
            calls = {name: block.calls(m, *kinds) for name, kinds in VARIANTS.items()}
            found = [
                {name: graph_us(call, arguments.replays) for name, call in calls.items()}
                for _ in range(arguments.rounds)
            ]
            us = {name: round(statistics.median(f[name] for f in found), 2) for name in calls}
            rows.append({"family": family, "m": m, "us": us,
                         "gated_launch": block.entries(m)["gate_up"].gates})  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
        del block, calls
        torch.cuda.empty_cache()
    result = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "commit": arguments.commit or head_commit(),
        "command": "python benchmarks/bench_block.py LIBRARY", "bits": 4, "group_size": 128,
        "rows": rows,
    }  # fmt: skip
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
