"""Which modules of a checkpoint to quantize, decided by the structure of the model.

The model is built on the meta device (no memory, no weights) and its module tree is walked, so
no list of architectures is needed: the linear layers inside the decoder blocks are quantized, the
head if that is asked for; embeddings, and the routers and experts of mixture-of-experts layers stay
dense.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from flute_vllm.checkpoint import Checkpoint
from flute_vllm.errors import FluteError
from flute_vllm.quantize.names import (
    StoredNames,
    dense_by_architecture,
    model_class,
    why_head_stays_dense,
)
from flute_vllm.schema import HEAD, module_matches
from flute_vllm.validate import fused_siblings

EXPERTS = "experts"


@dataclass
class Selection:
    """What the walk found, by checkpoint name (``<name>.weight`` is in the checkpoint).

    ``dense`` holds every linear module that stays dense, under the name that vLLM knows;
    ``notes`` has one message for each kind of module that was skipped and why. ``blocks`` names
    the decoder blocks in order, as tensor names begin with them. ``aliases`` has transformers'
    names of those ``linears`` for which it has quite another one.
    """

    linears: dict[str, tuple[int, int]] = field(default_factory=dict)
    dense: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)

    def keep(self, stored: str | None, name: str) -> None:
        """Notes a dense module under its stored name, and that of transformers where it is another
        (language_model.lm_head, lm_head)."""
        self.dense.append(stored or name)
        if not module_matches(self.dense[-1], name):
            self.dense.append(name)

    def block_of(self, tensor: str) -> str | None:
        """The decoder block that a tensor of the checkpoint belongs to."""
        parts = tensor.split(".")
        heads = (".".join(parts[:end]) for end in range(1, len(parts)))
        return next((head for head in heads if head in self._block_set), None)

    @cached_property
    def _block_set(self) -> frozenset[str]:
        return frozenset(self.blocks)


def select_modules(checkpoint: Checkpoint, with_head: bool = False) -> Selection:
    """Finds the linear modules to quantize. Raises FluteError where there are none.

    Args:
        checkpoint: dense.
        with_head: the output head counts as one of them.
    """
    model = meta_model(checkpoint)
    names = StoredNames(model, checkpoint)
    head = _stored_head(model, names) if with_head else None
    selection = Selection(blocks=names.blocks(model))
    kept, reason = dense_by_architecture(model)
    routers: list[str] = []
    experts = 0
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        if EXPERTS in name.split("."):
            experts += 1
            continue
        stored = names.matrix(name)
        inside = any(name.startswith(f"{stack}.") for stack in names.stacks)
        if inside and any(module_matches(pattern, name) for pattern in kept):
            selection.keep(stored, name)
        elif inside and _is_router(model, name, module):
            routers.append(stored or name)
            selection.keep(stored, name)
        elif (inside or module is head) and stored is not None:
            _check_shape(checkpoint, stored, module)
            selection.linears[stored] = (module.out_features, module.in_features)
            if not module_matches(stored, name):
                selection.aliases[stored] = name
        else:
            selection.keep(stored, name)
            if inside:
                selection.notes.append(
                    f"{name} stays dense: the checkpoint has no floating {name}.weight [N, K]"
                )
    stored_routers, has_experts = _stored_routers(model, checkpoint)
    routers = list(dict.fromkeys([*routers, *stored_routers]))
    selection.dense += stored_routers
    if experts or has_experts:
        selection.dense.append(EXPERTS)
        selection.notes.append("experts of mixture-of-experts layers stay dense")
    if routers:
        selection.notes.append(f"{len(routers)} mixture-of-experts routers stay dense")
    if kept:
        selection.notes.append(f"{', '.join(kept)} stay dense: {reason}")
    if not selection.linears:
        raise FluteError(
            "nothing to quantize",
            where=str(checkpoint.folder),
            why=f"{type(model).__name__} has no torch.nn.Linear in its decoder blocks "
            f"({', '.join(names.stacks) or 'none found'}) whose weight is in the checkpoint"
            + "".join(f"; {note}" for note in selection.notes),
            fix="check that config.json belongs to these weights",
        )
    _keep_unknown(selection, model, names)
    return selection


def _keep_unknown(selection: Selection, model: torch.nn.Module, names: StoredNames) -> None:
    """Stored matrices that transformers' model lacks stay dense, under their own names: blocks that
    predict further tokens, more blocks than config.json says, parts that other classes build."""
    parameters = model.named_parameters(remove_duplicate=False)  # tied ones, too
    known = {names.parameter(name) for name, _ in parameters}
    unknown = [
        name.removesuffix(".weight") for name, info in names.checkpoint.tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2 and name not in known
    ]  # fmt: skip
    unknown = [
        module for module in unknown
        if not any(module_matches(pattern, module) for pattern in selection.dense)
    ]  # fmt: skip
    selection.dense += unknown
    if unknown:
        selection.notes.append(
            f"{len(unknown)} matrices stay dense, as transformers' model of config.json does not "
            f"have them; the first is {unknown[0]}"
        )


def meta_model(checkpoint: Checkpoint) -> torch.nn.Module:
    """The model of config.json without weights. Raises FluteError."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(checkpoint.folder)
        with torch.device("meta"):
            return model_class(config).from_config(config)
    except Exception as error:  # transformers raises many kinds for a config it cannot use
        message = str(error).strip().splitlines() or [""]
        raise FluteError(
            "cannot build the model that config.json describes",
            where=str(checkpoint.folder / "config.json"),
            why=f"{type(error).__name__}: {message[0]}",
            fix="install a transformers release that knows model_type "
            f"{checkpoint.config.get('model_type')!r}, or correct config.json",
        ) from error


