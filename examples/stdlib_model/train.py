"""Trains the bundled model on the source text of Python's standard library, from nothing.

    python examples/stdlib_model/train.py                      # this Python's library, GPU if any
    python examples/stdlib_model/train.py --stdlib DIR --stdlib-version 3.11.7

Writes model/ (weights, tokenizer, card) and metrics.json beside this file. About two minutes on a
data-center GPU, hours on a CPU. Same seed and machine give the same data order; GPU kernels may
still differ in the last bits from run to run.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import sys
import sysconfig
import time
from itertools import chain
from pathlib import Path

import torch
from torch.nn import functional

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from corpus import is_test, split  # noqa: E402
from report import write_report  # noqa: E402
from tokenizer import train_tokenizer  # noqa: E402

CONTEXT = 1024
GEOMETRY = {
    # Every in_features (256, 768) is a multiple of 64 also after a cut into 4 shards.
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_paths()["stdlib"]))
    parser.add_argument("--stdlib-version", default=platform.python_version())
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--steps", type=int, help="instead of --epochs, for a trial run")
    parser.add_argument("--seconds", type=float, help="end after this time at the latest")
    parser.add_argument("--batch-size", type=int, default=64, help="windows of 1024 tokens a step")
    parser.add_argument("--learning-rate", type=float, default=0.02, help="of the matrices (Muon)")
    parser.add_argument("--adam-rate", type=float, default=3e-3, help="of embeddings and norms")
    parser.add_argument("--weight-decay", type=float, default=0.3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--test-share", type=float, default=0.5, help="of Lib/test in an epoch")
    parser.add_argument("--validate-every", type=int, default=200, help="steps")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--layers", type=int, default=GEOMETRY["num_hidden_layers"])
    parser.add_argument("--no-report", dest="report", action="store_false")
    return parser.parse_args()


def build_model(vocabulary: int, tokenizer, layers: int):
    """A LLaMA model with float32 weights and small, depth-scaled initial outputs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{**GEOMETRY, "num_hidden_layers": layers},
    )
    model = LlamaForCausalLM(config).train()
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data.mul_(1 / math.sqrt(2 * layers))
    return model


def add_dropout(model, share: float) -> None:
    """Drops ``share`` of the embeddings and of what each block adds; only while training.

    The corpus is small enough to be learnt by heart; LLaMA's own code has no such dropout.
    """

    def drop(module, inputs, output):
        return functional.dropout(output, share, module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)


class Windows:
    """Training windows: the begin token, then 1023 tokens of the shuffled files.

    Every epoch takes all library files and a share of the tests in a new order, at another
    offset, so no window comes back. The begin token in front of any place in a file is the
    protocol of the evaluation. Windows start at the start of a line: a ``def`` after the begin
    token then stands in column 0, as it does in a prompt.
    """

    def __init__(
        self,
        documents: dict[str, list[int]],
        tokenizer,
        seed: int,
        test_share: float = 1.0,
    ) -> None:
        self.bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        complete = {path: [self.bos, *ids, eos] for path, ids in documents.items()}
        self.library = [ids for path, ids in complete.items() if not is_test(path)]
        self.tests = [ids for path, ids in complete.items() if is_test(path)]
        self.corpus_tokens = sum(map(len, complete.values()))
        self.tests_taken = round(test_share * len(self.tests))
        self.epoch_tokens = sum(map(len, self.library)) + round(
            test_share * sum(map(len, self.tests))
        )
        newlines = [i for i in range(len(tokenizer)) if set(tokenizer.decode([i])) == {"\n"}]
        self.before_line = torch.tensor([self.bos, *newlines])
        self.random = random.Random(seed)

    def epoch(self) -> torch.Tensor:
        """int64 [windows, CONTEXT], in random order."""
        documents = self.library + self.random.sample(self.tests, self.tests_taken)
        self.random.shuffle(documents)
        stream = torch.tensor(list(chain.from_iterable(documents)))
        stream = stream.roll(self.random.randrange(CONTEXT - 1))
        line_starts = torch.isin(stream, self.before_line).nonzero()[:, 0] + 1
        starts = torch.arange(0, stream.numel() - 2 * CONTEXT, CONTEXT - 1)
        starts = line_starts[torch.searchsorted(line_starts, starts)]
        starts = starts[starts <= stream.numel() - CONTEXT]
        starts = starts[torch.tensor(self.random.sample(range(len(starts)), len(starts)))]
        windows = stream[starts[:, None] + torch.arange(CONTEXT - 1)]
        return torch.cat([torch.full((len(windows), 1), self.bos), windows], 1)

    def batches(self, size: int, device: str):
        while True:
            windows = self.epoch().to(device)
            for start in range(0, len(windows) - size + 1, size):
                yield windows[start : start + size]


