"""Checkpoints that upstream FLUTE wrote: ``flute_config.json`` beside an unmodified config.json.

A quantized module has int16 ``weight`` [N * bits / 16, K], ``scales`` [N, K / group_size],
``tables`` [2**bits] and ``tables2``, a copy of the table as pairs of 16-bit values that older
kernels wanted. All tables of this format are scalar, so ``tables2`` is never used (format notes,
section 6): casting loaders are known to corrupt it. When a caller passes it anyway, a contradiction
with ``tables`` is logged.

The configuration is read leniently (``version`` and ``num_sms`` may be missing, other keys are
ignored), and what it says of the weights must agree with the shapes. Two keys are ours, for
weights that FLUTE 0.4 or later packed: ``tile_p`` (32 or 64) and ``template_id``, either one value
or an object from module patterns (as in ``modules_to_not_convert``) to values.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flute_vllm.checkpoint import Checkpoint, TensorInfo, read_json
from flute_vllm.errors import FluteError
from flute_vllm.format import BITS, GROUP_SIZES, SCALE_DTYPES, LayerSpec
from flute_vllm.importers import base, flute_tile
from flute_vllm.importers.flute_layout import (
    DEFAULT_TILE,
    TILE_SIZES,
    check_packed,
    packed_rows,
    to_qweight,
)
from flute_vllm.schema import module_matches

CONFIG_NAME = "flute_config.json"
KNOWN_KEYS = ("version", "num_sms", "num_bits", "group_size", "tile_p", "template_id")
SCALE_NAMES = {dtype: name for name, dtype in SCALE_DTYPES.items()}
ASK_FOR_TILE = f'add "tile_p": 32 or "tile_p": 64 to {CONFIG_NAME}'

log = logging.getLogger(__name__)


class FluteZoo:
    """Importer of one upstream FLUTE checkpoint; the interface is ``base.Importer``."""

    name = "flute_zoo"
    required_suffixes = ("weight", "scales", "tables")
    ignored_suffixes = ("tables2",)
    tensor_suffixes = required_suffixes + ignored_suffixes
    # Scales and tables are fp16 or bf16; tables2 has the bits of two of them in a float32.
    tensor_dtypes = {
        "weight": torch.int16, "scales": torch.float32, "tables": torch.float32,
        "tables2": torch.float32,
    }  # fmt: skip

    def __init__(self, config: Mapping[str, Any], where: str = CONFIG_NAME) -> None:
        self._where = where
        self.bits: int = self._choice(config, "num_bits", BITS)
        self.group_size: int = self._choice(config, "group_size", GROUP_SIZES)
        self.version = self._typed(config, "version", str)
        self.num_sms = self._typed(config, "num_sms", int)
        self._tiles = self._by_pattern(config, "tile_p", TILE_SIZES)
        self._templates = self._by_pattern(
            config, "template_id", range(flute_tile.NUM_TEMPLATES[self.bits])
        )
        unknown = [str(key) for key in config if key not in KNOWN_KEYS]
        if unknown:
            log.warning("%s: ignoring unknown keys %s", where, ", ".join(unknown))

    @classmethod
    def read_config(cls, folder: Path) -> dict[str, Any] | None:
        path = folder / CONFIG_NAME
        return read_json(path) if path.exists() else None

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        return "num_bits" in config and "quant_method" not in config

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str | None = None) -> FluteZoo:
        return cls(config, where or CONFIG_NAME)

    def modules(self, checkpoint: Checkpoint) -> list[str]:
        """Quantized modules in file order.

        A module counts when it has scales, tables or an int16 weight; the headers must then show
        a complete layer of the configured bits and group size, or FluteError is raised.
        """
        found = []
        for module, infos in base.group_by_module(checkpoint, self.tensor_suffixes).items():
            weight = infos.get("weight")
            if set(infos) == {"weight"} and weight.dtype != torch.int16:
                continue
            self._check_layout(module, infos)
            found.append(module)
        if not found:
            raise FluteError(
                "no quantized module",
                where=str(checkpoint.folder),
                why=f"there is {self._where}, but no module has scales, tables or an int16 weight",
                fix="download the checkpoint again; a dense model needs no import",
            )
        return found

    def to_native(self, module: str, tensors: Mapping[str, torch.Tensor]) -> base.NativeLayer:
        """Native tensors of one full, unsharded matrix.

        Args:
            module: its name, for ``tile_p`` patterns and messages.
            tensors: ``weight`` int16 [P, K], ``scales`` [N, G] and ``tables`` [2**bits], both
                fp16 or bf16, on one device. Shards do not work: a slice of rows is not a packed
                matrix in general.

        Returns:
            qweight, scales (the given one) and table, on that device. Raises FluteError for
            missing tensors, wrong dtypes and shapes, contradictions with the configuration,
            non-finite values, and an undecidable tile size.
        """
        out_features, _ = self._check_layout(module, tensors)
        weight, scales, table = (tensors[suffix] for suffix in self.required_suffixes)
        base.check_finite(f"{module}.scales", scales)
        base.check_finite(f"{module}.tables", table)
        if "tables2" in tensors and not _is_pair_table(tensors["tables2"], table):
            log.warning(
                "%s.tables2 differs from the pairs of %s.tables; tables is used, as upstream's own "
                "loaders regenerate tables2", module, module,
            )  # fmt: skip
        spec = self.layer_spec(SCALE_NAMES[scales.dtype])
        tile_p = self.tile_p(module, out_features)
        if tile_p is None:
            tile_p = self._guess_tile(module, weight, scales, table)
        check_packed(f"{module}.weight", weight.dtype, tuple(weight.shape), self.bits, tile_p)
        qweight = to_qweight(weight, self.bits, tile_p)
        return base.NativeLayer(qweight, scales.contiguous(), table.contiguous(), spec)

    def layer_spec(self, scale_dtype: str = "float16") -> LayerSpec:
        return LayerSpec(self.bits, self.group_size, scale_dtype)

    def native_config(
        self, specs: Mapping[str, LayerSpec], skipped: Sequence[str] = base.DEFAULT_SKIPPED
    ) -> dict[str, Any]:
        return base.build_native_config(self.layer_spec(), specs, skipped)

    def tile_p(self, module: str, out_features: int) -> int | None:
        """T from metadata and shape (format notes, section 4), or None when they leave it open.

        In order: the module's ``tile_p``, its ``template_id``, ``num_sms`` or a version below 0.4
        (T = 32), and values of bits and N that only T = 32 can have.
        """
        given = _lookup(self._tiles, module)
        template = _lookup(self._templates, module)
        derived = None if template is None else flute_tile.tile_of_template(self.bits, template)
        if given is not None and derived is not None and given != derived:
            raise FluteError(
                "contradictory tile size",
                where=f"{self._where}: {module}",
                why=f"tile_p is {given}, but {self.bits}-bit template_id {template} has {derived}",
                fix="remove the wrong one of the two",
            )
        for tile in (given, derived):
            if tile is not None:
                return tile
        if self.num_sms is not None or flute_tile.predates_tuning(self.version):
            return DEFAULT_TILE
        return flute_tile.pinned_tile(self.bits, out_features)

    def _guess_tile(
        self, module: str, weight: torch.Tensor, scales: torch.Tensor, table: torch.Tensor
    ) -> int:
        correlations = flute_tile.tile_correlations(weight, scales, table, self.bits)
        tile = flute_tile.guess_tile(correlations)
        if tile is not None:
            log.info("%s: tile size %d, from correlations %s", module, tile, correlations)
            return tile
        seen = (
            "and one scale a row, or too few, leave nothing to compare"
            if correlations is None
            else "and the weights do not tell: correlation of scales and codes is "
            + ", ".join(f"{value:.2f} for {t}" for t, value in correlations.items())
        )
        raise FluteError(
            "unknown tile size",
            where=f"{module}.weight",
            why=f"FLUTE 0.4 and later pack with tile_p 32 or 64, {self._where} has neither tile_p, "
            f"template_id nor num_sms, {seen}",
            fix=ASK_FOR_TILE,
        )

    def _check_layout(
        self, module: str, tensors: Mapping[str, torch.Tensor | TensorInfo]
    ) -> tuple[int, int]:
        """N and K, from dtypes and shapes alone; tensors and header entries both have them.

        All group sizes are multiples of 32, so K also suits the native format.
        """
        base.require(
            module, tensors, self.required_suffixes,
            fix=f"download the checkpoint again; {self._where} promises a FLUTE checkpoint",
        )  # fmt: skip
        dtypes = {suffix: tensors[suffix].dtype for suffix in self.required_suffixes}
        shapes = {suffix: tuple(tensors[suffix].shape) for suffix in self.required_suffixes}
        scale_dtype = dtypes["scales"]
        for suffix in ("scales", "tables"):
            if dtypes[suffix] not in SCALE_NAMES or dtypes[suffix] != scale_dtype:
                raise FluteError(
                    "unsupported dtype",
                    where=f"{module}.{suffix}",
                    why=f"scales are {_name(scale_dtype)} and tables {_name(dtypes['tables'])}; "
                    f"both must be the same, {' or '.join(SCALE_DTYPES)}",
                    fix="cast both to one of them before importing",
                )
        if len(shapes["scales"]) != 2:
            raise self._contradiction(module, "scales", "they must be [N, K / group_size]", shapes)
        self._check_bits(module, dtypes, shapes)
        out_features = check_packed(
            f"{module}.weight", dtypes["weight"], shapes["weight"], self.bits,
            self.tile_p(module, shapes["scales"][0]) or DEFAULT_TILE,
        )  # fmt: skip
        in_features, groups = shapes["weight"][1], shapes["scales"][1]
        if groups * self.group_size != in_features:
            implied = f"{in_features / groups:g}" if groups else "undefined"
            raise self._contradiction(
                module, "scales",
                f"K = {in_features} over {groups} groups is {implied}, but group_size is "
                f"{self.group_size}", shapes,
            )  # fmt: skip
        return out_features, in_features

    def _check_bits(self, module: str, dtypes: dict, shapes: dict[str, tuple[int, ...]]) -> None:
        """``num_bits`` against both shapes that depend on it: packed rows and table length."""
        rows = shapes["scales"][0]
        weight, table = shapes["weight"], shapes["tables"]
        is_packed = dtypes["weight"] == torch.int16 and len(weight) == 2
        if is_packed and rows and weight[0] * 16 != rows * self.bits:
            raise self._contradiction(
                module, "weight",
                f"{weight[0]} packed rows for N = {rows} are {weight[0] * 16 / rows:g} bits, but "
                f"num_bits is {self.bits} ({packed_rows(rows, self.bits)} packed rows)", shapes,
            )  # fmt: skip
        if table != (2**self.bits,):
            raise self._contradiction(
                module, "tables",
                f"a {self.bits}-bit table has shape [{2**self.bits}]", shapes,
            )  # fmt: skip

    def _contradiction(
        self, module: str, suffix: str, why: str, shapes: dict[str, tuple[int, ...]]
    ) -> FluteError:
        listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        return FluteError(
            "configuration and tensor shapes contradict",
            where=f"{module}.{suffix}",
            why=f"{why} (shapes: {listed})",
            fix=f"correct {self._where}, and pass unsharded tensors of one module",
        )

    def _bad_field(self, key: str, value: object, why: str) -> FluteError:
        return FluteError(
            f"unsupported {key} {value!r}",
            where=f"{self._where}: {key}",
            why=why,
            fix=f"correct {self._where}; FLUTE writes version, num_sms, num_bits and group_size",
        )

    def _choice(self, config: Mapping[str, Any], key: str, allowed: tuple[int, ...]) -> int:
        value = config.get(key, "(missing)")
        if type(value) is not int or value not in allowed:
            listed = ", ".join(map(str, allowed))
            raise self._bad_field(key, value, f"it must be one of {listed}")
        return value

    def _typed(self, config: Mapping[str, Any], key: str, kind: type) -> Any:
        value = config.get(key)
        if value is not None and type(value) is not kind:
            why = f"it must be of type {kind.__name__}, not {type(value).__name__}"
            raise self._bad_field(key, value, why)
        return value

    def _by_pattern(
        self, config: Mapping[str, Any], key: str, allowed: Sequence[int]
    ) -> dict[str | None, int]:
        """Values of our own keys by module pattern; None stands for all modules."""
        value = config.get(key)
        if value is None:
            return {}
        entries = value if isinstance(value, dict) else {None: value}
        for entry in entries.values():
            if type(entry) is not int or entry not in allowed:
                listed = (
                    f"from 0 to {allowed[-1]}" if isinstance(allowed, range)
                    else "one of " + ", ".join(map(str, allowed))
                )  # fmt: skip
                raise self._bad_field(key, entry, f"{self.bits}-bit values are {listed}")
        if key == "tile_p" and self.bits == 3 and set(entries.values()) != {DEFAULT_TILE}:
            raise self._bad_field(key, value, "3-bit weights are always packed with tile_p 32")
        return entries


def _lookup(entries: Mapping[str | None, int], module: str) -> int | None:
    for pattern, value in entries.items():
        if pattern is None or module_matches(pattern, module):
            return value
    return None


def _is_pair_table(pairs: torch.Tensor, table: torch.Tensor) -> bool:
    """Whether ``tables2`` holds the bit patterns of all pairs of ``tables`` (section 6)."""
    side = table.shape[0]
    if pairs.numel() * pairs.element_size() != side * side * 4:
        return False
    # As integers: as floats the pairs are partly NaN.
    bits = pairs.contiguous().view(torch.int16).reshape(side, side, 2)
    entry = table.contiguous().view(torch.int16).to(bits.device)
    expected = torch.stack(torch.meshgrid(entry, entry, indexing="ij"), dim=-1)
    return torch.equal(bits, expected)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
