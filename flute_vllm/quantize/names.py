"""transformers' model of a config, and how the checkpoint calls its modules."""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import cache
from typing import Any

import torch

from flute_vllm.checkpoint import Checkpoint
from flute_vllm.errors import FluteError
from flute_vllm.resources import data_path


def model_class(config: Any) -> type:
    """The auto class of a config: of text models, or of those that read images, too."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    has_text_class = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    is_multimodal = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForCausalLM if has_text_class or not is_multimodal else (
        AutoModelForImageTextToText
    )  # fmt: skip


def decoder_stacks(model: torch.nn.Module) -> list[str]:
    """Names of the outermost ModuleLists as long as the decoder is deep.

    Other lists (vision towers, per-expert lists) differ in length or lie inside a block.
    """
    text_config = model.config.get_text_config()
    depth = getattr(text_config, "num_hidden_layers", None)
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module)
    }
    outermost = [n for n in lists if not any(n.startswith(f"{other}.") for other in lists)]
    decoder = getattr(model, "get_decoder", lambda: None)()
    own = {id(module) for module in decoder.modules()} if decoder is not None else set()
    fitting = [n for n in outermost if len(lists[n]) == depth and (not own or id(lists[n]) in own)]
    return fitting or outermost


class StoredNames:
    """Names of modules and parameters in a checkpoint, by those in transformers' model.

    Files may have the prefix of the base model where the model has none, or the other way round.
    Those of models that read images often have the decoder elsewhere
    (``language_model.model.layers``, transformers: ``model.language_model.layers``): it is found
    by the names and shapes of its blocks.
    """

    def __init__(self, model: torch.nn.Module, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.stacks = decoder_stacks(model)
        self._prefix = f"{getattr(model, 'base_model_prefix', '')}."
        self._moved: tuple[str, str] | None = None
        if len(self.stacks) == 1 and not self._has_blocks(self.stacks[0]):
            self._moved = self._find_stack(model)

    def candidates(self, name: str) -> list[str]:
        """How the checkpoint may call it, the likeliest first."""
        found = [name, f"{self._prefix}{name}"]
        if name.startswith(self._prefix):
            found.append(name.removeprefix(self._prefix))
        if self._moved is not None:
            ours, theirs = self._moved
            if name.startswith(ours):
                return [theirs + name.removeprefix(ours)]
            # The head lies beside the decoder: language_model.lm_head.
            found.append(".".join([*theirs.rstrip(".").split(".")[:-1], name]))
        return found

    def parameter(self, name: str) -> str | None:
        """The stored tensor of a parameter, None where there is none."""
        return next((n for n in self.candidates(name) if n in self.checkpoint.tensors), None)

    def matrix(self, module: str) -> str | None:
        """The stored name of a module that has a floating weight [N, K]."""
        for candidate in self.candidates(module):
            info = self.checkpoint.tensors.get(f"{candidate}.weight")
            if info is not None and len(info.shape) == 2 and info.dtype.is_floating_point:
                return candidate
        return None

    def blocks(self, model: torch.nn.Module) -> list[str]:
        """The decoder blocks in order, as names of their tensors begin."""
        found = []
        for stack in self.stacks:
            stored = next((c for c in self.candidates(stack) if self._holds(f"{c}.0.")), None)
            if stored is not None:
                found += [f"{stored}.{i}" for i in range(len(model.get_submodule(stack)))]
        return found

    def _has_blocks(self, stack: str) -> bool:
        return any(self._holds(f"{candidate}.0.") for candidate in self.candidates(stack))

    def _holds(self, start: str) -> bool:
        return any(name.startswith(start) for name in self.checkpoint.tensors)

    def _find_stack(self, model: torch.nn.Module) -> tuple[str, str] | None:
        """What the decoder's names begin with in the model and in the files."""
        stack = self.stacks[0]
        blocks = model.get_submodule(stack)
        shapes = {f".{len(blocks) - 1}.{name}": tuple(parameter.shape)
                  for name, parameter in blocks[-1].named_parameters()}  # fmt: skip
        if not shapes:
            return None
        first = next(iter(shapes))
        places = [n.removesuffix(first) for n in self.checkpoint.tensors if n.endswith(first)]
        fitting = [
            place for place in places
            if all(
                (info := self.checkpoint.tensors.get(place + name)) is not None
                and tuple(info.shape) == shape
                for name, shape in shapes.items()
            )
        ]  # fmt: skip
        parent, leaf = stack.rpartition(".")[0], stack.rpartition(".")[2]
        if len(fitting) != 1 or fitting[0].rpartition(".")[2] != leaf:
            return None
        return f"{parent}." if parent else "", fitting[0].removesuffix(leaf)


def find_linears(
    model: torch.nn.Module, checkpoint: Checkpoint, modules: Collection[str]
) -> dict[str, str]:
    """Names in the model of linear modules, by stored name: of all in ``modules``.

    Raises FluteError for one that is not found.
    """
    names = StoredNames(model, checkpoint)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            # Not by what is in the files: a head that was tied may be there since.
            stored = next((c for c in names.candidates(name) if c in modules), None)
            if stored is not None:
                found[stored] = name
    lost = [module for module in modules if module not in found]
    if lost:
        raise FluteError(
            "a module is not found", where=f"{type(model).__name__}: {lost[0]}",
            why=f"{len(lost)} of {len(modules)} modules to quantize have another name in the "
            f"model of transformers, the first is {lost[0]}",
            fix="use what needs one block at a time: --recipe balanced without --bpw",
        )  # fmt: skip
    return found


def dense_by_architecture(model: torch.nn.Module) -> tuple[list[str], str]:
    """Patterns of modules that vLLM cannot load quantized in this architecture, and why."""
    entry = _rules()["dense"].get(_model_type(model), {})
    return list(entry.get("modules", ())), entry.get("why", "")


def why_head_stays_dense(model: torch.nn.Module) -> str:
    """Why vLLM cannot use a quantized head of this architecture; empty where it can."""
    kind = _model_type(model)
    why = _rules()["head"].get(kind, "")
    return f"{why} ({kind} models)" if why else ""


def _model_type(model: torch.nn.Module) -> str:
    return model.config.get_text_config().model_type


@cache
def _rules() -> dict[str, Any]:
    return json.loads(data_path("configs", "architectures.json").read_text())
