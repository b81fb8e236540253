"""Runs a model block by block with only one block in memory, to see what its layers read.

The model is built without weights. Everything before the first block (embeddings, positions) is
loaded once, run on all windows, and freed; the arguments that each block then gets are noted.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from flute_vllm.checkpoint import Checkpoint
from flute_vllm.errors import FluteError
from flute_vllm.quantize.names import StoredNames, model_class
from flute_vllm.quantize.room import is_out_of_memory
from flute_vllm.quantize.standins import Catcher, Source, Tail
from flute_vllm.quantize.tensor import check_finite

_TOKENS_AT_ONCE = 4096  # of one forward pass; bounds the memory of attention and MLP
WITHOUT_ACTIVATIONS = "use steps that need no activations: --recipe fast --calib none"


class NotRunnable(FluteError):
    """An architecture that cannot be run block by block; not what is wrong with its weights."""


class BlockRunner:
    """The decoder blocks of a checkpoint, loaded one at a time.

    Args:
        checkpoint: dense.
        device: where blocks run; in float32 on a CPU, else in the dtype of the weights.

    Raises:
        FluteError: transformers cannot build the model, or stores it under other names.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self.checkpoint, self.device = checkpoint, device
        self.model = _model_without_weights(checkpoint)
        self.model.eval()
        self.names = StoredNames(self.model, checkpoint)
        stacks = self.names.stacks
        if len(stacks) != 1:
            raise self._unsupported(f"it has {len(stacks)} stacks of blocks: {', '.join(stacks)}")
        self.stack = stacks[0]
        self.blocks: nn.ModuleList = self.model.get_submodule(self.stack)
        stored = {i.dtype for i in checkpoint.tensors.values() if i.dtype.is_floating_point}
        narrow = torch.bfloat16 if torch.bfloat16 in stored else torch.float16
        wide = device.type == "cpu" or stored == {torch.float32}
        self.dtype = torch.float32 if wide else narrow
        self._in_tuple = False  # whether the decoder takes a block's output out of a tuple
        self._arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def probe(self, ids: torch.Tensor) -> None:
        """Raises FluteError unless the embeddings and the first block run, before any work.

        Args:
            ids: int64 [2, length], two windows, which are run one after the other.
        """
        shared = getattr(self.model.config.get_text_config(), "num_kv_shared_layers", 0)
        if shared:
            raise self._unsupported(f"its last {shared} blocks read keys and values of others")
        hidden = self.embed(ids, at_once=ids.shape[1])
        with self._told(), self.block(0) as block:
            for _ in self.run(block, 0, hidden):
                pass

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Whatever a model raises is told as what it is: an architecture that cannot be run."""
        try:
            yield
        except FluteError:
            raise
        except Exception as error:  # the code of some hundred architectures
            if is_out_of_memory(error):
                raise
            raise self._unsupported(f"{type(error).__name__}: {error}") from error

    @torch.no_grad()
    def embed(self, ids: torch.Tensor, at_once: int = _TOKENS_AT_ONCE) -> torch.Tensor:
        """What the first block reads, and, noted for later, the other arguments of every block.

        Args:
            ids: int64 [windows, length].
            at_once: tokens of one forward pass.

        Returns:
            [windows, length, hidden] on the CPU, in the dtype of the run.
        """
        self.batch = max(1, at_once // ids.shape[1])
        while len(ids) % self.batch:  # masks are noted for one size of batch
            self.batch -= 1
        embedding = self.model.get_input_embeddings()
        names = self._outside(self._of_head() - {id(p) for p in embedding.parameters()})
        self._fill(self.model, {name: self._load(name) for name in names})
        for name, buffer in self.model.named_buffers():
            if not self._is_inside(name):
                _assign(self.model, name, buffer.to(self.device))
        self._in_tuple = self._returns_tuples(ids[:1].repeat(2, 1))
        catchers = [Catcher(block, self._in_tuple) for block in self.blocks]
        hidden = self._pass_through(ids, catchers)
        self._arguments = [catcher.arguments for catcher in catchers]
        self._free(names)
        return hidden

    def _returns_tuples(self, ids: torch.Tensor) -> bool:
        """Whether the decoder takes what a block returns for a tuple; ids: two windows, as some
        take one window for many. Raises FluteError where it runs with neither."""
        failed = ""
        for in_tuple in (False, True):
            catchers = [Catcher(block, in_tuple) for block in self.blocks]
            try:
                with self._told(), self._stack_of(catchers):
                    output = self._decoder(input_ids=ids.to(self.device), use_cache=False)[0]
            except FluteError as error:
                failed = failed or error.why
                continue
            shapes = {None if c.hidden is None else c.hidden.shape for c in catchers}
            if len(shapes) == 1 and output.shape[:2] == ids.shape:
                return in_tuple
            failed = failed or f"its blocks read different shapes: {shapes}"
        raise self._unsupported(failed)

    def _pass_through(self, ids: torch.Tensor, catchers: list[Catcher]) -> torch.Tensor:
        parts = []
        with self._stack_of(catchers):
            for batch in ids.split(self.batch):
                self._decoder(input_ids=batch.to(self.device), use_cache=False)
                parts.append(catchers[0].hidden.cpu())
        for index, catcher in enumerate(catchers):
            if catcher.differing is not None:
                raise self._unsupported(
                    f"block {index} is given an argument that differs from text to text: "
                    f"{catcher.differing}"
                )
        return torch.cat(parts)

    @contextmanager
    def tails(self, count: int) -> Iterator[list[Tail]]:
        """What lies between the last block and the head, ``count`` times, as blocks to ``run``."""
        embedding = self.model.get_input_embeddings()
        names = self._outside(self._of_head() | {id(p) for p in embedding.parameters()})
        self._fill(self.model, {name: self._load(name) for name in names})
        self._arguments.append(((), {}))

        def decode(hidden: torch.Tensor) -> torch.Tensor:
            with self._stack_of([Source(self.blocks[0], hidden, self._in_tuple)]):
                # Its own first step is on these instead of embeddings; the block drops the result.
                return self._decoder(inputs_embeds=hidden, use_cache=False)[0]

        try:
            yield [Tail(decode) for _ in range(count)]
        finally:
            self._arguments.pop()
            self._free(names)

    @contextmanager
    def _stack_of(self, modules: list[nn.Module]) -> Iterator[None]:
        """The decoder runs these instead of its blocks."""
        parent, _, leaf = self.stack.rpartition(".")
        owner = self.model.get_submodule(parent)
        setattr(owner, leaf, nn.ModuleList(modules))
        try:
            yield
        finally:
            setattr(owner, leaf, self.blocks)

    @property
    def _decoder(self) -> nn.Module:
        return getattr(self.model, "get_decoder", lambda: None)() or self.model

    def _of_head(self) -> set[int]:
        head = self.model.get_output_embeddings()
        return set() if head is None else {id(p) for p in head.parameters()}

    def _outside(self, left_out: set[int]) -> list[str]:
        """Names of the decoder's parameters that belong to no block, without those in ``left_out``
        by id."""
        wanted = {id(p) for p in self._decoder.parameters()} - left_out
        return [
            name for name, parameter in self.model.named_parameters()
            if not self._is_inside(name) and id(parameter) in wanted
        ]  # fmt: skip

    def _free(self, names: list[str]) -> None:
        for name in names:
            parameter = self.model.get_parameter(name)
            _assign(self.model, name, nn.Parameter(parameter.to("meta"), requires_grad=False))

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """A block with its weights on the device, as a copy that may be changed; freed after."""
        block = self.blocks[index]
        names = [f"{self.stack}.{index}.{name}" for name, _ in block.named_parameters()]
        loaded = copy.deepcopy(block)  # of names and shapes: its weights are on meta
        start = len(f"{self.stack}.{index}.")
        self._fill(loaded, {name[start:]: self._load(name) for name in names})
        for name, buffer in loaded.named_buffers():
            _assign(loaded, name, buffer.to(self.device))
        try:
            yield loaded
        finally:
            del loaded

    @torch.no_grad()
    def run(self, block: nn.Module, index: int, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
        """Outputs of a block for each batch of its inputs, on the CPU, in order."""
        for batch in hidden.split(self.batch):
            args, kwargs = self._arguments[index]
            output = block(batch.to(self.device), *args, **kwargs)
            yield (output[0] if isinstance(output, tuple) else output).cpu()

    def check_names(self) -> None:
        """Raises FluteError unless the checkpoint has every parameter, so before any work."""
        wanted = {id(p) for p in self._decoder.parameters()} - self._of_head()
        for name, parameter in self.model.named_parameters():
            if id(parameter) in wanted and self.names.parameter(name) is None:
                raise self._unsupported(f"the checkpoint has no tensor {name}")

    def _is_inside(self, name: str) -> bool:
        return name.startswith(f"{self.stack}.")

    def _load(self, parameter: str) -> torch.Tensor:
        name = self.names.parameter(parameter)
        if name is None:
            raise self._unsupported(f"the checkpoint has no tensor {parameter}")
        tensor = self.checkpoint.load(name)
        # Here, because a NaN in one matrix shows as NaN activations of the next.
        if tensor.is_floating_point() and tensor.dim() and tensor.numel():
            check_finite(tensor, name)
        return tensor

    def _fill(self, module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            wanted = module.get_parameter(name).shape
            if tensor.shape != wanted:
                raise self._unsupported(f"{name} is {list(tensor.shape)}, not {list(wanted)}")
            placed = nn.Parameter(tensor.to(self.device, self.dtype), requires_grad=False)
            _assign(module, name, placed)

    def _unsupported(self, why: str) -> NotRunnable:
        return NotRunnable(
            "cannot run this architecture block by block",
            where=f"{self.checkpoint.folder}: {type(self.model).__name__}",
            why=why,
            fix=WITHOUT_ACTIVATIONS,
        )


def _assign(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Sets a parameter or buffer by its dotted name, and every name that it is tied to."""
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, value)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside hold parameters without memory, but real buffers.

    A plain meta device would lose the buffers that are computed, such as rotary frequencies.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _model_without_weights(checkpoint: Checkpoint) -> nn.Module:
    from transformers import AutoConfig

    try:
        with _parameters_on_meta():
            config = AutoConfig.from_pretrained(checkpoint.folder)
            return model_class(config).from_config(config)
    except Exception as error:  # transformers raises many kinds for a config it cannot use
        raise NotRunnable(
            "cannot build the model that config.json describes",
            where=str(checkpoint.folder / "config.json"),
            why=f"{type(error).__name__}: {error}",
            fix=f"correct config.json, or {WITHOUT_ACTIVATIONS}",
        ) from error
