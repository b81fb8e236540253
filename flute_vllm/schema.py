"""``quantization_config`` of a checkpoint's config.json: fields, rules, the spec of each module."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flute_vllm.errors import FluteError
from flute_vllm.format import FORMAT_VERSION, LayerSpec

QUANT_METHOD = "flute"
HEAD = "lm_head"  # transformers' and vLLM's name of the output head


class Override(BaseModel):
    """Changes for the modules that one pattern of ``overrides`` selects."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: int | None = None
    group_size: int | None = None
    table_kind: str | None = None


class FluteQuantizationConfig(BaseModel):
    """The JSON object under ``quantization_config``; README, "Checkpoint format"."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    quant_method: Literal["flute"] = QUANT_METHOD
    format_version: int
    bits: int
    group_size: int
    scale_dtype: str
    table_kind: str = "scalar"
    modules_to_not_convert: list[str] = Field(default_factory=lambda: [HEAD])
    overrides: dict[str, Override] = Field(default_factory=dict)

    @classmethod
    def parse(cls, config: dict[str, Any], where: str = "config.json") -> FluteQuantizationConfig:
        """Reads and checks the object. Raises FluteError that names the field at fault."""
        version = config.get("format_version")
        if version != FORMAT_VERSION or isinstance(version, bool):
            raise FluteError(
                f"unknown format_version {version!r}",
                where=f"{where}: quantization_config.format_version",
                why=f"this release reads format_version {FORMAT_VERSION}",
                fix="install the flute-vllm release that wrote the checkpoint, or convert it again",
            )
        try:
            parsed = cls.model_validate(config, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise FluteError(
                "cannot read quantization_config",
                where=f"{where}: quantization_config.{field}",
                why=f"{first['msg']} (got {first['input']!r})",
                fix="correct the field; README, 'Checkpoint format', lists all of them",
            ) from error
        parsed.default_spec()
        for pattern in (*parsed.overrides, *parsed.modules_to_not_convert):
            _compile(pattern, where)
        for pattern in parsed.overrides:
            parsed._overridden(pattern)
        return parsed

    def default_spec(self) -> LayerSpec:
        return LayerSpec(self.bits, self.group_size, self.scale_dtype, self.table_kind)

    def is_skipped(self, module: str) -> bool:
        return any(module_matches(pattern, module) for pattern in self.modules_to_not_convert)

    def spec_for(self, module: str) -> LayerSpec | None:
        """Spec of a linear module by its checkpoint name, or None where it is stored dense."""
        if self.is_skipped(module):
            return None
        for pattern in self.overrides:
            if module_matches(pattern, module):
                return self._overridden(pattern)
        return self.default_spec()

    def _overridden(self, pattern: str) -> LayerSpec:
        changes = self.overrides[pattern].model_dump(exclude_none=True)
        return self.default_spec().with_changes(**changes)

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


def module_matches(pattern: str, module: str) -> bool:
    """``re:`` patterns match the whole name; others match whole dotted components anywhere.

    ``lm_head`` matches ``lm_head`` and ``model.lm_head``; ``mlp.down_proj`` matches
    ``model.layers.3.mlp.down_proj`` but not ``model.layers.3.mlp.down_proj2``.
    """
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], module) is not None
    return f".{pattern}." in f".{module}."


def _compile(pattern: str, where: str) -> None:
    try:
        re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise FluteError(
            f"invalid pattern {pattern!r}",
            where=f"{where}: quantization_config",
            why=f"not a regular expression: {error}",
            fix="correct the pattern; names without 're:' match whole dotted components",
        ) from error
