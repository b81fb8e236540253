"""The native format against constants and arithmetic that share no code with ``format.pack``."""

from __future__ import annotations

import hashlib
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from flute_vllm import format as native
from flute_vllm.errors import FluteError
from flute_vllm.format import (
    BITS,
    GROUP_SIZES,
    PER_ROW,
    UNIT,
    LayerSpec,
    dequantize,
    dequantize_codes,
    pack,
    unpack,
)
from flute_vllm.schema import FluteQuantizationConfig, module_matches

# One row whose code k is k mod 2**bits, written down by hand from "bits [bits * k, bits * (k + 1))
# of a little-endian stream". 4 bits: nibbles 0 1 2 ... with the first one low in each byte. 2 bits:
# 0b11100100 over and over. 3 bits: 0 1 2 3 4 5 6 7 is 0o76543210 = 0xFAC688, and repeats.
HAND_PACKED = {
    2: "e4" * 8,
    3: "88c6fa" * 4,
    4: "1032547698badcfe" * 2,
}
# SHA-256 of the packed bytes of idx(n, k) = (5n + 3k + n // 32) mod 2**bits, N = 64, K = 96, made
# from Python integers by ``packed_bytes`` below.
PATTERN_SHA256 = {
    2: "2cb3646f269e4e3a4a91a92b1c69ff080711abc7efb395f469ee49708b09d322",
    3: "8d5b8ab73c752feed3c58ef6b74b042f8cbea802a6b23c79aeabc2d9969c87e3",
    4: "11443c7d0e8c733f24765b2d1c9d95d1ff6a8a6a76a204f41eb6402048feb932",
}


