"""Damaged, inconsistent and unsuitable inputs: each ends with a FluteError that names the cause.

Every case damages a copy of a good folder, runs one operation and gives a text that the message
must contain: the telling number or name. No case may leave an output folder behind.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny_model

from flute_vllm.checkpoint import Checkpoint, resolve_source
from flute_vllm.convert import convert_checkpoint, dequantize_checkpoint
from flute_vllm.errors import FluteError
from flute_vllm.evaluate import read_texts
from flute_vllm.info import describe
from flute_vllm.quantize.codebooks import read_codebook
from flute_vllm.quantize.model import quantize_checkpoint
from flute_vllm.quantize.plan import QuantizeSettings
from flute_vllm.validate import validate_checkpoint

WEIGHTS = "model.safetensors"
DOWN = "model.layers.0.mlp.down_proj"
Damage = Callable[[Path], None]
Operation = Callable[[Path, Path], object]


# --- operations: (folder, output) --------------------------------------------------------------


def validate(folder: Path, out: Path) -> None:
    validate_checkpoint(Checkpoint(folder))


def dequantize(folder: Path, out: Path) -> None:
    dequantize_checkpoint(folder, out)


def convert(folder: Path, out: Path) -> None:
    convert_checkpoint(folder, out)


def info(folder: Path, out: Path) -> None:
    describe(folder)


def quantize(**settings) -> Operation:
    return lambda folder, out: quantize_checkpoint(folder, out, QuantizeSettings(**settings))


# --- damages -----------------------------------------------------------------------------------


def nothing(folder: Path) -> None:
    """For cases where the settings are at fault."""


def weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


def put(name: str, tensor: torch.Tensor) -> Damage:
    return weights(lambda tensors: tensors.update({name: tensor}))


def drop(name: str) -> Damage:
    return weights(lambda tensors: tensors.pop(name))


def recast(name: str, dtype: torch.dtype) -> Damage:
    return weights(lambda tensors: tensors.update({name: tensors[name].to(dtype)}))


def cut(name: str, columns: int) -> Damage:
    """Drops the last columns of a tensor."""
    return weights(lambda t: t.update({name: t[name][..., :-columns].contiguous()}))


def poke(name: str, value: float) -> Damage:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[7] = value

    return weights(change)


def section(**fields) -> Damage:
    """Changes fields of quantization_config; None removes one."""

    def damage(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        values = config["quantization_config"]
        values.update(fields)
        for name in [name for name, value in values.items() if value is None]:
            del values[name]
        path.write_text(json.dumps(config))

    return damage


def config(**fields) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return damage


def text(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content) and None


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def truncate(size: int) -> Damage:
    """Keeps the first ``size`` bytes of the weight file; counts from its end if negative."""

    def damage(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(data[:size])

    return damage


def header(change: Callable[[dict], None]) -> Damage:
    """Rewrites the JSON header and leaves the data."""

    def damage(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        value = json.loads(data[8 : 8 + length])
        change(value)
        encoded = json.dumps(value).encode()
        rewritten = struct.pack("<Q", len(encoded)) + encoded + data[8 + length :]
        (folder / WEIGHTS).write_bytes(rewritten)

    return damage


def start(data: bytes) -> Damage:
    """Overwrites the first bytes of the weight file."""

    def damage(folder: Path) -> None:
        old = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(data + old[len(data) :])

    return damage


def twice_in_header(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    entry = json.dumps({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
    encoded = ('{"same.name": ' + entry + ', "same.name": ' + entry + "}").encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])


def second_shard(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    save_file({f"{DOWN}.table": torch.zeros(16)}, folder / "model-00002-of-00002.safetensors")


def index(weight_map: dict[str, str]) -> Damage:
    return text("model.safetensors.index.json", json.dumps({"weight_map": weight_map}))


def pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def gptq_like(folder: Path) -> None:
    save_file(
        {
            f"{DOWN}.qweight": torch.zeros(64, 256, dtype=torch.int32),
            f"{DOWN}.qzeros": torch.zeros(8, 32, dtype=torch.int32),
            f"{DOWN}.scales": torch.ones(8, 256, dtype=torch.float16),
            f"{DOWN}.g_idx": torch.zeros(512, dtype=torch.int32),
        },
        folder / WEIGHTS,
    )


def offset_by_four(value: dict) -> None:
    name = next(name for name in value if name != "__metadata__")
    begin, end = value[name]["data_offsets"]
    value[name]["data_offsets"] = [begin + 4, end + 4]


def negative_shape(value: dict) -> None:
    value[f"{DOWN}.table"]["shape"] = [-16]


def strange_dtype(value: dict) -> None:
    value[f"{DOWN}.table"]["dtype"] = "F6_E2M3"


Q, S, T = f"{DOWN}.qweight", f"{DOWN}.scales", f"{DOWN}.table"

# what is wrong: (damage, operation, text in the message)
NATIVE = {
    "header cut": (truncate(100), validate, "100 bytes"),
    "eight bytes missing": (truncate(5), validate, "5 bytes"),
    "empty file": (truncate(0), validate, "0 bytes"),
    "data cut": (truncate(-100), validate, "expected"),
    "garbage header": (start(struct.pack("<Q", 64) + b"\xff" * 64), validate, "not JSON"),
    "header length absurd": (start(struct.pack("<Q", 2**60)), validate, str(2**60)),
    "offsets leave a hole": (header(offset_by_four), validate, "begins at byte 4"),
    "negative shape": (header(negative_shape), validate, T),
    "unknown dtype": (header(strange_dtype), validate, "F6_E2M3"),
    "name twice in a header": (twice_in_header, validate, "same.name"),
    "name in two files": (second_shard, validate, T),
    "missing shard": (index({T: "model-00002.safetensors"}), info, "model-00002"),
    "index leaves the folder": (index({T: "../other.safetensors"}), info, "weight_map"),
    "index names an unknown tensor": (index({"ghost": WEIGHTS}), info, "ghost"),
    "missing scales": (drop(S), dequantize, S),
    "missing table": (drop(T), dequantize, T),
    "missing qweight": (drop(Q), dequantize, Q),
    "stray zeros": (put(f"{DOWN}.zeros", torch.zeros(3)), dequantize, "zeros"),
    "weight beside qweight": (put(f"{DOWN}.weight", torch.zeros(4, 4)), validate, "weight"),
    "excluded module": (section(modules_to_not_convert=["lm_head", DOWN]), validate, DOWN),
    "bits 5": (section(bits=5), validate, "5"),
    "bits as text": (section(bits="4"), validate, "bits"),
    "bits true": (section(bits=True), validate, "bits"),
    "bits in config 3, tensors 4": (section(bits=3), validate, "[16]"),
    "group 48": (section(group_size=48), validate, "48"),
    "group 32, tensors 64": (section(group_size=32), validate, "[256, 16]"),
    "format_version 2": (section(format_version=2), validate, "2"),
    "format_version missing": (section(format_version=None), validate, "None"),
    "format_version as text": (section(format_version="1"), validate, "'1'"),
    "format_version true": (section(format_version=True), validate, "True"),
    "unknown key": (section(zero_point=True), validate, "zero_point"),
    "unknown table kind": (section(table_kind="triple"), validate, "triple"),
    "pair kind, scalar table": (section(table_kind="pair"), validate, "[256, 2]"),
    "invalid regex": (section(modules_to_not_convert=["re:*"]), validate, "re:*"),
    "override with bits 7": (section(overrides={DOWN: {"bits": 7}}), validate, "7"),
    "override contradicts tensors": (section(overrides={DOWN: {"bits": 2}}), validate, "[16]"),
    "override with unknown key": (section(overrides={DOWN: {"bit": 4}}), validate, "bit"),
    "NaN scale": (poke(S, float("nan")), dequantize, S),
    "inf scale": (poke(S, float("inf")), dequantize, "inf"),
    "NaN table": (poke(T, float("nan")), dequantize, T),
    "qweight int16": (recast(Q, torch.int16), validate, "int16"),
    "scales float32": (recast(S, torch.float32), validate, "float32"),
    "table float16": (recast(T, torch.float16), validate, "float16"),
    "scale_dtype contradicts": (section(scale_dtype="float16"), validate, "bfloat16"),
    "scale_dtype unknown": (section(scale_dtype="float32"), validate, "float32"),
    "qweight one column short": (cut(Q, 1), validate, "63"),
    "qweight a unit short": (cut(Q, 4), validate, "480"),
    "scales one group short": (cut(S, 1), validate, "[256, 7]"),
    "table one value short": (cut(T, 1), validate, "[15]"),
    "scales flat": (put(S, torch.ones(2048).bfloat16()), validate, "[2048]"),
    "bias of another length": (put(f"{DOWN}.bias", torch.ones(7)), validate, "[7]"),
    "two configs": (text("flute_config.json", '{"num_bits": 4}'), validate, "flute_config.json"),
    "GPTQ tensors under our name": (gptq_like, validate, f"{DOWN}.table"),
    "unknown method": (config(quantization_config={"quant_method": "gptq"}), convert, "gptq"),
    "converting a native one": (nothing, convert, "already native"),
    "quantizing a native one": (nothing, quantize(), "'flute'"),
    "section is a list": (config(quantization_config=[4]), validate, "[4]"),
    "no config.json": (remove("config.json"), validate, "config.json"),
    "config.json cut": (text("config.json", '{"a": '), validate, "config.json"),
    "config.json is a list": (text("config.json", "[]"), validate, "list"),
}

DENSE = {
    "dequantizing a dense one": (nothing, dequantize, "quantization_config"),
    "pickle only": (pickle_only, quantize(), "pytorch_model.bin"),
    "no weights": (remove(WEIGHTS), quantize(), "safetensors"),
    "upstream FLUTE source": (
        text("flute_config.json", '{"num_bits": 4, "group_size": 64}'),
        quantize(),
        "flute_config.json",
    ),
    "another quantized source": (
        config(quantization_config={"quant_method": "awq"}),
        quantize(),
        "awq",
    ),
    "unknown model_type": (config(model_type="perceptron"), quantize(), "perceptron"),
    "config of another size": (config(intermediate_size=1024), quantize(), "1024"),
    "NaN weight": (poke(f"{DOWN}.weight", float("nan")), quantize(), DOWN),
    "inf weight": (poke(f"{DOWN}.weight", float("inf")), quantize(), "inf"),
    "fp16 scale overflow": (
        poke(f"{DOWN}.weight", 1e6),
        quantize(scale_dtype="float16", recipe="nf"),
        "65504",
    ),
    "bits 5 asked": (nothing, quantize(bits=5), "5"),
    "group 48 asked": (nothing, quantize(group_size=48), "48"),
    "unknown recipe": (nothing, quantize(recipe="worst"), "worst"),
    "no table of these bits": (nothing, quantize(bits=2, table="fp"), "fp tables of 3, 4 bits"),
    "invalid regex asked": (nothing, quantize(skip=("re:(",)), "re:("),
    "pattern without effect": (nothing, quantize(skip=("down_prog",)), "down_prog"),
    "fused modules differ": (nothing, quantize(overrides={"q_proj": 2}), "q_proj: 2 bits"),
    "fused modules partly dense": (nothing, quantize(skip=("up_proj",)), "up_proj: dense"),
    "everything skipped": (nothing, quantize(skip=("layers",)), "14 linear modules"),
    "no such device": (nothing, quantize(device="abacus"), "abacus"),
}


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("bad") / "dense", "llama")


@pytest.fixture(scope="session")
def native_folder(dense_folder) -> Path:
    out = dense_folder.parent / "native"
    quantize_checkpoint(dense_folder, out)
    # One file, so that a damage finds every tensor in it.
    tensors = {k: v for file in out.glob("*.safetensors") for k, v in load_file(file).items()}
    for file in (*out.glob("*.safetensors"), out / "model.safetensors.index.json"):
        file.unlink()
    save_file(tensors, out / WEIGHTS)
    return out


def check(folder: Path, case: tuple[Damage, Operation, str], tmp_path: Path) -> None:
    damage, operation, told = case
    copy = tmp_path / "input"
    shutil.copytree(folder, copy)
    damage(copy)
    with pytest.raises(FluteError) as caught:
        operation(copy, tmp_path / "out")
    error = caught.value
    assert all((error.what, error.where, error.why, error.fix))
    assert told in f"{error.what} {error.where} {error.why}", str(error)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("out*/config.json"))


@pytest.mark.parametrize("case", NATIVE)
def test_bad_native_checkpoint(case, native_folder, tmp_path):
    check(native_folder, NATIVE[case], tmp_path)


@pytest.mark.parametrize("case", DENSE)
def test_bad_source(case, dense_folder, tmp_path):
    check(dense_folder, DENSE[case], tmp_path)


def test_in_features_100(tmp_path):
    """No module of this model fits: 100 is not a multiple of any group size."""
    sizes = {"hidden_size": 100, "intermediate_size": 100, "head_dim": 50}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    folder = write_tiny_model(tmp_path / "input", "llama", **sizes, **heads)
    check(folder, (nothing, quantize(), "100 is not a positive multiple of 64"), tmp_path / "case")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_existing_output_stays(kind, dense_folder, tmp_path):
    out = tmp_path / "out"
    out.write_text("mine") if kind == "file" else out.mkdir()
    with pytest.raises(FluteError, match="never overwritten"):
        quantize_checkpoint(dense_folder, out)
    assert out.exists()
    assert not (tmp_path / "out.partial").exists()


def test_empty_text_for_eval(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(FluteError, match=r"empty\.txt"):
        read_texts([tmp_path / "empty.txt"])


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_no_such_source(source):
    with pytest.raises(FluteError, match="does not exist"):
        resolve_source(source)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"bits": 5, "values": []}', "5"),
        ('{"bits": 4, "values": [0, 1]}', "[2]"),
        ('{"bits": 2, "values": [0, 1, 2, NaN]}', "NaN"),
        ('{"bits": 2, "values": [0, 0, 0, 0]}', "0.0"),
        ('{"bits": 2, "values": [[0], 1, 2, 3]}', "numbers"),
        ('{"bits": 2, "values": ["a", "b", "c", "d"]}', "numbers"),
        ('{"bits": 2, "table_kind": "triple", "values": [0, 1, 2, 3]}', "triple"),
        ('{"bits": 2, "table_kind": "pair", "values": [0, 1, 2, 3]}', "[16, 2]"),
        ("[]", "list"),
    ],
)
def test_bad_table_file(content, told, tmp_path):
    path = tmp_path / "table.json"
    path.write_text(content)
    with pytest.raises(FluteError) as caught:
        read_codebook(path)
    assert told in caught.value.why
    assert str(path) in caught.value.where
