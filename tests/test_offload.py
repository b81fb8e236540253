"""What vLLM's weight offloading does to finished layers, and what it needs of them; no GPU.

PrefetchOffloader moves every parameter of a decoder block to pinned memory, and points it at a
buffer on the GPU that several blocks share. ``--cpu-offload-gb`` without UVA leaves parameters on
the host, and lends a block copies on the GPU while it is called.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
from fake_vllm import load  # noqa: E402
from native_layers import column_layer, native_config, random_matrix  # noqa: E402
from vllm.model_executor.offloader.prefetch import (  # noqa: E402
    ParamInfo,
    StaticBufferPool,
    _CpuParamOffloader,
)

from flute_vllm import ops, tuning  # noqa: E402
from flute_vllm.format import LayerSpec  # noqa: E402
from flute_vllm.plugin.order import LayerOrder, next_weight  # noqa: E402

SPEC = LayerSpec(4, 32)


class Finished(torch.nn.Module):
    """As much of a finished layer as LayerOrder looks at. "meta" stands for the GPU, where vLLM
    brings a layer's parameters while it is finished."""

    def __init__(self, order: LayerOrder) -> None:
        super().__init__()
        self.flute_order, self.flute_place = None, 0
        self.move("meta")
        order.append(self)

    def move(self, device: str) -> None:
        words = torch.zeros(4, dtype=torch.int32, device=device)
        self.qweight = torch.nn.Parameter(words, requires_grad=False)


def test_every_tensor_of_a_repacked_layer_can_be_pinned(monkeypatch):
    """Memory without elements is never pinned, and PrefetchOffloader asserts that all of it is."""
    layer = column_layer(native_config())
    layer.flute_dtype = torch.bfloat16
    load(layer, random_matrix(8, 64, SPEC, seed=0))
    records = torch.zeros(1024, dtype=torch.int32)
    monkeypatch.setattr(ops, "repack", lambda *_: records)
    monkeypatch.setattr(tuning, "device_of", lambda _: tuning.H200)
    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    canonical = {name: getattr(layer, name).data for name in ("qweight", "scales", "table")}
    found = layer.quant_method._to_gpu_layout(layer, canonical)
    assert set(found) == set(canonical)
    assert {name for name, tensor in found.items() if tensor.numel() == 0} == set()
    assert found["qweight"] is records
    assert {found[name].dtype for name in ("scales", "table")} == {torch.bfloat16}


def test_a_layer_on_the_host_is_still_the_next_but_the_last_of_its_list():
    """The op passes over weights that lie elsewhere (test_gpu_ops.py)."""
    order = LayerOrder()
    resident, offloaded = Finished(order), Finished(order)
    offloaded.move("cpu")
    behind, last = Finished(order), Finished(order)
    assert next_weight(resident) is offloaded.qweight
    assert next_weight(resident).device.type == "cpu"
    assert next_weight(offloaded) is None
    assert next_weight(behind) is last.qweight


def test_a_prefetched_layer_is_asked_for_where_it_will_lie():
    """Buffers live as long as their pool; whatever they hold meanwhile is only brought to L2."""
    order = LayerOrder()
    resident, offloaded = Finished(order), Finished(order)
    offloaded.move("cpu")
    offloader = _CpuParamOffloader(offloaded, "qweight")
    info = ParamInfo("qweight", (4,), (1,), torch.int32)
    pool = StaticBufferPool([info], slot_capacity=1, device=torch.device("cpu"))
    buffer = pool.get_buffer(*info.key, slot_idx=0)
    offloader.sync_cpu_storage()
    assert next_weight(resident).data_ptr() == offloader._cpu_storage.data_ptr()
    offloader.assign_static_buffer(buffer)
    assert next_weight(resident) is offloaded.qweight
    assert next_weight(resident).data_ptr() == buffer.data_ptr()
