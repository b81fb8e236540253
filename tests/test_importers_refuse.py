"""What the reader of foreign checkpoints refuses: where, why and what to do."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from test_importers import codes_of, layer, zoo
from zoo_writer import encode, nf_table, zoo_tensors

from flute_vllm.checkpoint import Checkpoint
from flute_vllm.errors import FluteError
from flute_vllm.importers import from_config
from flute_vllm.importers.flute_layout import decode


@pytest.mark.parametrize(("config", "where", "why"), [
    ({"num_bits": 5}, "num_bits", "2, 3, 4"),
    ({"num_bits": "4"}, "num_bits", "2, 3, 4"),
    ({"num_bits": True}, "num_bits", "2, 3, 4"),
    ({"num_bits": [4]}, "num_bits", "2, 3, 4"),
    ({"group_size": 48}, "group_size", "32, 64, 128, 256"),
    ({"group_size": None}, "group_size", "32, 64, 128, 256"),
    ({"num_sms": "108"}, "num_sms", "int, not str"),
    ({"version": 0.3}, "version", "str, not float"),
    ({"tile_p": 16}, "tile_p", "one of 32, 64"),
    ({"tile_p": {"q_proj": "64"}}, "tile_p", "one of 32, 64"),
    ({"num_bits": 3, "tile_p": 64}, "tile_p", "3-bit weights are always packed with tile_p 32"),
    ({"template_id": 144}, "template_id", "from 0 to 143"),
    ({"num_bits": 2, "template_id": 36}, "template_id", "from 0 to 35"),
])  # fmt: skip
def test_bad_config(config, where, why):
    with pytest.raises(FluteError, match=r"unsupported") as caught:
        from_config({**zoo(), **config})
    assert caught.value.where == f"flute_config.json: {where}"
    assert why in caught.value.why
    assert "flute_config.json" in caught.value.fix


def test_missing_config_field():
    with pytest.raises(FluteError, match="group_size '\\(missing\\)'"):
        from_config({"num_bits": 4})


def test_tile_and_template_that_disagree():
    importer = from_config(zoo(tile_p=32, template_id=0))
    with pytest.raises(FluteError, match="contradictory tile size") as caught:
        importer.tile_p("m", 512)
    assert "tile_p is 32, but 4-bit template_id 0 has 64" in caught.value.why


def poisoned(tensor: torch.Tensor, value: float) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(-1)[3] = value
    return changed


BAD_TENSORS = {
    "weight dtype": (zoo(), {"weight": lambda t: t.int()}, "weight", "expected int16", "cast"),
    "weight rank": (zoo(), {"weight": lambda t: t[0]}, "weight", "[256]", "FLUTE's packer"),
    "N granularity": (
        zoo(), {"weight": lambda t: t[:16], "scales": lambda t: t[:64]}, "weight",
        "N = 64; N must be a multiple of 128 (tile_p 32)", "unsharded",
    ),
    "N granularity of tile 64": (
        zoo(tile_p=64), {"weight": lambda t: t[:96], "scales": lambda t: t[:384]}, "weight",
        "N = 384; N must be a multiple of 256 (tile_p 64)", "tile_p",
    ),
    "num_bits": (
        zoo(3), {}, "weight", "128 packed rows for N = 512 are 4 bits, but num_bits is 3",
        "flute_config.json",
    ),
    "group_size": (
        zoo(4, 128), {}, "scales", "K = 256 over 4 groups is 64, but group_size is 128",
        "flute_config.json",
    ),
    "no groups": (zoo(), {"scales": lambda t: t[:, :0]}, "scales", "0 groups", "flute_config"),
    "scales rank": (zoo(), {"scales": lambda t: t[:, 0]}, "scales", "[N, K / group_size]", "flute"),
    "tables length": (
        zoo(), {"tables": lambda t: t[:8]}, "tables", "a 4-bit table has shape [16]", "flute_config"
    ),
    "tables rank": (zoo(), {"tables": lambda t: t[None]}, "tables", "shape [16]", "flute_config"),
    "scales dtype": (
        zoo(), {"scales": lambda t: t.float()}, "scales", "scales are float32", "cast both",
    ),
    "tables dtype": (
        zoo(), {"tables": lambda t: t.bfloat16()}, "tables",
        "scales are float16 and tables bfloat16", "cast both",
    ),
    "missing scales": (
        zoo(), {"scales": None}, "scales", "this one has tables, tables2, weight", "download",
    ),
    "missing tables": (
        zoo(), {"tables": None}, "tables", "this one has scales, tables2, weight", "download",
    ),
    "missing weight": (
        zoo(), {"weight": None}, "weight", "this one has scales, tables, tables2", "download",
    ),
    "NaN scale": (
        zoo(), {"scales": lambda t: poisoned(t, float("nan"))}, "scales",
        "1 of 2048 values are NaN or infinite, the first at [0, 3]", "damaged",
    ),
    "infinite table": (
        zoo(), {"tables": lambda t: poisoned(t, float("-inf"))}, "tables",
        "1 of 16 values are NaN or infinite, the first at [3]", "damaged",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors(case, tmp_path):
    config, changes, suffix, why, fix = BAD_TENSORS[case]
    tensors, _ = layer()
    for name, change in changes.items():
        tensors[name] = None if change is None else change(tensors[name]).contiguous()
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    importer = from_config(config)
    with pytest.raises(FluteError) as caught:
        importer.to_native("a.b", tensors)
    assert caught.value.where == f"a.b.{suffix}"
    assert why in caught.value.why
    assert fix in caught.value.fix

    # Whatever shapes and dtypes show must already be seen in the headers, before any conversion.
    (tmp_path / "config.json").write_text("{}")
    save_file({f"a.b.{name}": t for name, t in tensors.items()}, tmp_path / "model.safetensors")
    if case in ("NaN scale", "infinite table"):
        assert importer.modules(Checkpoint(tmp_path)) == ["a.b"]
        return
    with pytest.raises(FluteError) as from_headers:
        importer.modules(Checkpoint(tmp_path))
    assert str(from_headers.value) == str(caught.value)


def test_columns_that_the_native_format_cannot_hold():
    # The layout allows any even K; the group sizes leave multiples of 32 only.
    codes = codes_of(4, 128, 34)
    packed = encode(codes, 4)
    assert torch.equal(decode(packed, 4), codes)
    tensors = zoo_tensors(codes, torch.ones(128, 1).half(), nf_table(4), 4)
    with pytest.raises(FluteError, match="contradict") as caught:
        from_config(zoo(4, 32)).to_native("m", tensors)
    assert "K = 34 over 1 groups is 34, but group_size is 32" in caught.value.why


def test_flute_config_without_quantized_modules(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"m.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(FluteError, match="no quantized module") as caught:
        from_config(zoo()).modules(Checkpoint(tmp_path))
    assert caught.value.where == str(tmp_path)


@pytest.mark.parametrize(("bits", "tile_p", "shape", "dtype"), [
    (4, 32, (32, 63), torch.int16), (4, 32, (32, 0), torch.int16), (4, 32, (0, 64), torch.int16),
    (3, 32, (100, 64), torch.int16), (3, 64, (192, 64), torch.int16), (2, 32, (32, 64), torch.int8),
])  # fmt: skip
def test_decode_refuses(bits, tile_p, shape, dtype):
    with pytest.raises(FluteError, match="not a FLUTE-packed weight"):
        decode(torch.zeros(shape, dtype=dtype), bits, tile_p)