def make_optimizers(model, arguments) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, which learns faster from few tokens; AdamW for everything else."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    embeddings = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" in n]
    norms = [p for p in model.parameters() if p.dim() < 2]
    muon = torch.optim.Muon(
        matrices, lr=arguments.learning_rate, weight_decay=arguments.weight_decay, momentum=0.95
    )
    groups = [
        {"params": embeddings, "weight_decay": arguments.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    fused = arguments.device.startswith("cuda")
    adam = torch.optim.AdamW(groups, lr=arguments.adam_rate, betas=(0.9, 0.95), fused=fused)
    return [muon, adam]


def schedule(step: int, steps: int, time_share: float = 0.0) -> float:
    """Factor of the learning rates: 2 % linear warm-up, then a cosine down to zero.

    ``time_share`` of the allowed time is gone: where that is more than the share of the steps,
    the cosine follows the clock, so that training ends at a rate of zero in either case.
    """
    warmup = max(1, steps // 50)
    if step < warmup:
        return (step + 1) / warmup
    share = max((step - warmup) / max(1, steps - warmup), min(1.0, time_share))
    return 0.5 * (1 + math.cos(math.pi * share))


def loss_of(model, windows: torch.Tensor) -> torch.Tensor:
    with torch.autocast(windows.device.type, dtype=torch.bfloat16):
        logits = model(input_ids=windows, use_cache=False).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.no_grad()
def validate(model, windows: torch.Tensor, size: int) -> float:
    model.eval()
    parts = [loss_of(model, windows[i : i + size]) for i in range(0, len(windows), size)]
    weights = [min(size, len(windows) - i) for i in range(0, len(windows), size)]
    model.train()
    return sum(p.item() * w for p, w in zip(parts, weights, strict=True)) / len(windows)


def train(model, data: Windows, validation: torch.Tensor, arguments) -> dict:
    """Trains in place, ends with the weights of the best validation; returns what was counted."""
    size = arguments.batch_size
    steps = arguments.steps or int(arguments.epochs * data.epoch_tokens / (size * (CONTEXT - 1)))
    optimizers = make_optimizers(model, arguments)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    forward = torch.compile(model, dynamic=False) if arguments.compile else model
    best, best_state = math.inf, None
    batches = data.batches(size, arguments.device)
    start = time.perf_counter()
    for step in range(steps):
        elapsed = time.perf_counter() - start
        time_share = elapsed / arguments.seconds if arguments.seconds else 0.0
        factor = schedule(step, steps, time_share)
        for optimizer, initial in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, initial, strict=True):
                group["lr"] = rate * factor
        loss = loss_of(forward, next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        is_last = step + 1 == steps or time_share >= 1
        if (step + 1) % arguments.validate_every == 0 or is_last:
            found = validate(model, validation, 16)
            seconds = time.perf_counter() - start
            speed = (step + 1) * size * CONTEXT / seconds
            print(
                f"step {step + 1}/{steps} train {loss.item():.3f} validation {found:.4f} "
                f"{seconds:.0f} s {speed / 1e6:.2f} M tokens/s", flush=True,
            )  # fmt: skip
            if found < best:
                best = found
                best_state = {k: v.detach().clone() for k, v in model.state_dict().items()}
        if is_last:
            break
    model.load_state_dict(best_state)
    return {
        "tokens_trained": (step + 1) * size * CONTEXT,
        "corpus_tokens": data.corpus_tokens,
        "steps": step + 1,
        "seconds": round(time.perf_counter() - start, 1),
        "validation_nll": round(best, 4),
    }


def save(model, tokenizer, folder: Path) -> None:
    """Writes model and tokenizer in bfloat16, readable by transformers 4.56 and later."""
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # transformers 5 writes a class name that version 4 does not know; both know this one.
    config = {**config, "tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    training, validation, _ = split(arguments.stdlib)
    tokenizer = train_tokenizer(training.values(), CONTEXT)

    def encode(texts: dict[str, str]) -> dict[str, list[int]]:
        ids = tokenizer(list(texts.values()), add_special_tokens=False, verbose=False)["input_ids"]
        return dict(zip(texts, ids, strict=True))

    data = Windows(encode(training), tokenizer, arguments.seed, arguments.test_share)
    model = build_model(len(tokenizer), tokenizer, arguments.layers).to(arguments.device)
    add_dropout(model, arguments.dropout)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{parameters} parameters, {len(training)} files, {data.corpus_tokens} tokens", flush=True
    )
    unseen = Windows(encode(validation), tokenizer, 0).epoch().to(arguments.device)
    counted = train(model, data, unseen, arguments)
    if arguments.report:
        folder = arguments.out / "model"
        save(model, tokenizer, folder)
        write_report(arguments, folder, {"parameters": parameters, **counted})


if __name__ == "__main__":
    main()
