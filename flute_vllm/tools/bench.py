"""Times the layers of one model on this machine: ours, torch's dense layer, other kernels.

Weights are random, of the model's shapes and formats. On a GPU calls run in a CUDA graph; weights
rotate so that no cache holds them, and medians are reported.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from flute_vllm import ops, tuning
from flute_vllm.errors import FluteError
from flute_vllm.format import UNIT
from flute_vllm.tools import peers as peer_library
from flute_vllm.tools.layers import LinearLayer
from flute_vllm.tools.timing import copies_for, graph_us

MOST_COPIES = 64  # of a weight; small layers then stay partly in cache
Call = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Result:
    """Microseconds a call of one layer at one m. ``missing``: why a kernel has no figure."""

    layer: str
    count: int
    n: int
    k: int
    bits: int
    group_size: int
    m: int
    us: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def random_tensors(layer: LinearLayer, device: torch.device) -> tuple[torch.Tensor, ...]:
    """qweight, scales and table of a layer in the canonical format; every code occurs."""
    spec, matrices = layer.spec, len(layer.parts)
    words = (layer.n, layer.k // UNIT * spec.bits)
    qweight = torch.randint(-(2**31), 2**31, words, dtype=torch.int64, device=device)
    scales = torch.rand(layer.n, spec.num_groups(layer.k), device=device) * 0.02 + 0.01
    table = torch.randn(matrices, *spec.table_shape, device=device)
    dtype = spec.torch_scale_dtype
    return qweight.to(torch.int32), scales.to(dtype), table.to(dtype)


def ours(layer: LinearLayer, device: torch.device) -> tuple[list[Call], torch.Tensor]:
    """Calls of the op on rotating copies, prepared as the plugin does, and the dense weight."""
    spec, parts = layer.spec, list(layer.parts)
    qweight, scales, table = random_tensors(layer, device)
    settings = (parts, spec.bits, spec.group_size)
    dense = ops.dequantize(qweight, scales, table, *settings)
    launches: list[int] = []
    if device.type == "cuda":
        qweight = ops.repack(qweight, scales, table, *settings)
        scales = scales.new_zeros(1)
        gpu = tuning.device_of(device)
        launches = tuning.plan(
            layer.n,
            layer.k,
            spec.bits,
            spec.group_size,
            layer.parts,
            gpu,
            overlap=1,
            pair=table.dim() == 3,
        )
        torch.cuda.synchronize(device)  # with overlap a launch reads ahead of earlier kernels
    count = min(copies_for(qweight.numel() * 4), MOST_COPIES)
    copies = [qweight] + [qweight.clone() for _ in range(count - 1)]
    gemm = torch.ops.flute.gemm
    return [lambda x, q=q: gemm(x, q, scales, table, *settings, launches) for q in copies], dense


def rotate(prepared: peer_library.Prepared) -> list[Call]:
    count = min(copies_for(prepared.nbytes), MOST_COPIES)
    copies = [prepared.tensors]
    copies += [tuple(t.clone() for t in prepared.tensors) for _ in range(count - 1)]
    return [lambda x, t=t: prepared.call(x, t) for t in copies]


def time_us(calls: list[Call], x: torch.Tensor, repeats: int) -> float:
    """Median microseconds of a call."""
    if x.is_cuda:
        return graph_us([functools.partial(call, x) for call in calls], repeats)
    calls[0](x)
    times = []
    for i in range(max(repeats, 2)):
        start = time.perf_counter()
        calls[i % len(calls)](x)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def measure(
    layers: Iterable[LinearLayer],
    rows: list[int],
    device: torch.device,
    peer_names: list[str],
    repeats: int = 7,
) -> Iterator[Result]:
    """Results layer by layer. Raises FluteError where ours is far from its own dense weight."""
    ops.load()
    peers, reasons = peer_library.load(peer_names)
    for layer in layers:
        calls, dense = ours(layer, device)
        _check(layer, calls[0], dense)
        kernels = {"ours": calls, "dense": rotate(peer_library.Cublas().prepare(dense, 16, 0))}
        missing = dict(reasons)
        for name, peer in peers.items():
            try:
                kernels[name] = _peer_calls(peer, layer, dense)
            except Exception as error:  # noqa: BLE001 - the result of this peer
                missing[name] = peer_library.describe(error)
        for m in rows:
            x = torch.randn(m, layer.k, device=device).to(dense.dtype)
            spec = layer.spec
            result = Result(
                layer.name, layer.count, layer.n, layer.k, spec.bits, spec.group_size, m,
                missing=missing,
            )  # fmt: skip
            for name, functions in kernels.items():
                result.us[name] = round(time_us(functions, x, repeats), 2)
            yield result


def _peer_calls(peer: peer_library.Peer, layer: LinearLayer, dense: torch.Tensor) -> list[Call]:
    """Raises ValueError where the peer cannot take the layer."""
    spec = layer.spec
    refusal = peer.refusal(layer.n, layer.k, spec.bits, spec.group_size)
    if refusal is not None:
        raise ValueError(refusal)
    return rotate(peer.prepare(dense, spec.bits, spec.group_size))


def _check(layer: LinearLayer, call: Call, dense: torch.Tensor) -> None:
    """A wrong kernel must not be timed: compares one row with the product in float32."""
    x = torch.randn(1, layer.k, device=dense.device).to(dense.dtype)
    exact = x.float() @ dense.float().t()
    error = float((call(x).float() - exact).norm() / exact.norm())
    if not error < 0.02:  # 16-bit results are within 0.005; also false for a NaN
        raise FluteError(
            "wrong result of the kernel", where=f"{layer.name}, {layer.n} x {layer.k}",
            why=f"relative error {error:.3g} against its own dense weight",
            fix="run flute-vllm doctor, and report the machine with its output",
        )  # fmt: skip


def totals(results: Iterable[Result]) -> dict[int, dict[str, float]]:
    """Microseconds of all layers of the model, by m and kernel; only kernels that ran them all."""
    found: dict[int, list[Result]] = {}
    for result in results:
        found.setdefault(result.m, []).append(result)
    sums = {}
    for m, group in found.items():
        complete = set.intersection(*(set(result.us) for result in group))
        sums[m] = {
            name: round(sum(result.us[name] * result.count for result in group), 1)
            for name in group[0].us
            if name in complete
        }
    return sums