def _stored_head(model: torch.nn.Module, names: StoredNames) -> torch.nn.Module:
    """The head to quantize; one that is tied to the embeddings is given a weight of its own.

    Raises FluteError where the model has no head, or vLLM would not read it.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    own_names = {module: name for name, module in model.named_modules()}
    model.tie_weights()
    why = why_head_stays_dense(model)
    if not isinstance(head, torch.nn.Linear):
        why = f"{type(model).__name__} has no torch.nn.Linear as its head"
    elif not why:
        is_tied = head.weight is embeddings.weight and not names.checkpoint.has_own_head
        source = own_names[embeddings if is_tied else head]
        stored = names.matrix(source)
        if stored is None:
            why = f"the checkpoint has no {source}.weight [N, K]"
        elif is_tied:
            names.checkpoint.untie_head(own_names[head], stored)
    if why:
        raise FluteError(
            "the head cannot be quantized",
            where=f"{names.checkpoint.folder}: {own_names.get(head) or HEAD}", why=why,
            fix="leave out --lm-head",
        )  # fmt: skip
    return head


def _check_shape(checkpoint: Checkpoint, name: str, module: torch.nn.Linear) -> None:
    expected = (module.out_features, module.in_features)
    info = checkpoint.tensors[f"{name}.weight"]
    if info.shape != expected:
        raise FluteError(
            "weight does not fit config.json",
            where=f"{info.file}: {info.name}",
            why=f"its shape is {list(info.shape)}, the model needs {list(expected)}",
            fix="check that config.json belongs to these weights",
        )


def _expert_counts(model: torch.nn.Module) -> set[int]:
    config = model.config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return {count for name in names if isinstance(count := getattr(config, name, None), int)}


def _is_router(model: torch.nn.Module, name: str, module: torch.nn.Linear) -> bool:
    """A linear beside experts with one output for each expert, or one for a shared expert."""
    parent = model.get_submodule(name.rpartition(".")[0])
    if not hasattr(parent, EXPERTS) and "router" not in type(parent).__name__.lower():
        return False
    return module.out_features in {1, *_expert_counts(model)}


def _stored_routers(model: torch.nn.Module, checkpoint: Checkpoint) -> tuple[list[str], bool]:
    """Routers by checkpoint name, and whether there are experts.

    transformers may hold a router as a plain parameter and under another name than the files do,
    so these are found as small matrices beside tensors named ``<parent>.experts.*``.
    """
    marker = f".{EXPERTS}."
    parents = {name.partition(marker)[0] for name in checkpoint.tensors if marker in name}
    sizes = {1, *_expert_counts(model)}
    routers = []
    for name, info in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        is_matrix = module != name and len(info.shape) == 2
        if is_matrix and module.rpartition(".")[0] in parents and info.shape[0] in sizes:
            routers.append(module)
    return routers, bool(parents)


def fused_groups(modules: Mapping[str, object]) -> Iterator[list[str]]:
    """Groups of at least two modules that vLLM keeps as one matrix (q, k, v; gate and up)."""
    seen: set[str] = set()
    for name in modules:
        group = [other for other in fused_siblings(name) if other in modules]
        if len(group) > 1 and name not in seen:
            seen.update(group)
            yield group
