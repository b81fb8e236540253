"""Reading headers, writing shards one tensor at a time, atomic folders, dense twins."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny_model

from flute_vllm.checkpoint import INDEX_NAME, Checkpoint
from flute_vllm.convert import convert_checkpoint, dense_state_dict, dequantize_checkpoint
from flute_vllm.errors import FluteError
from flute_vllm.format import dequantize
from flute_vllm.quantize.model import Callbacks, quantize_checkpoint
from flute_vllm.quantize.plan import QuantizeSettings
from flute_vllm.validate import validate_checkpoint
from flute_vllm.writer import MARKER, AtomicFolder

ZOO = Path(__file__).parent / "data" / "ckpt_w4"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.uint8, torch.int64]


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory) -> Path:
    """A model in several shards."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("checkpoint")
    model = AutoModelForCausalLM.from_pretrained(write_tiny_model(folder / "one", "llama"))
    model.save_pretrained(folder / "dense", max_shard_size="1MB")
    (folder / "dense" / "tokenizer.json").write_text("{}")
    (folder / "dense" / "pytorch_model.bin").write_bytes(b"not copied")
    return folder / "dense"


@pytest.fixture(scope="module")
def native_folder(dense_folder) -> Path:
    out = dense_folder.parent / "native"
    overrides = {"re:.*down_proj": 3}
    quantize_checkpoint(dense_folder, out, QuantizeSettings(overrides=overrides, skip=("o_proj",)))
    return out


