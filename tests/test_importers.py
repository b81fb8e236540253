"""Foreign checkpoints decode bit for bit; what is refused is in test_importers_refuse.py."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from zoo_writer import (
    dense,
    encode,
    nf_table,
    pair_table,
    quantize,
    random_table,
    write_zoo_checkpoint,
    zoo_tensors,
)

from flute_vllm.checkpoint import Checkpoint, read_json
from flute_vllm.errors import FluteError
from flute_vllm.format import LayerSpec, dequantize_codes, pack, unpack
from flute_vllm.importers import find, flute_tile, from_config
from flute_vllm.importers.base import build_native_config, group_by_module
from flute_vllm.importers.flute_layout import decode, tile_rows
from flute_vllm.schema import FluteQuantizationConfig

DATA = Path(__file__).parent / "data"
ZOO = DATA / "ckpt_w4"
LAYOUTS = [(2, 32), (2, 64), (3, 32), (4, 32), (4, 64)]
# Packed by upstream from idx(n, k) = (5n + 3k + n // 32) mod 2**b, N = 1024, K = 64 (section 3.4 of
# the format notes): SHA-256 of the bytes, and u[0,0], u[0,1], u[1,0], u[5,6], u[T,2], u[-1,-1].
GOLDEN = {
    (4, 32): ("ff515ba4479767601643185b91ec478602fe562a8d57e6afedb29fe718930362",
              "1403 3625 6958 cfbe bead 4736"),
    (4, 64): ("9a15ae4edddfc05535ac73bc9d2a5e3fc0ed7910c3070b30ab6545087a391dc8",
              "2503 6947 7a58 d0be 03e1 4725"),
    (3, 32): ("9037ee2bf0f73608671ea6ef5695576f155018dd28daf741b147c24782be9463",
              "1783 a733 e0e8 cc5e 7331 9e0e"),
    (2, 32): ("1695e64a321876194e7edb515d13a8a8515710cd5afa5531b2b4d73bf6fd50cc",
              "e943 e943 3e94 943e 43e9 3e94"),
    (2, 64): ("a1d3e8458b74e6a20d08443bd85aab8d2cebecbba3d1e563001f59ad37444633",
              "9393 9393 e4e4 4e4e 3939 3939"),
}  # fmt: skip


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def vector_files() -> list[Path]:
    folders = [DATA / "flute_vectors"]
    if extra := os.environ.get("FLUTE_TEST_VECTORS"):
        folders.append(Path(extra))
    return [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]


def codes_of(bits: int, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)


def zoo(bits: int = 4, group_size: int = 64, **extra) -> dict:
    return {"num_sms": 108, "num_bits": bits, "group_size": group_size, **extra}


def layer(
    bits: int = 4, group_size: int = 64, tile_p: int = 32, rows: int = 512, columns: int = 256
):
    """Tensors of a Gaussian layer by suffix, and its dense twin."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.02
    table = nf_table(bits)
    codes, scales = quantize(weight, table, group_size)
    return zoo_tensors(codes, scales, table, bits, tile_p), dense(codes, scales, table)


# ------------------------------------------------------------------------------------- the layout


