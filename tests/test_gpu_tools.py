"""The tools on a GPU: every peer computes its own weight, bench and doctor run the real kernels."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from flute_vllm import ops
from flute_vllm.cli import app
from flute_vllm.format import LayerSpec
from flute_vllm.tools import bench, peers
from flute_vllm.tools.layers import LinearLayer
from flute_vllm.tuning.images import code_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("name", peers.REGISTRY)
def test_a_peer_computes_its_own_weight(name, bits):
    usable, reasons = peers.load([name])
    if name not in usable:
        pytest.skip(reasons[name])
    peer = usable[name]
    refusal = peer.refusal(1024, 2048, bits, 128)
    if refusal is not None:
        pytest.skip(refusal)
    weight = torch.randn(1024, 2048, device=CUDA).bfloat16() * 0.02
    prepared = peer.prepare(weight, bits, 128)
    rotated = tuple(tensor.clone() for tensor in prepared.tensors)
    for m in (1, 16, 300):
        assert peers.relative_error(prepared, m) < 0.01
    x = torch.randn(2, 2048, device=CUDA).bfloat16()
    expected = prepared.call(x, prepared.tensors)

    def distance() -> float:  # sums of several blocks may come in any order
        return float((prepared.call(x, rotated) - expected).norm() / expected.norm())

    assert distance() < 0.01
    for tensor in rotated:
        tensor.zero_()
    assert distance() > 0.5  # the copies are what is read


@pytest.mark.skipif(not ops.has_cuda_kernels(), reason="kernels built without CUDA")
def test_bench_times_ours_in_graphs():
    layer = LinearLayer("qkv_proj", (512, 256, 256), 1024, LayerSpec(4, 64))
    results = list(bench.measure([layer], [1, 33], CUDA, ["marlin"], repeats=3))
    assert [result.m for result in results] == [1, 33]
    assert all(result.us["ours"] > 0 and result.us["dense"] > 0 for result in results)


def test_doctor_finds_the_gpu_and_its_code():
    found = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert found["gpus"][0]["name"] == torch.cuda.get_device_name(0)
    if ops.has_cuda_kernels():
        capability = found["gpus"][0]["capability"]
        assert code_for(capability, found["extension"]["architectures"]) is not None
