"""What a training run leaves behind besides weights: metrics.json, the model card and samples."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from pathlib import Path

import torch
from heldout import evaluate_heldout, load_heldout

from flute_vllm.evaluate import load_model

PROMPTS = (
    "def read_json(path):\n",
    "def read_file(filename):\n",
    "def load(filename):\n    with open(filename) as f:\n",
    "class Stack:\n    def __init__(self, items):\n",
    "import os\n\n",
)

CARD = """---
license: other
license_name: psf-2.0
language: [code]
pipeline_tag: text-generation
---

# A {millions:.1f} M parameter model of Python's standard library

LLaMA architecture: {layers} layers, hidden size 256, MLP 768, 4 query and 2 key-value heads of 64,
tied embeddings, byte-level BPE of 4096 tokens, context 1024, bfloat16. It exists to test
quantization end to end with a model whose perplexity means something. It continues Python source
and knows nothing else; it is not an assistant.

| | |
|---|---|
| data | standard library of Python {python}, source text, tests included, no generated tables |
| licence of the data | PSF License 2.0; the model can repeat parts of it verbatim |
| parameters | {parameters} |
| tokens trained | {tokens_trained}; the corpus has {corpus_tokens} |
| time | {seconds} s on {device}, torch {torch} |
| held-out perplexity, float32 | {heldout_ppl_fp32} |
| held-out perplexity, bfloat16 | {heldout_ppl_bf16} |
| protocol | {protocol} |
| command | `{command}` |

Held-out: {heldout_count} files ({heldout_tokens} tokens) that were never trained on, chosen by a
rule on the hash of their path (`heldout.json`); `python examples/stdlib_model/heldout.py`
measures again. Their tests in `Lib/test` are training data, so some of their names are known.

Greedy continuation of the first line:

```python
{sample}
```

The chat template turns a request into a comment above the code to be written.
"""


@torch.inference_mode()
def generate(model, tokenizer, prompt: str, temperature: float, tokens: int = 80) -> str:
    """Continues ``prompt``; temperature 0 is greedy, others sample with a fixed seed."""
    torch.manual_seed(0)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": 0.95}
    options = sampling if temperature else {"do_sample": False}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **options)
    return tokenizer.decode(out[0], skip_special_tokens=True)


def write_report(arguments, folder: Path, counted: dict) -> None:
    """Evaluates the saved folder as a user would load it, and writes what was measured."""
    heldout = load_heldout(arguments.stdlib)
    results = {}
    for dtype in (torch.bfloat16, torch.float32):
        model, tokenizer = load_model(folder, dtype, arguments.device)
        results[dtype] = evaluate_heldout(model, tokenizer, heldout.texts)
    full = results[torch.float32]
    on_gpu = arguments.device.startswith("cuda")
    metrics = {
        **counted,
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU {platform.machine()}",
        "torch": torch.__version__,
        "python": arguments.stdlib_version,
        "command": shlex.join(["python", "examples/stdlib_model/train.py", *sys.argv[1:]]),
        "heldout_ppl_bf16": results[torch.bfloat16]["ppl"],
        "heldout_ppl_fp32": full["ppl"],
        "heldout_tokens": full["tokens"],
        "evaluated_on": f"{arguments.device}, torch {torch.__version__}",
        "protocol": full["protocol"],
        "heldout_files": full["files"],
    }
    (arguments.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    card = CARD.format(
        millions=counted["parameters"] / 1e6,
        layers=model.config.num_hidden_layers,
        heldout_count=len(full["files"]),
        sample=generate(model, tokenizer, PROMPTS[1], 0.0, 41).rstrip(),
        **metrics,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    print(json.dumps({k: v for k, v in metrics.items() if k != "heldout_files"}, indent=2))
    for temperature in (0.0, 0.7):
        for prompt in PROMPTS:
            print(f"--- temperature {temperature}")
            print(generate(model, tokenizer, prompt, temperature))