# --- shards ------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(DTYPES)), max_size=6
    ),
    seed=st.integers(0, 1000),
)
def test_written_files_are_read_by_the_library(shapes, seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shard")
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"t{number}.é": torch.randint(0, 100, shape, generator=generator).to(dtype)
        for number, (shape, dtype) in enumerate(shapes)
    }
    with AtomicFolder(folder / "out") as out:
        out.write_tensors("model.safetensors", tensors)
        out.commit({"a": 1})
    loaded = load_file(folder / "out" / "model.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
    checkpoint = Checkpoint(folder / "out")
    assert all(torch.equal(checkpoint.load(name), value) for name, value in tensors.items())
    assert checkpoint.nbytes == sum(value.nbytes for value in tensors.values())
    assert not (folder / "out" / INDEX_NAME).exists()


def test_transposed_tensor_is_stored_in_order(tmp_path):
    tensor = torch.arange(12).reshape(3, 4).T
    with AtomicFolder(tmp_path / "out") as out:
        out.write_tensors("model.safetensors", {"a": tensor})
        out.commit({})
    assert torch.equal(Checkpoint(tmp_path / "out").load("a"), tensor)


def test_several_files_get_an_index(tmp_path):
    with AtomicFolder(tmp_path / "out") as out:
        out.write_tensors("a.safetensors", {"x": torch.zeros(3)})
        out.write_tensors("b.safetensors", {"y": torch.zeros(5)})
        out.commit({})
    index = json.loads((tmp_path / "out" / INDEX_NAME).read_text())
    assert index["weight_map"] == {"x": "a.safetensors", "y": "b.safetensors"}
    assert index["metadata"]["total_size"] == 32


@pytest.mark.parametrize(
    "wrong", [{}, {"x": torch.zeros(4)}, {"x": torch.zeros(3).half()}, {"y": torch.zeros(3)}]
)
def test_a_shard_holds_exactly_its_layout(wrong, tmp_path):
    def write() -> None:
        layout = {"x": ((3,), torch.float32)}
        with AtomicFolder(tmp_path / "out") as out, out.shard("a.safetensors", layout) as shard:
            for name, tensor in wrong.items():
                shard.write(name, tensor)

    with pytest.raises(FluteError, match="x"):
        write()
    assert not list(tmp_path.iterdir())


# --- atomic folders ----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_run_interrupted_in_its_first_block_leaves_nothing(error, dense_folder, tmp_path):
    def stop(report, unit) -> None:
        raise error

    with pytest.raises(error):
        quantize_checkpoint(dense_folder, tmp_path / "out", callbacks=Callbacks(on_module=stop))
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_killed_run_are_replaced(dense_folder, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / MARKER).touch()
    (tmp_path / "out.partial" / "old.safetensors").write_bytes(b"half")
    quantize_checkpoint(dense_folder, tmp_path / "out", QuantizeSettings(recipe="nf"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "old.safetensors").exists()


def test_a_folder_that_no_run_left_is_kept(dense_folder, tmp_path):
    """Also when it is the source itself: `quantize model.partial model`."""
    source = tmp_path / "out.partial"
    shutil.copytree(dense_folder, source)
    with pytest.raises(FluteError, match="temporary output exists"):
        quantize_checkpoint(source, tmp_path / "out", QuantizeSettings(recipe="nf"))
    assert sorted(p.name for p in source.iterdir()) == sorted(
        p.name for p in dense_folder.iterdir()
    )


def test_weights_beside_model_safetensors_are_not_the_model(dense_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(dense_folder, folder)
    single = Checkpoint(write_single(folder))
    shutil.copyfile(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert Checkpoint(folder).tensors == single.tensors


def write_single(folder: Path) -> Path:
    """Merges the shards of a folder into model.safetensors."""
    checkpoint = Checkpoint(folder)
    tensors = {name: checkpoint.load(name) for name in checkpoint.tensors}
    for file in (*checkpoint.files, folder / "model.safetensors.index.json"):
        file.unlink(missing_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_full_disk_while_writing(dense_folder, tmp_path, monkeypatch):
    real = os.fsync

    def full(descriptor: int) -> None:
        if (
            os.readlink(f"/proc/self/fd/{descriptor}")
            .rpartition("/")[2]
            .startswith("model-00002-of-")
        ):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FluteError, match="No space left") as caught:
        quantize_checkpoint(dense_folder, tmp_path / "out")
    assert "model-00002-of-" in caught.value.where
    # The file before it is kept, and the same command goes on from there.
    monkeypatch.setattr(os, "fsync", real)
    resumed = []
    callbacks = Callbacks(on_resume=lambda plan, units: resumed.extend(units))
    quantize_checkpoint(dense_folder, tmp_path / "out", callbacks=callbacks)
    assert resumed == ["model.layers.0"]
    validate_checkpoint(Checkpoint(tmp_path / "out"))


def test_too_small_a_disk_is_told_before_work(dense_folder, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    done = []
    callbacks = Callbacks(on_module=lambda report, unit: done.append(report))
    with pytest.raises(FluteError, match="1,000 are free"):
        quantize_checkpoint(dense_folder, tmp_path / "out", callbacks=callbacks)
    assert not done
    assert not list(tmp_path.iterdir())


def test_unwritable_parent(dense_folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FluteError, match="cannot write"):
        quantize_checkpoint(dense_folder, tmp_path / "file" / "out")


# --- whole checkpoints -------------------------------------------------------------------------


def test_quantized_folder(dense_folder, native_folder):
    source, native = Checkpoint(dense_folder), Checkpoint(native_folder)
    config = validate_checkpoint(native)
    # A file for each block, and one for what lies outside.
    assert [file.name for file in native.files] == [
        f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)
    ]
    assert (native_folder / "tokenizer.json").exists()
    assert not (native_folder / "pytorch_model.bin").exists()
    kept = {name: value for name, value in native.config.items() if name != "quantization_config"}
    assert kept == source.config
    assert config.spec_for("model.layers.0.mlp.down_proj").bits == 3
    assert config.spec_for("model.layers.0.self_attn.o_proj") is None
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.o_proj.weight"):
        assert torch.equal(native.load(name), source.load(name))
    report = json.loads((native_folder / "report.json").read_text())
    assert report["totals"]["modules"] == len(report["modules"]) == 12
    assert report["totals"]["output_bytes"] == native.nbytes
    assert report["modules"]["model.layers.0.mlp.down_proj"]["bits"] == 3
    assert report["settings"]["skip"] == ["o_proj"]


def test_reported_error_is_the_error(dense_folder, native_folder):
    module = "model.layers.1.mlp.down_proj"
    native = Checkpoint(native_folder)
    parts = {name: native.load(f"{module}.{name}") for name in ("qweight", "scales", "table")}
    weight = Checkpoint(dense_folder).load(f"{module}.weight").double()
    off = (dequantize(**parts, bits=3).double() - weight).square().sum() / weight.square().sum()
    report = json.loads((native_folder / "report.json").read_text())
    assert report["modules"][module]["error"] == pytest.approx(float(off), rel=1e-4)


def test_dense_twin(dense_folder, native_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    dequantize_checkpoint(native_folder, tmp_path / "twin")
    source, twin = Checkpoint(dense_folder), Checkpoint(tmp_path / "twin")
    assert "quantization_config" not in twin.config
    assert not (tmp_path / "twin" / "report.json").exists()
    assert {n: i.shape for n, i in twin.tensors.items()} == {
        n: i.shape for n, i in source.tensors.items()
    }
    config, pairs = dense_state_dict(native_folder)
    assert config == twin.config
    assert all(torch.equal(value, twin.load(name)) for name, value in pairs)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "twin")
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_absmax_of_the_twin_is_itself(native_folder, tmp_path):
    """Quantizing exactly representable weights loses nothing."""
    settings_ = QuantizeSettings(recipe="nf", skip=("o_proj", "down_proj"))
    dequantize_checkpoint(native_folder, tmp_path / "twin")
    quantize_checkpoint(tmp_path / "twin", tmp_path / "once", settings_)
    dequantize_checkpoint(tmp_path / "once", tmp_path / "second")
    quantize_checkpoint(tmp_path / "second", tmp_path / "twice", settings_)
    dequantize_checkpoint(tmp_path / "twice", tmp_path / "third")
    second, third = Checkpoint(tmp_path / "second"), Checkpoint(tmp_path / "third")
    assert all(torch.equal(second.load(name), third.load(name)) for name in second.tensors)


def test_zoo_checkpoint(tmp_path):
    """Converted and dequantized, and dequantized directly: the published matrices, by hash."""
    convert_checkpoint(ZOO, tmp_path / "native")
    validate_checkpoint(Checkpoint(tmp_path / "native"))
    assert not (tmp_path / "native" / "flute_config.json").exists()
    expected = json.loads((ZOO / "dense_sha256.json").read_text())
    for source in (tmp_path / "native", ZOO):
        dequantize_checkpoint(source, tmp_path / f"dense-{source.name}")
        dense = Checkpoint(tmp_path / f"dense-{source.name}")
        for name, digest in expected.items():
            assert hashlib.sha256(dense.load(name).numpy().tobytes()).hexdigest() == digest
        assert not (dense.folder / "flute_config.json").exists()


def test_scale_dtypes_of_sources(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = write_tiny_model(tmp_path / "bf16", "qwen2")
    for dtype, expected in ((torch.float32, "bfloat16"), (torch.float16, "float16")):
        source = tmp_path / expected
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(source)
        out = tmp_path / f"quantized-{expected}"
        quantize_checkpoint(source, out, QuantizeSettings(bits=2, group_size=-1))
        native = Checkpoint(out)
        assert native.config["quantization_config"]["scale_dtype"] == expected
        assert native.tensors["model.embed_tokens.weight"].dtype == dtype
        validate_checkpoint(native)