def pattern(bits: int, rows: int = 64, columns: int = 96) -> torch.Tensor:
    n, k = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    return ((5 * n + 3 * k + n // 32) % 2**bits).to(torch.uint8)


def packed_bytes(codes: torch.Tensor, bits: int) -> bytes:
    """Every row as one big integer with code k at bit ``bits * k``, stored little-endian."""
    rows = []
    for row in codes.tolist():
        stream = sum(code << (bits * k) for k, code in enumerate(row))
        rows.append(stream.to_bytes(len(row) * bits // 8, "little"))
    return b"".join(rows)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def random_codes(bits: int, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)


def random_values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ------------------------------------------------------------------------------- packing of codes


@pytest.mark.parametrize("bits", BITS)
def test_hand_packed_row(bits):
    codes = (torch.arange(UNIT) % 2**bits).to(torch.uint8)[None]
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (1, bits)
    assert raw(packed).hex() == HAND_PACKED[bits]


@pytest.mark.parametrize("bits", BITS)
def test_pattern_hash(bits):
    codes = pattern(bits)
    assert hashlib.sha256(raw(pack(codes, bits))).hexdigest() == PATTERN_SHA256[bits]
    assert hashlib.sha256(packed_bytes(codes, bits)).hexdigest() == PATTERN_SHA256[bits]


@pytest.mark.parametrize("bits", BITS)
def test_every_value_at_every_position(bits):
    for value in range(2**bits):
        for position in range(UNIT):
            codes = torch.zeros(1, UNIT, dtype=torch.uint8)
            codes[0, position] = value
            stored = int.from_bytes(raw(pack(codes, bits)), "little")
            assert stored == value << (bits * position)
            assert torch.equal(unpack(pack(codes, bits), bits), codes)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    rows=st.integers(1, 9),
    units=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
def test_pack_is_the_bit_stream_and_unpack_its_inverse(bits, rows, units, seed):
    codes = random_codes(bits, rows, units * UNIT, seed)
    packed = pack(codes, bits)
    assert packed.shape == (rows, units * bits)
    assert raw(packed) == packed_bytes(codes, bits)
    assert torch.equal(unpack(packed, bits), codes)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), bits=st.sampled_from(BITS), rows=st.integers(1, 17))
def test_a_slice_of_the_packed_matrix_is_the_packed_slice(data, bits, rows):
    units = data.draw(st.integers(1, 8))
    first = data.draw(st.integers(0, rows - 1))
    last = data.draw(st.integers(first + 1, rows))
    left = data.draw(st.integers(0, units - 1))
    right = data.draw(st.integers(left + 1, units))
    codes = random_codes(bits, rows, units * UNIT, rows)
    packed = pack(codes, bits)[first:last, left * bits : right * bits]
    assert torch.equal(packed, pack(codes[first:last, left * UNIT : right * UNIT], bits))


@pytest.mark.parametrize(("codes", "bits", "why"), [
    (torch.zeros(2, 33, dtype=torch.uint8), 4, "multiple of 32, got torch.uint8 [2, 33]"),
    (torch.zeros(32, dtype=torch.uint8), 4, "got torch.uint8 [32]"),
    (torch.zeros(2, 32, dtype=torch.int32), 4, "got torch.int32 [2, 32]"),
    (torch.full((1, 32), 8, dtype=torch.uint8), 3, "largest code 8 needs more than 3 bits"),
    (torch.zeros(1, 32, dtype=torch.uint8), 5, "bits must be one of 2, 3, 4"),
])  # fmt: skip
def test_pack_refuses(codes, bits, why):
    with pytest.raises(FluteError) as caught:
        pack(codes, bits)
    assert why in caught.value.why


# ----------------------------------------------------------------------------- values of weights


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [*GROUP_SIZES, PER_ROW])
@pytest.mark.parametrize("bits", BITS)
def test_dequantize_is_the_exact_product_rounded_once(bits, group_size, dtype):
    rows, columns = 3, 512
    codes = random_codes(bits, rows, columns)
    spec = LayerSpec(bits, group_size)
    scales = random_values((rows, spec.num_groups(columns)), dtype, 1)
    table = random_values(spec.table_shape, dtype, 2)
    weight = dequantize(pack(codes, bits), scales, table, bits)
    assert weight.dtype == dtype
    span = columns // scales.shape[1]
    for n in range(rows):
        for k in range(0, columns, 7):
            value = Fraction(float(table[int(codes[n, k])])) * Fraction(float(scales[n, k // span]))
            # At most 22 significant bits: the float64 is exact, and torch rounds it to even once.
            assert Fraction(float(value)) == value
            assert weight[n, k] == torch.tensor(float(value), dtype=torch.float64).to(dtype)


def test_rounding_is_to_nearest_even():
    # bf16 has 8 significant bits, steps of 128 here: 129 * 129 = 16641 -> 16640,
    table = torch.tensor([129.0, 131.0, 1.0, -0.0], dtype=torch.bfloat16)
    scales = torch.tensor([[129.0], [1.5]], dtype=torch.bfloat16)
    codes = torch.tensor([[0, 1, 2, 3] * 8] * 2, dtype=torch.uint8)
    weight = dequantize_codes(codes, scales, table)
    # 129 * 131 = 16899 -> 16896. 129 * 1.5 = 193.5 is a tie of 193 and 194 -> 194 (even);
    # 131 * 1.5 = 196.5 is a tie of 196 and 197 -> 196 (even).
    assert weight[:, :3].tolist() == [[16640.0, 16896.0, 129.0], [194.0, 196.0, 1.5]]
    assert torch.signbit(weight[:, 3]).all()
    exact = dequantize_codes(codes, scales, table, torch.float32)
    assert exact[:, :2].tolist() == [[16641.0, 16899.0], [193.5, 196.5]]


@pytest.mark.parametrize("bits", BITS)
def test_pair_table(bits):
    spec = LayerSpec(bits, 32, "float16", "pair")
    codes = random_codes(bits, 5, 64)
    scales = random_values((5, 2), torch.float16, 1)
    table = random_values(spec.table_shape, torch.float16, 2)
    weight = dequantize(pack(codes, bits), scales, table, bits)
    for n in range(5):
        for k in range(0, 64, 2):
            pair = table[int(codes[n, k]) * 2**bits + int(codes[n, k + 1])]
            expected = (pair.float() * scales[n, k // 32].float()).half()
            assert torch.equal(weight[n, k : k + 2], expected)


@pytest.mark.parametrize("bits", BITS)
def test_pair_table_of_scalar_pairs_is_the_scalar_table(bits):
    codes = random_codes(bits, 3, 64)
    scales = random_values((3, 1), torch.bfloat16, 1)
    table = random_values((2**bits,), torch.bfloat16, 2)
    pairs = torch.cartesian_prod(table, table)
    scalar, paired = (dequantize_codes(codes, scales, t) for t in (table, pairs))
    assert torch.equal(scalar, paired)


@settings(max_examples=30, deadline=None)
@given(bits=st.sampled_from(BITS), ranks=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99))
def test_shards_dequantize_to_shards_of_the_weight(bits, ranks, seed):
    rows, columns, group = 12, 256, 32
    qweight = pack(random_codes(bits, rows, columns, seed), bits)
    scales = random_values((rows, columns // group), torch.float16, seed)
    table = random_values((2**bits,), torch.float16, seed + 1)
    weight = dequantize(qweight, scales, table, bits)
    by_row = [
        dequantize(q, s, table, bits)
        for q, s in zip(qweight.chunk(ranks, 0), scales.chunk(ranks, 0), strict=True)
    ]
    by_column = [
        dequantize(q, s, table, bits)
        for q, s in zip(qweight.chunk(ranks, 1), scales.chunk(ranks, 1), strict=True)
    ]
    assert torch.equal(torch.cat(by_row, 0), weight)
    assert torch.equal(torch.cat(by_column, 1), weight)


class LargestResult(TorchDispatchMode):
    """Bytes of the largest tensor that an operation inside makes; views have none of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for made in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in known:
                self.nbytes = max(self.nbytes, made.nbytes)
        return result


@pytest.mark.parametrize("kind", ["scalar", "pair"])
@pytest.mark.parametrize("bits", BITS)
def test_large_matrices_are_worked_on_in_blocks_of_rows(bits, kind, monkeypatch):
    """The same bits as at once, and nothing but codes and weights is as large as the matrix."""
    rows, columns, block = 203, 256, 8  # the last block has 3 rows
    codes = random_codes(bits, rows, columns)
    spec = LayerSpec(bits, 64, table_kind=kind)
    scales = random_values((rows, spec.num_groups(columns)), torch.bfloat16, 1)
    table = random_values(spec.table_shape, torch.bfloat16, 2)
    monkeypatch.setattr(native, "BLOCK_WEIGHTS", rows * columns)
    packed, weight = pack(codes, bits), dequantize_codes(codes, scales, table)
    exact = dequantize_codes(codes, scales, table, torch.float32)
    monkeypatch.setattr(native, "BLOCK_WEIGHTS", block * columns + 7)
    of_block = block * columns * 8  # 64-bit indices
    for make, expected in (
        (lambda: pack(codes, bits), packed),
        (lambda: unpack(packed, bits), codes),
        (lambda: dequantize_codes(codes, scales, table), weight),
        (lambda: dequantize_codes(codes, scales, table, torch.float32), exact),
        (lambda: dequantize(packed, scales, table, bits), weight),
    ):
        with LargestResult() as largest:
            found = make()
        assert torch.equal(found, expected)
        assert largest.nbytes <= max(found.nbytes, codes.nbytes, of_block)
    monkeypatch.setattr(native, "BLOCK_WEIGHTS", 1)  # less than a row: one at a time
    assert torch.equal(pack(codes, bits), packed)
    assert torch.equal(dequantize(packed, scales, table, bits), weight)


@pytest.mark.parametrize("bits", BITS)
def test_a_matrix_without_rows(bits):
    packed = pack(torch.zeros(0, 64, dtype=torch.uint8), bits)
    assert packed.shape == (0, 2 * bits)
    assert unpack(packed, bits).shape == (0, 64)


# ------------------------------------------------------------------------------------- layer specs


@pytest.mark.parametrize(("spec", "rows", "columns", "expected"), [
    (LayerSpec(4, 128), 4096, 4096, 4 + 16 / 128 + 16 * 16 / 4096**2),
    (LayerSpec(3, 64), 4096, 4096, 3 + 16 / 64 + 8 * 16 / 4096**2),
    (LayerSpec(2, 32), 4096, 14336, 2 + 16 / 32 + 4 * 16 / (4096 * 14336)),
    (LayerSpec(4, PER_ROW), 1024, 4096, 4 + 16 / 4096 + 16 * 16 / (1024 * 4096)),
    (LayerSpec(2, 256, "float16", "pair"), 512, 512, 2 + 16 / 256 + 32 * 16 / 512**2),
])  # fmt: skip
def test_bits_per_weight(spec, rows, columns, expected):
    assert spec.bits_per_weight(rows, columns) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["scalar", "pair"])
@pytest.mark.parametrize("group_size", [*GROUP_SIZES, PER_ROW])
@pytest.mark.parametrize("bits", BITS)
def test_tensor_layout(bits, group_size, kind):
    spec = LayerSpec(bits, group_size, "float16", kind)
    layout = spec.tensor_layout(7, 512)
    assert layout["qweight"] == ((7, 16 * bits), torch.int32)
    groups = 1 if group_size == PER_ROW else 512 // group_size
    assert layout["scales"] == ((7, groups), torch.float16)
    table = (2**bits,) if kind == "scalar" else (4**bits, 2)
    assert layout["table"] == (table, torch.float16)
    assert pack(random_codes(bits, 7, 512), bits).shape == layout["qweight"][0]


@pytest.mark.parametrize(("changes", "field"), [
    ({"bits": 5}, "bits"), ({"bits": True}, "bits"), ({"bits": "4"}, "bits"),
    ({"group_size": 48}, "group_size"), ({"group_size": 0}, "group_size"),
    ({"scale_dtype": "float32"}, "scale_dtype"), ({"table_kind": "triple"}, "table_kind"),
])  # fmt: skip
def test_spec_outside_the_format(changes, field):
    with pytest.raises(FluteError) as caught:
        LayerSpec(4, 128).with_changes(**changes)
    assert caught.value.where == f"quantization_config.{field}"
    assert repr(changes[field]) in caught.value.what


@pytest.mark.parametrize(("group_size", "in_features", "step"), [
    (128, 4160, 128), (128, 0, 128), (PER_ROW, 100, 32), (256, 128, 256),
])  # fmt: skip
def test_in_features_outside_the_format(group_size, in_features, step):
    with pytest.raises(FluteError, match=f"in_features {in_features}") as caught:
        LayerSpec(4, group_size).check_in_features(in_features, "a.b")
    assert caught.value.where == "a.b"
    assert f"not a positive multiple of {step}" in caught.value.why
    LayerSpec(4, group_size).check_in_features(512, "a.b")


# ------------------------------------------------------------------------------------------ schema

CONFIG = {
    "quant_method": "flute", "format_version": 1, "bits": 4, "group_size": 128,
    "scale_dtype": "bfloat16", "modules_to_not_convert": ["lm_head", "re:.*vision.*"],
    "overrides": {
        "mlp.down_proj": {"bits": 3},
        "re:model\\.layers\\.[01]\\..*": {"bits": 2, "group_size": 32},
        "v_proj": {"group_size": -1, "table_kind": "pair"},
    },
}  # fmt: skip


@pytest.mark.parametrize(("module", "spec"), [
    ("model.layers.5.self_attn.q_proj", LayerSpec(4, 128)),
    ("model.layers.5.mlp.down_proj", LayerSpec(3, 128)),
    ("model.layers.1.mlp.down_proj", LayerSpec(3, 128)),  # the first matching pattern wins
    ("model.layers.1.mlp.up_proj", LayerSpec(2, 32)),
    ("model.layers.10.mlp.up_proj", LayerSpec(4, 128)),
    ("model.layers.5.self_attn.v_proj", LayerSpec(4, -1, table_kind="pair")),
    ("model.layers.5.mlp.down_proj2", LayerSpec(4, 128)),
    ("lm_head", None),
    ("language_model.lm_head", None),
    ("model.vision_tower.fc1", None),
])  # fmt: skip
def test_spec_of_each_module(module, spec):
    assert FluteQuantizationConfig.parse(CONFIG).spec_for(module) == spec


def test_schema_round_trip():
    parsed = FluteQuantizationConfig.parse(CONFIG)
    assert FluteQuantizationConfig.parse(parsed.to_json()) == parsed
    assert parsed.table_kind == "scalar"
    assert parsed.to_json()["overrides"]["mlp.down_proj"] == {"bits": 3}


@pytest.mark.parametrize(("changes", "where"), [
    ({"format_version": 2}, "format_version"), ({"format_version": True}, "format_version"),
    ({"bits": "4"}, "bits"), ({"bits": 5}, "bits"), ({"group_size": 48}, "group_size"),
    ({"grup_size": 64}, "grup_size"), ({"quant_method": "gptq"}, "quant_method"),
    ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
    ({"overrides": {"a": {"bits": 7}}}, "bits"), ({"overrides": {"a": {"bit": 3}}}, "overrides.a"),
    ({"overrides": {"re:(": {"bits": 3}}}, "quantization_config"),
])  # fmt: skip
def test_bad_schema(changes, where):
    with pytest.raises(FluteError) as caught:
        FluteQuantizationConfig.parse({**CONFIG, **changes})
    assert where in caught.value.where
    assert caught.value.fix


names = st.lists(st.from_regex(r"[a-z_]{1,6}|[0-9]{1,2}", fullmatch=True), min_size=1, max_size=5)


@settings(max_examples=100, deadline=None)
@given(parts=names, data=st.data())
def test_plain_patterns_match_whole_components(parts, data):
    module = ".".join(parts)
    first = data.draw(st.integers(0, len(parts) - 1))
    last = data.draw(st.integers(first + 1, len(parts)))
    pattern = ".".join(parts[first:last])
    assert module_matches(pattern, module)
    assert not module_matches(pattern + "Z", module)
    assert not module_matches("Z" + pattern, module)


def test_errors_survive_pickling():
    import pickle

    error = pickle.loads(pickle.dumps(FluteError("a", where="b", why="c", fix="d")))
    assert (error.what, error.where, error.why, error.fix) == ("a", "b", "c", "d")
    assert str(error) == "flute: a\n  where: b\n  why: c\n  fix: d"
