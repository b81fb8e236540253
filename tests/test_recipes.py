"""Steps and recipes: each step lowers what it minimises, and gates drop what is worse."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flute_vllm.errors import FluteError
from flute_vllm.format import LayerSpec, dequantize_codes
from flute_vllm.quantize.codebooks import gaussian_lloyd, named_codebook, normal_float
from flute_vllm.quantize.feedback import descend, error_feedback
from flute_vllm.quantize.lloyd import learn_pairs, learn_table
from flute_vllm.quantize.recipes import load_recipe, recipe_names, run_recipe
from flute_vllm.quantize.refit import refit_scales, refit_table
from flute_vllm.quantize.rounding import absmax, search
from flute_vllm.quantize.state import State, Statistics, relative_error, sum_by_index
from flute_vllm.quantize.tensor import start_state

NOTHING = Statistics()


def problem(rows: int = 48, columns: int = 128, seed: int = 0) -> tuple[torch.Tensor, Statistics]:
    """Gaussian weights and correlated inputs, some of them strong, as layers of models see."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator)
    mix *= torch.arange(1, columns + 1) ** -0.4
    strength = torch.exp(0.7 * torch.randn(columns, generator=generator))
    moments = []
    for _ in range(2):
        x = torch.randn(2048, columns, generator=generator) @ mix.T * strength
        moments.append(x.T @ x / len(x))
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    return weight, Statistics(*moments)


def start(bits: int = 3, is_fixed: bool = False, **changes) -> State:
    spec = LayerSpec(bits, 32, **changes)
    return start_state(spec, normal_float(bits).values, is_fixed, "layer")


def test_a_state_means_what_the_format_says():
    weight, _ = problem()
    state = search(weight, NOTHING, start())
    parts = state.tensors(slice(8, 24))
    dense = dequantize_codes(state.codes, state.scales, parts["table"])
    assert torch.equal(state.dense(), dense.float())
    assert parts["qweight"].shape == (16, 128 // 32 * 3)
    off = (dense.float() - weight)[8:24]
    expected = off.square().sum() / weight[8:24].square().sum()
    assert relative_error(weight, state, None, slice(8, 24)) == pytest.approx(float(expected))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_data_free_ladder_on_gaussian_weights(bits):
    """absmax > searched scales > learned table; NF absmax and the rest as the study measured."""
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(1)) * 0.02
    states = [
        step(
            weight, NOTHING, start_state(LayerSpec(bits, 64), normal_float(bits).values, False, "w")
        )
        for step in (absmax, search, learn_table)
    ]
    errors = [relative_error(weight, state) for state in states]
    # Signed scales beat the study's best table with unsigned ones (.00694, .02926, .11121).
    assert errors[2] < {4: 0.0067, 3: 0.0275, 2: 0.106}[bits]
    assert errors[2] < errors[1] < errors[0]
    assert relative_error(weight, learn_pairs(weight, NOTHING, states[2])) <= errors[2] * 1.001


def test_signed_scales_are_used_and_pay():
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(2))
    state = search(weight, NOTHING, start(2))
    share = float((state.scales < 0).float().mean())
    assert 0.3 < share < 0.7
    symmetric = start_state(LayerSpec(2, 32), torch.tensor([-1.0, -0.3, 0.3, 1.0]), True, "w")
    assert not bool((search(weight, NOTHING, symmetric).scales < 0).any())


def test_gaussian_lloyd_is_the_published_quantizer():
    """Max 1960, table 1: levels 0.4528 and 1.510 at 2 bits; 0.1284 to 2.733 at 4 bits."""
    assert gaussian_lloyd(2).tolist() == pytest.approx(
        [-1, -0.4528 / 1.51, 0.4528 / 1.51, 1], abs=2e-4
    )
    assert float(gaussian_lloyd(4)[8]) == pytest.approx(0.1284 / 2.733, abs=2e-4)


def test_named_tables():
    assert named_codebook("int", 3).values.tolist() == [-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75]
    assert sorted(set(named_codebook("fp", 4).values.abs().mul(6).tolist())) == pytest.approx(
        [0, 0.5, 1, 1.5, 2, 3, 4, 6], abs=1e-6
    )
    with pytest.raises(FluteError, match="fp tables of 3, 4 bits"):
        named_codebook("fp", 2)


