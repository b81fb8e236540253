"""The doctor and the bench of a model: layers, kernel choice, architectures, the commands."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from tiny_models import write_tiny_model
from typer.testing import CliRunner

from flute_vllm import ops, tuning
from flute_vllm.cli import app
from flute_vllm.errors import FluteError
from flute_vllm.format import LayerSpec
from flute_vllm.quantize.model import QuantizeSettings, quantize_checkpoint
from flute_vllm.tools import bench, doctor, peers
from flute_vllm.tools.layers import LinearLayer, group_layers, model_layers, parse_rows
from flute_vllm.tuning.images import FATBIN_MAGIC, architectures, code_for

ZOO = Path(__file__).parent / "data" / "ckpt_w4"
SPEC = LayerSpec(4, 128)
DEFAULT_IMAGES = ["sm_80", "sm_86", "sm_89", "sm_90a", "compute_80", "compute_89"]  # setup.py


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tools") / "dense", "llama")


@pytest.fixture(scope="module")
def native(dense) -> Path:
    settings = QuantizeSettings(4, 64, overrides={"re:.*down_proj": 3})
    quantize_checkpoint(dense, dense.parent / "native", settings)
    return dense.parent / "native"


def shapes(layers: list[LinearLayer]) -> dict[str, tuple]:
    return {layer.name: (layer.parts, layer.k, layer.spec.bits, layer.count) for layer in layers}


def test_layers_of_a_native_checkpoint(native):
    assert shapes(model_layers(native, SPEC)) == {
        "qkv_proj": ((256, 128, 128), 256, 4, 2),
        "o_proj": ((256,), 256, 4, 2),
        "gate_up_proj": ((512, 512), 256, 4, 2),
        "down_proj": ((256,), 512, 3, 2),
    }


def test_layers_of_dense_and_foreign_checkpoints(dense):
    assumed = model_layers(dense, LayerSpec(2, 64))
    assert {layer.spec.bits for layer in assumed} == {2}
    assert [layer.name for layer in assumed] == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    foreign = model_layers(ZOO, SPEC)
    assert {layer.name for layer in foreign} == {layer.name for layer in assumed}
    assert shapes(foreign)["qkv_proj"] == ((512, 256, 256), 256, 4, 2)


def test_lone_matrices_keep_their_name():
    found = group_layers({"a.q_proj": (64, 128, SPEC), "b.q_proj": (64, 128, SPEC)})
    assert found == [LinearLayer("q_proj", (64,), 128, SPEC, 2)]


@pytest.mark.parametrize("text", ["", "a", "1,0", "1,,2"])
def test_unreadable_rows_are_refused(text):
    with pytest.raises(FluteError, match="rows"):
        parse_rows(text)


def test_kernel_choice_and_its_reason(monkeypatch):
    known = LinearLayer("o_proj", (4096,), 4096, SPEC)
    choice = doctor.choose(known, 1, tuning.H200)
    assert (choice.kernel, choice.why[:9]) == ("decode", "measured:")
    expected = tuning.select(tuning.Problem(4096, 4096, 1, 4, 128), tuning.H200, environment={})
    assert choice.config == expected.numbers[:-1]
    unknown = LinearLayer("o_proj", (4000,), 4096, SPEC)
    assert doctor.choose(unknown, 1, tuning.H200).why.startswith("heuristic")
    assert doctor.choose(known, 512, tuning.H200).kernel == "sm90"
    monkeypatch.setenv(tuning.ENVIRONMENT, "1,2,1")
    assert doctor.choose(known, 1, tuning.H200).why == "FLUTE_DECODE_CONFIG=1,2,1"


def test_kernel_choice_on_the_cpu():
    layer = LinearLayer("o_proj", (256,), 256, SPEC)
    assert "dense GEMM" in doctor.choose(layer, 64, None).kernel
    assert doctor.choose(layer, 1, None).kernel == ops.cpu_isa()


def fat_binary(*images: tuple[int, int, int]) -> bytes:
    """As nvcc embeds it: (kind, architecture, flags) of each image, with 4 KB of code."""
    entries = b""
    for kind, number, flags in images:
        head = struct.pack("<HHIQ", kind, 0x101, 64, 4096) + bytes(12)
        head += struct.pack("<I", number) + bytes(8) + struct.pack("<Q", flags)
        entries += head.ljust(64, b"\0") + bytes(4096)
    return FATBIN_MAGIC + struct.pack("<HHQ", 1, 16, len(entries)) + entries


def test_architectures_are_read_from_the_library(tmp_path):
    library = tmp_path / "lib.so"
    library.write_bytes(
        b"head" * 3 + fat_binary((2, 80, 0x11), (1, 80, 0x11)) + fat_binary((2, 90, 0x100011))
    )
    assert architectures(library) == ("compute_80", "sm_80", "sm_90a")
    library.write_bytes(FATBIN_MAGIC + struct.pack("<HHQ", 1, 16, 1 << 40))
    assert architectures(library) == ()


@pytest.mark.parametrize(
    ("capability", "images", "expected"),
    [
        ("9.0", ["sm_90a"], 90),
        ("10.0", ["sm_90a"], None),
        ("8.9", ["sm_80"], 80),
        ("9.0", ["sm_80", "sm_89"], None),
        ("9.0", ["compute_80"], 80),
        ("8.0", ["sm_86"], None),
        ("7.5", [], None),
        ("9.0", DEFAULT_IMAGES, 90),
        ("8.7", DEFAULT_IMAGES, 86),
        ("10.0", DEFAULT_IMAGES, 89),
        ("12.0", DEFAULT_IMAGES, 89),
        ("12.0", [*DEFAULT_IMAGES, "sm_120"], 120),
    ],
)
def test_which_gpu_runs_which_code(capability, images, expected):
    assert code_for(capability, images) == expected


def test_problems_name_a_fix():
    library = {"kernels": "compiled", "cuda": True, "architectures": ["sm_80"]}
    gpu = {"name": "Some GPU", "capability": "12.0"}
    (text,) = doctor.problems([gpu], library, "installed")
    assert "FLUTE_CUDA_ARCHS=12.0" in text
    library["cuda"] = False
    assert "FLUTE_BUILD=cuda" in doctor.problems([gpu], library, "installed")[0]
    assert doctor.problems([], library, "installed") == []


def test_plugin_switched_off_is_found():
    if doctor.plugin_state({}) != "installed":
        pytest.skip("the package is not installed")
    assert "switched off" in doctor.plugin_state({"VLLM_PLUGINS": "other"})


def test_doctor_command(native):
    result = run("doctor", native, "--assume", "h200", "--rows", "1,64", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == bool(found["problems"])
    assert (
        found["versions"]["torch"] == torch.__version__.partition("+")[0]
        or "+" in (found["versions"]["torch"])
    )
    assert [choice["m"] for choice in found["kernels"][:2]] == [1, 64]
    assert "decode" in run("doctor", native, "--assume", "h200").stdout
    assert run("doctor", "--assume", "a100").exit_code == 1


def test_bench_command(native):
    result = run("bench", native, "--rows", "1,3", "--repeats", "2", "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert len(record["results"]) == 8
    assert all(set(r["us"]) == {"ours", "dense"} for r in record["results"])
    assert set(record["totals"]["1"]) == {"ours", "dense"}
    assert "all layers, 1 rows" in run(
        "bench", native, "--rows", "1", "--repeats", "1", "--device", "cpu"
    ).stdout.replace("\n", " ")


def test_bench_tells_which_kernels_have_no_figure(monkeypatch):
    class Failing(peers.Cublas):
        name = "failing"

        def prepare(self, weight, bits, group_size):
            raise RuntimeError("no kernel image")

    monkeypatch.setitem(peers.REGISTRY, "failing", Failing)
    layer = LinearLayer("o_proj", (64,), 128, SPEC, 3)
    wanted = ["failing", "nonsense"]
    (result,) = bench.measure([layer], [2], torch.device("cpu"), wanted, repeats=1)
    assert "no kernel image" in result.missing["failing"]
    assert "unknown" in result.missing["nonsense"]
    assert bench.totals([result])[2]["ours"] == pytest.approx(3 * result.us["ours"], abs=0.1)


def test_a_wrong_kernel_is_not_timed():
    layer = LinearLayer("o_proj", (64,), 128, SPEC)
    with pytest.raises(FluteError, match="wrong result"):
        bench._check(layer, lambda x: x.new_zeros(1, 64), torch.randn(64, 128))
