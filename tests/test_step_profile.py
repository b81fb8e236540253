"""Which kernels make up a decode step: told from a list of events, without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import step_profile  # noqa: E402

HEAD = "nvjet_sm90_tst_256x8_64x6_2x1_v_bz_TNT"


def step(at: float) -> list[tuple[str, float, float]]:
    """One layer of a model, its head last; the norm begins before the product has ended."""
    return [
        ("flute::decode_kernel<4>", at, 10.0),
        ("flute::rms_norm_kernel<1>", at + 8, 4.0),
        ("triton_poi_fused_gemm_mul_silu_slice_1", at + 13, 2.0),
        (HEAD, at + 15, 100.0),
    ]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void flute::decode_kernel<flute::DecodeShape<4, bf16>>(flute::DecodeParams)", "ours"),
        ("void flute::rms_norm_kernel<__nv_bfloat16, 1>(uint4 const*)", "norm"),
        ("void flute::activate_kernel<__nv_bfloat16, true>(int)", "activation"),
        ("triton_red_fused_fused_add_rms_norm_gemm_0", "norm"),
        ("triton_poi_fused_humming_gemm_mul_silu_slice_1", "activation"),
        ("void humming<MmaOpClass, Shape<0u, 28672u, 4096u>>", "peer"),
        ("void marlin::Marlin<1125899907892224>", "peer"),
        (HEAD, "dense"),
        ("void vllm::reshape_and_cache_flash_kernel<__nv_bfloat16>", "attention"),
        ("void vllm::cross_device_reduce_1stage<__nv_bfloat16, 2>", "communication"),
        ("_gumbel_sample_kernel", "other"),
    ],
)
def test_kinds(name, kind):
    assert step_profile.kind_of(name) == kind


def test_summary_of_the_middle_step():
    events = [event for i in range(5) for event in step(200.0 * i)]
    found = step_profile.summary(events, steps=4)
    assert found["span_us"] == 115.0
    assert found["busy_us"] == 114.0  # a microsecond between norm and activation
    assert found["kernels"] == 4
    assert found["kinds"]["ours"] == {"us": 10.0, "gap_us": 0.0, "count": 1}
    assert found["kinds"]["norm"] == {"us": 4.0, "gap_us": -2.0, "count": 1}
    assert found["kinds"]["activation"] == {"us": 2.0, "gap_us": 1.0, "count": 1}
    assert found["names"][0] == {"name": HEAD, "us": 100.0, "gap_us": 0.0, "count": 1}


def test_no_kernel_once_a_step():
    found = step_profile.summary([("a", float(i), 1.0) for i in range(40)], steps=4)
    assert "no kernel" in found["error"]