@pytest.mark.parametrize("kind", ["scalar", "pair"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_calibrated_step_lowers_the_output_error(bits, kind):
    weight, statistics = problem()
    state = learn_table(weight, statistics, start(bits))
    if kind == "pair":
        state = learn_pairs(weight, statistics, state)
        assert state.table.shape == (4**bits, 2)
    errors = [relative_error(weight, state, statistics.hessian)]
    for step in (error_feedback, refit_scales, refit_table, descend, refit_scales):
        state = step(weight, statistics, state)
        errors.append(relative_error(weight, state, statistics.hessian))
    assert errors[1] < 0.8 * errors[0]
    for before, after in zip(errors[1:], errors[2:], strict=False):
        assert after <= before * 1.005  # up to the damping and to the rounding of scales and table
    assert relative_error(weight, state, statistics.heldout) < 0.8 * errors[0]


def test_error_feedback_without_correlation_is_rounding_to_nearest():
    weight, _ = problem()
    flat = Statistics(torch.eye(128), torch.eye(128))
    state = search(weight, flat, start(4))
    assert torch.equal(error_feedback(weight, flat, state).codes, state.codes)
    assert torch.equal(descend(weight, flat, state).codes, state.codes)


def test_error_feedback_follows_the_paper():
    """One row, by the definition: after each column the rest is its conditional optimum."""
    weight, statistics = problem(rows=1, columns=32)
    state = search(weight, statistics, start(3))
    hessian = statistics.hessian.double()
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(32)
    order = statistics.hessian.diagonal().argsort(descending=True, stable=True)
    left, codes = weight[0].double().clone(), torch.zeros(32, dtype=torch.uint8)
    scale = state.scales.double()[0, 0]
    for place, column in enumerate(order.tolist()):
        values = (state.table.double() * scale).bfloat16().double()
        code = int((state.table.double() - left[column] / scale).abs().argmin())
        codes[column] = code
        rest = order[place + 1 :]
        if len(rest):
            error = left[column] - values[code]
            inner = hessian[rest][:, rest]
            left[rest] += torch.linalg.solve(inner, hessian[rest, column]) * error
    assert torch.equal(error_feedback(weight, statistics, state).codes[0], codes)


def test_refit_scales_is_the_optimum():
    """No change of a scale lowers the output error."""
    weight, statistics = problem(rows=4)
    state = refit_scales(weight, statistics, error_feedback(weight, statistics, search(
        weight, statistics, start(3))), damping=0.0)  # fmt: skip
    best = relative_error(weight, state, statistics.hessian)
    for factor in (0.97, 1.03):
        for group in range(4):
            scales = state.scales.clone()
            scales[:, group] *= factor
            changed = state.with_changes(scales=scales)
            assert relative_error(weight, changed, statistics.hessian) > best


def test_a_table_of_the_user_is_kept():
    weight, statistics = problem()
    for name in ("balanced", "fast"):
        fixed = start(3, is_fixed=True)
        state, _ = run_recipe(load_recipe(name), weight, statistics, fixed)
        assert torch.equal(state.table, fixed.table)


def test_zero_rows_and_dead_inputs():
    weight, statistics = problem()
    weight[3] = 0
    for moment in (statistics.hessian, statistics.heldout):
        moment[:, 7] = moment[7] = 0
    state, _ = run_recipe(load_recipe("balanced"), weight, statistics, start(3))
    assert state.scales.isfinite().all()
    assert not state.dense()[3].any()
    dead = (state.dense() - weight)[:, 7].abs().max()
    assert float(dead) < 0.1  # never active in calibration, and still stored


def test_a_useless_hessian_is_an_error():
    weight, _ = problem()
    broken = Statistics(torch.full((128, 128), float("nan")), torch.eye(128))
    state = search(weight, NOTHING, start(3))
    with pytest.raises(FluteError, match="no usable Hessian") as caught:
        error_feedback(weight, broken, state)
    assert "16384 of 16384" in caught.value.why


@settings(max_examples=10, deadline=None)
@given(
    recipe=st.sampled_from(["fast", "balanced", "best"]),
    bits=st.sampled_from([2, 3, 4]),
    seed=st.integers(0, 1000),
)
def test_gates_keep_the_best(recipe, bits, seed):
    """The result is the best of all steps on held-out activations, whatever each step does."""
    weight, statistics = problem(rows=16, columns=64, seed=seed)
    state, traces = run_recipe(load_recipe(recipe), weight, statistics, start(bits))
    final = relative_error(weight, state, statistics.heldout)
    assert final == pytest.approx(min(trace.error for trace in traces))
    kept = [trace.error for trace in traces if trace.is_kept]
    assert kept == sorted(kept, reverse=True)


def test_without_statistics_balanced_is_fast():
    weight, _ = problem()
    one, _ = run_recipe(load_recipe("fast"), weight, NOTHING, start(3))
    two, traces = run_recipe(load_recipe("balanced"), weight, NOTHING, start(3))
    assert torch.equal(one.codes, two.codes)
    assert [trace.step for trace in traces] == ["search", "learn_table"]


def test_shipped_recipes_are_valid():
    assert {"nf", "fast", "balanced", "best"} <= set(recipe_names())
    for name in recipe_names():
        assert load_recipe(name).name == name


@pytest.mark.parametrize(
    ("document", "told"),
    [({"steps": []}, "first step"), ({"steps": [{"step": "guess"}]}, "unknown step 'guess'"),
     ({"steps": [{"step": "descend"}]}, "first step"), ({"needs": "luck"}, "needs")],
)  # fmt: skip
def test_bad_recipes_are_refused(document, told, tmp_path):
    whole = {"name": "x", "summary": "", "needs": "nothing", "steps": [{"step": "search"}]}
    (tmp_path / "x.json").write_text(json.dumps({**whole, **document}))
    with pytest.raises(FluteError, match="unusable recipe") as caught:
        load_recipe(str(tmp_path / "x.json"))
    assert told in caught.value.why


def test_sums_by_index():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    index = torch.randint(0, 7, (1000,), generator=torch.Generator().manual_seed(1))
    found = sum_by_index(values, index, 8)
    expected = [float(values[index == place].double().sum()) for place in range(8)]
    assert found.tolist() == pytest.approx(expected)
