"""How vLLM gets the pass of plugin/fusion.py: config, caches, environment, a real engine."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest

from flute_vllm import norms, ops
from flute_vllm.errors import FluteError
from flute_vllm.format import LayerSpec

pytest.importorskip("vllm")
from engine import run_groups  # noqa: E402
from native_layers import check_message, column_layer, native_config  # noqa: E402
from native_writer import write_native  # noqa: E402
from tiny_models import PROMPTS, write_tiny_model  # noqa: E402
from vllm.compilation.passes.inductor_pass import CallableInductorPass  # noqa: E402
from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402

from flute_vllm.plugin import fused_gates, fused_norms, fusion  # noqa: E402
from flute_vllm.plugin.fusion import FusionPass  # noqa: E402


def config_with(**compilation) -> VllmConfig:
    return VllmConfig(compilation_config=CompilationConfig(**compilation))


def installed(config: VllmConfig) -> object | None:
    """What is at vLLM's hook after a model was made."""
    with set_current_vllm_config(config):
        fusion.install()
        fusion.install()
    return config.compilation_config.inductor_compile_config.get(current_platform.pass_key)


def test_a_config_gets_one_pass_that_is_part_of_its_hash(monkeypatch):
    config = config_with()
    before = config.compilation_config.compute_hash()
    found = installed(config)
    assert type(found) is FusionPass
    assert installed(config) is found
    assert config.compilation_config.compute_hash() != before  # names vLLM's compile caches
    for clone in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert clone.uuid() == found.uuid()
    monkeypatch.setenv(fusion.ENVIRONMENT, "0")
    other = config_with()
    assert installed(other) is None
    assert other.compilation_config.compute_hash() == before


def test_a_layer_of_vllm_installs_it():
    config = VllmConfig()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm.config.VllmConfig", lambda: config)
        column_layer(native_config())
    hooks = config.compilation_config.inductor_compile_config
    assert type(hooks[current_platform.pass_key]) is FusionPass


@pytest.mark.parametrize("compilation", [{"mode": 0}, {"backend": "eager"}])
def test_nothing_is_installed_where_inductor_compiles_nothing(compilation):
    config = config_with()
    for name, value in compilation.items():
        setattr(config.compilation_config, name, value)
    assert installed(config) is None


def test_a_pass_of_the_user_stays_and_is_named(monkeypatch):
    said = []
    spy = SimpleNamespace(warning_once=lambda text, *numbers: said.append(text % numbers))
    monkeypatch.setattr(fusion, "logger", spy)

    mine = CallableInductorPass(lambda graph: None)
    config = config_with(inductor_compile_config={current_platform.pass_key: mine})
    assert installed(config) is mine
    assert len(said) == 2  # of one call each; vLLM's logger says it once
    for text in ("CallableInductorPass", current_platform.pass_key, "seventh"):
        assert text in said[0]


def test_other_code_has_another_uuid(monkeypatch, tmp_path):
    seen = {FusionPass().uuid()}
    modules = (fusion, fused_gates, fused_norms, norms, ops)
    for module in modules:
        changed = tmp_path / "changed.py"
        changed.write_text(Path(module.__file__).read_text() + "# a change\n")
        with monkeypatch.context() as patch:
            patch.setattr(module, "__file__", str(changed))
            seen.add(FusionPass().uuid())
    assert len(seen) == 1 + len(modules)


def test_the_environment_decides():
    for text, wanted in (("", True), ("1", True), ("0", False)):
        assert fusion.is_wanted({fusion.ENVIRONMENT: text}) is wanted
    assert fusion.is_wanted({})


@pytest.mark.parametrize("text", ["2", "off", "true", " 0"])
def test_other_values_of_the_environment_are_named(text, monkeypatch):
    monkeypatch.setenv(fusion.ENVIRONMENT, text)
    with pytest.raises(FluteError) as caught:
        column_layer(native_config())
    check_message(caught.value, fusion.ENVIRONMENT, repr(text), "0")


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_a_compiled_engine_fuses_and_answers_the_same(tmp_path):
    specs = {"llama": (LayerSpec(4, 32), 2), "gemma2": (LayerSpec(3, 64, "float16"), 1)}
    jobs = []
    for name, (spec, layers) in specs.items():
        write_tiny_model(tmp_path / name / "dense", name, num_hidden_layers=layers)
        write_native(tmp_path / name / "dense", tmp_path / name / "quantized", spec)
        jobs.append({"model": str(tmp_path / name / "quantized"), "prompts": PROMPTS})
    compiled = [{**job, "log": True, "engine": {"enforce_eager": False}} for job in jobs]
    environment = {
        "TORCHDYNAMO_DISABLE": "0",
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_CACHE_ROOT": str(tmp_path / "cache"),  # empty: a graph from a cache is fused already
    }
    results = run_groups({"plain": (jobs, {}), "compiled": (compiled, environment)})
    for name, plain, fused in zip(specs, results["plain"], results["compiled"], strict=True):
        assert "error" not in fused, fused["error"]
        layers = specs[name][1]
        assert (
            f"flute: in a compiled graph, {layers} of {4 * layers} gemms compute their activation,"
            " too; 0 norms let the next gemm begin early"
        ) in fused["log"]
        for answer, wanted in zip(fused["outputs"], plain["outputs"], strict=True):
            assert answer["tokens"] == wanted["tokens"]
            assert answer["logprobs"] == pytest.approx(wanted["logprobs"], abs=1e-4)