@pytest.mark.parametrize(("bits", "tile_p"), LAYOUTS)
def test_golden_hash(bits, tile_p):
    n, k = torch.arange(1024)[:, None], torch.arange(64)[None, :]
    codes = ((5 * n + 3 * k + n // 32) % 2**bits).to(torch.uint8)
    packed = encode(codes, bits, tile_p)
    digest, words = GOLDEN[bits, tile_p]
    assert sha256(packed) == digest
    last = (packed.shape[0] - 1, 63)
    places = [(0, 0), (0, 1), (1, 0), (5, 6), (tile_p, 2), last]
    assert " ".join(f"{int(packed[p]) & 0xFFFF:04x}" for p in places) == words
    assert torch.equal(decode(packed, bits, tile_p), codes)


@pytest.mark.parametrize("path", vector_files(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_upstream_vector(path):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    bits, tile_p = int(metadata["num_bits"]), int(metadata["tileP"])
    group_size, scales = int(metadata["group_size"]), tensors["scales"]
    codes = decode(tensors["weight"], bits, tile_p)
    assert sha256(codes) == metadata.get("indices_sha256") or torch.equal(codes, tensors["indices"])

    def check(weight):
        if "dequant" in tensors:
            assert torch.equal(weight, tensors["dequant"].to(scales.dtype))
        else:
            assert sha256(weight) == metadata["dequant_sha256"]

    if metadata["lut"] == "vector":
        pairs = tensors["tables2"].view(scales.dtype).reshape(-1, 2)
        check(dequantize_codes(codes, scales, pairs))
        return
    assert torch.equal(
        pair_table(tensors["tables"]).view(torch.int32), tensors["tables2"].view(torch.int32)
    )
    importer = from_config({**zoo(bits, group_size), "tile_p": tile_p})
    native = importer.to_native("m", {k: tensors[k] for k in importer.tensor_suffixes})
    dtype = str(scales.dtype).removeprefix("torch.")
    assert native.spec == LayerSpec(bits, group_size, dtype)
    assert torch.equal(native.qweight, pack(codes, bits))
    check(native.dequantize())


@settings(max_examples=40, deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS),
    tiles=st.integers(1, 3),
    units=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_decode_inverts_encode(layout, tiles, units, seed):
    bits, tile_p = layout
    codes = codes_of(bits, tiles * tile_rows(bits, tile_p), 32 * units, seed)
    packed = encode(codes, bits, tile_p)
    assert packed.shape == (codes.shape[0] * bits // 16, codes.shape[1])
    assert torch.equal(decode(packed, bits, tile_p), codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_long_matrix_is_decoded_in_pieces(bits, monkeypatch):
    monkeypatch.setattr("flute_vllm.importers.flute_layout.CPU_CHUNK", 1)
    tensors, expected = layer(bits, rows=2048, columns=64, group_size=32)
    native = from_config(zoo(bits, 32)).to_native("m", tensors)
    assert torch.equal(native.dequantize(), expected)


def test_strided_weight():
    codes = codes_of(4, 256, 64)
    wide = torch.stack([encode(codes, 4)] * 2, dim=-1)
    assert torch.equal(decode(wide[..., 0], 4), codes)


# ------------------------------------------------------------------------- a published checkpoint


def test_zoo_checkpoint_is_exact():
    checkpoint = Checkpoint(ZOO)
    importer = find(checkpoint)
    assert importer.name == "flute_zoo"
    expected = read_json(ZOO / "dense_sha256.json")
    modules = importer.modules(checkpoint)
    assert sorted(f"{module}.weight" for module in modules) == sorted(expected)
    specs = {}
    for module in modules:
        tensors = {s: checkpoint.load(f"{module}.{s}") for s in importer.required_suffixes}
        native = importer.to_native(module, tensors)
        specs[module] = native.spec
        assert sha256(native.dequantize()) == expected[f"{module}.weight"], module
        layout = native.spec.tensor_layout(tensors["scales"].shape[0], tensors["weight"].shape[1])
        for name, tensor in native.tensors().items():
            assert (tuple(tensor.shape), tensor.dtype) == layout[name]
    config = importer.native_config(specs)
    assert config == {
        "quant_method": "flute", "format_version": 1, "bits": 4, "group_size": 64,
        "scale_dtype": "float16", "table_kind": "scalar", "modules_to_not_convert": ["lm_head"],
        "overrides": {},
    }  # fmt: skip
    parsed = FluteQuantizationConfig.parse(config)
    assert all(parsed.spec_for(module) == specs[module] for module in modules)
    assert parsed.spec_for("lm_head") is None


@pytest.mark.parametrize("text", [
    '{"num_bits":4,"group_size":64,"num_sms":84}',
    '\n{\n\t"version": "0.2.6", "num_sms": 128,\n "num_bits": 4, "group_size": 64 }\n\n',
    '{"version": "0.3.0", "num_bits": 4, "group_size": 64}',
    '{"version": null, "num_sms": null, "num_bits": 4, "group_size": 64, "tile_p": 32}',
    '{"num_bits": 4, "group_size": 64, "template_id": 16, "author": "someone"}',
])  # fmt: skip
def test_lenient_config(tmp_path, text):
    shutil.copytree(ZOO, tmp_path / "zoo")
    (tmp_path / "zoo" / "flute_config.json").write_text(text)
    importer = find(tmp_path / "zoo")
    assert importer.layer_spec() == LayerSpec(4, 64, "float16")
    assert importer.tile_p("model.layers.0.self_attn.q_proj", 512) == 32


def test_find_leaves_native_and_dense_checkpoints_alone(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert find(tmp_path) is None
    (tmp_path / "flute_config.json").write_text(json.dumps(zoo()))
    assert find(tmp_path).name == "flute_zoo"
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "flute"}}')
    assert find(tmp_path) is None


def test_from_config_of_an_unknown_format():
    with pytest.raises(FluteError, match="unknown checkpoint format") as caught:
        from_config({"quant_method": "gptq", "bits": 4})
    assert "quant_method, bits" in caught.value.why
    assert "flute_zoo" in caught.value.why


@pytest.mark.parametrize(("bits", "group_size", "tile_p"), [
    (2, 32, 32), (2, 128, 64), (3, 64, 32), (4, 256, 32), (4, 64, 64),
])  # fmt: skip
def test_written_checkpoint_with_different_tables(tmp_path, bits, group_size, tile_p):
    generator = torch.Generator().manual_seed(3)
    prefix = "model.layers.0.self_attn"
    state = {
        f"{prefix}.{name}_proj.weight": torch.randn(rows, 256, generator=generator)
        for name, rows in (("q", 1024), ("k", 512), ("v", 512))
    } | {"lm_head.weight": torch.randn(64, 256, generator=generator)}
    tables = {f"{name}_proj": random_table(bits, seed) for seed, name in enumerate("qkv")}
    twin = write_zoo_checkpoint(
        tmp_path, state, bits, group_size, tile_p=tile_p, tables=tables,
        flute_config=zoo(bits, group_size, tile_p=tile_p),
    )  # fmt: skip
    checkpoint = Checkpoint(tmp_path)
    importer = find(checkpoint)
    modules = importer.modules(checkpoint)
    assert sorted(modules) == [f"{prefix}.{name}_proj" for name in "kqv"]
    for module in modules:
        tensors = {s: checkpoint.load(f"{module}.{s}") for s in importer.tensor_suffixes}
        native = importer.to_native(module, tensors)
        assert torch.equal(native.table, tables[module.rsplit(".", 1)[1]])
        assert torch.equal(native.dequantize(), twin[f"{module}.weight"])


def test_signs_zeros_and_order_survive():
    table = torch.tensor([0.5, -0.0, 2.0, 0.0], dtype=torch.bfloat16)
    codes = codes_of(2, 256, 64)
    scales = torch.tensor([-0.25, 0.0]).repeat(256, 1).to(torch.bfloat16)
    native = from_config(zoo(2, 32)).to_native("m", zoo_tensors(codes, scales, table, 2))
    assert native.spec.scale_dtype == "bfloat16"
    assert torch.equal(native.table.view(torch.int16), table.view(torch.int16))
    assert torch.equal(native.scales.view(torch.int16), scales.view(torch.int16))
    expected = dense(codes, scales, table)
    assert torch.equal(native.dequantize().view(torch.int16), expected.view(torch.int16))
    assert torch.equal(unpack(native.qweight, 2), codes)


# ---------------------------------------------------------------------------- tables2 is redundant


def test_tables2_is_not_needed_and_never_used(caplog):
    tensors, expected = layer()
    importer = from_config(zoo())
    with caplog.at_level(logging.WARNING):
        assert torch.equal(importer.to_native("m", tensors).dequantize(), expected)
        assert not caplog.records
        tensors["tables2"] = tensors["tables2"].clone().fill_(1.0)
        assert torch.equal(importer.to_native("m", tensors).dequantize(), expected)
    assert "m.tables2 differs" in caplog.text
    del tensors["tables2"]
    assert torch.equal(importer.to_native("m", tensors).dequantize(), expected)


# -------------------------------------------------------------------------------- the tile size T


@pytest.mark.parametrize(("bits", "wide"), [
    (4, {*range(16), *range(48, 64), *range(96, 112)}),
    (2, {*range(4), *range(12, 16), *range(24, 28)}),
    (3, set()),
])  # fmt: skip
def test_tile_of_every_template(bits, wide):
    ids = range(flute_tile.NUM_TEMPLATES[bits])
    assert {i for i in ids if flute_tile.tile_of_template(bits, i) == 64} == wide


@pytest.mark.parametrize(("config", "rows", "tile"), [
    ({}, 512, None),
    ({"version": "0.4.2"}, 512, None),
    ({"version": "1.0"}, 512, None),
    ({"version": "unknown"}, 512, None),
    ({"version": "0.0.6"}, 512, 32),
    ({"version": "0.3.0.dev1"}, 512, 32),
    ({"version": "0.4.2", "num_sms": 108}, 512, 32),
    ({"version": "0.4.2", "tile_p": 64}, 512, 64),
    ({"num_sms": 108, "tile_p": 64}, 512, 64),
    ({"version": "0.4.2", "template_id": 50}, 512, 64),
    ({"version": "0.4.2", "template_id": 64}, 512, 32),
    ({"version": "0.4.2", "tile_p": {"other": 64}}, 512, None),
    ({"version": "0.4.2", "tile_p": {"q_proj": 64}}, 512, 64),
    ({"version": "0.4.2", "template_id": {"re:.*q_proj": 0, "k_proj": 20}}, 512, 64),
    ({"version": "0.4.2"}, 384, 32),
    ({"version": "0.4.2", "num_bits": 3}, 512, 32),
    ({"version": "0.4.2", "num_bits": 2}, 768, 32),
    ({"version": "0.4.2", "num_bits": 2}, 1024, None),
])  # fmt: skip
def test_tile_from_metadata_and_shape(config, rows, tile):
    importer = from_config({"num_bits": 4, "group_size": 64, **config})
    assert importer.tile_p("model.layers.0.self_attn.q_proj", rows) == tile


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("tile_p", [32, 64])
@pytest.mark.parametrize(("rows", "columns"), [(512, 128), (1024, 512)])
def test_tile_from_statistics(bits, tile_p, rows, columns):
    tensors, expected = layer(bits, tile_p=tile_p, rows=rows, columns=columns)
    importer = from_config({"version": "0.4.2", "num_bits": bits, "group_size": 64})
    assert torch.equal(importer.to_native("m", tensors).dequantize(), expected)


def test_statistics_survive_zero_groups_and_negative_scales():
    tensors, expected = layer(tile_p=64, columns=512)
    sign = torch.ones_like(tensors["scales"])
    sign[::3] = -1
    sign[5] = 0
    tensors["scales"] = tensors["scales"] * sign
    expected = expected * sign.repeat_interleave(64, dim=1)
    importer = from_config({"num_bits": 4, "group_size": 64})
    assert torch.equal(importer.to_native("m", tensors).dequantize(), expected)


@pytest.mark.parametrize("case", ["random", "one group", "constant scales"])
def test_undecidable_tile_asks(case):
    tensors, _ = layer(columns=64 if case == "one group" else 256)
    if case == "random":
        tensors["weight"] = encode(codes_of(4, 512, 256), 4)
    if case == "constant scales":
        tensors["scales"] = torch.ones_like(tensors["scales"])
    with pytest.raises(FluteError, match="unknown tile size") as caught:
        from_config({"version": "0.4.1", "num_bits": 4, "group_size": 64}).to_native("a.b", tensors)
    assert caught.value.where == "a.b.weight"
    assert '"tile_p": 32' in caught.value.fix
    assert "flute_config.json" in caught.value.fix


# --------------------------------------------------------------------- helpers for further formats


def test_native_config_of_mixed_layers():
    common, other = LayerSpec(4, 64, "float16"), LayerSpec(3, 128, "float16")
    specs = {"l.0.q": common, "l.0.k": other, "l.0.v": common}
    config = build_native_config(other, specs, ["lm_head", "vision"])
    parsed = FluteQuantizationConfig.parse(config)
    assert {module: parsed.spec_for(module) for module in specs} == specs
    assert parsed.spec_for("vision.fc") is None
    assert config["overrides"] == {"l.0.k": {"bits": 3, "group_size": 128}}
    specs["l.0.k"] = LayerSpec(4, 64, "bfloat16")
    with pytest.raises(FluteError, match="different scale dtypes"):
        build_native_config(common, specs, [])


def test_dotted_suffixes_are_told_apart(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    names = ("a.weight", "a.weight.absmax", "a.weight.quant_map", "a.bias", "b.weight")
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "model.safetensors")
    found = group_by_module(
        Checkpoint(tmp_path), ("weight", "weight.absmax", "weight.quant_map", "absmax")
    )
    assert {module: sorted(infos) for module, infos in found.items()} == {
        "a": ["weight", "weight.absmax", "weight.quant_map"],
        "b": ["weight"],
    }
