"""The perplexity protocol against cases small enough to compute by hand."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from native_writer import write_native
from tiny_models import write_tiny_model

from flute_vllm import evaluate_vllm
from flute_vllm.errors import FluteError
from flute_vllm.evaluate import cut_windows, load_model, perplexity, read_texts
from flute_vllm.evaluate_vllm import Position, divergence, perplexity_vllm
from flute_vllm.format import LayerSpec

VOCABULARY = 8
BUNDLED = Path(__file__).resolve().parents[1] / "examples" / "stdlib_model" / "model"


class Bigram(torch.nn.Module):
    """A model whose next-token logits depend on the present token alone: one row of a table."""

    def __init__(self, table: torch.Tensor, limit: int = 64) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(table)
        self.config = SimpleNamespace(max_position_embeddings=limit)
        self.lengths: list[int] = []

    def forward(self, input_ids: torch.Tensor):
        self.lengths.append(input_ids.shape[1])
        return SimpleNamespace(logits=self.table[input_ids])


class Digits:
    """Each digit of the text is a token."""

    def __init__(self, bos: int | None = 0) -> None:
        self.bos_token_id = bos

    def __call__(self, text: str, **_):
        return {"input_ids": [int(c) for c in text if c.isdigit()]}


@pytest.fixture
def table():
    return torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))


def by_hand(table: torch.Tensor, pairs: list[tuple[int, int]]) -> float:
    log_p = table.double().log_softmax(-1)
    return -sum(log_p[a, b].item() for a, b in pairs) / len(pairs)


def test_uniform_model_has_the_vocabulary_as_perplexity():
    result = perplexity(Bigram(torch.zeros(VOCABULARY, VOCABULARY)), Digits(), ["1234567"])
    assert result.ppl == pytest.approx(VOCABULARY)
    assert result.tokens == 7


def test_bigram_by_hand(table):
    # Windows of 4: bos 1 2 3 | bos 4 5; the begin token replaces the context that is cut off.
    # A bigram shows a shared token only at the seam, so the cuts are checked as well.
    assert [w.tokens for w in cut_windows([1, 2, 3, 4, 5], 4, bos=0)] == [[0, 1, 2, 3], [0, 4, 5]]
    overlapping = [(w.tokens, w.scored) for w in cut_windows([1, 2, 3, 4, 5], 4, stride=2, bos=0)]
    assert overlapping == [([0, 1, 2, 3], 3), ([0, 3, 4, 5], 2)]
    pairs = [(0, 1), (1, 2), (2, 3), (0, 4), (4, 5)]
    result = perplexity(Bigram(table), Digits(), ["12345"], window=4)
    assert result.tokens == 5
    assert result.nll == pytest.approx(by_hand(table, pairs), rel=1e-6)
    assert result.ppl == pytest.approx(math.exp(result.nll))
    assert "window 4" in result.protocol
    assert "stride 3" in result.protocol


def test_without_bos_windows_share_one_token(table):
    pairs = [(1, 2), (2, 3), (3, 4), (4, 5)]
    result = perplexity(Bigram(table), Digits(bos=None), ["12345"], window=3)
    assert result.tokens == 4
    assert result.nll == pytest.approx(by_hand(table, pairs), rel=1e-6)


def test_mean_runs_over_tokens_of_all_texts(table):
    pairs = [(0, 1), (0, 2), (2, 3), (3, 4)]
    result = perplexity(Bigram(table), Digits(), ["1", "234"])
    assert result.nll == pytest.approx(by_hand(table, pairs), rel=1e-6)


@pytest.mark.parametrize("stride", [1, 2, 3, 7, None])
@pytest.mark.parametrize("bos", [0, None])
@pytest.mark.parametrize("length", [2, 7, 8, 9, 30])
def test_each_token_is_scored_once(stride, bos, length):
    ids = list(range(100, 100 + length))
    scored = []
    for piece in cut_windows(ids, window=8, stride=stride, bos=bos):
        assert len(piece.tokens) <= 8
        scored += piece.tokens[-piece.scored :]
    assert scored == (ids if bos is not None else ids[1:])


def test_batches_change_nothing(table):
    texts = ["1234567", "7654321", "11", "123"]
    one = perplexity(Bigram(table), Digits(), texts, window=4)
    many = perplexity(Bigram(table), Digits(), texts, window=4, batch_size=3)
    assert many.nll == pytest.approx(one.nll, rel=1e-6)


def test_window_is_cut_to_the_length_of_the_model(table):
    model = Bigram(table, limit=4)
    assert "window 4" in perplexity(model, Digits(), ["1234567"]).protocol
    assert max(model.lengths) == 4


def test_reference(table):
    same = perplexity(Bigram(table), Digits(), ["1234567"], reference=Bigram(table))
    assert same.kl == pytest.approx(0, abs=1e-7)
    assert same.top1_agreement == 1
    flat = Bigram(torch.zeros(VOCABULARY, VOCABULARY))
    other = perplexity(flat, Digits(), ["12"], reference=Bigram(table))
    q = table[[0, 1]].double().softmax(-1)
    assert other.kl == pytest.approx((q * (q * VOCABULARY).log()).sum(-1).mean().item(), rel=1e-5)
    assert "kl" not in perplexity(flat, Digits(), ["12"]).to_json()


def test_reference_of_another_vocabulary(table):
    with pytest.raises(FluteError, match="vocabularies of 8 and 9"):
        perplexity(Bigram(table), Digits(), ["12"], reference=Bigram(torch.zeros(9, 9)))


@pytest.mark.parametrize("texts", [[], [""], ["12", "no digit"]])
def test_nothing_to_score(texts, table):
    with pytest.raises(FluteError, match="text"):
        perplexity(Bigram(table), Digits(), texts)


@pytest.mark.parametrize(("window", "stride"), [(1, None), (8, 0), (8, 8)])
def test_bad_window(window, stride, table):
    with pytest.raises(FluteError, match="invalid evaluation window"):
        perplexity(Bigram(table), Digits(), ["123"], window=window, stride=stride)


def test_nan_is_an_error(table):
    with pytest.raises(FluteError, match="not a number"):
        perplexity(Bigram(table * math.nan), Digits(), ["123"])


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe\x00", None])
def test_unreadable_text(content, tmp_path):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FluteError, match=r"text\.txt"):
        read_texts([path])


def test_no_files():
    with pytest.raises(FluteError, match="no text to evaluate"):
        read_texts([])


@pytest.fixture
def quantized(request, tmp_path) -> tuple[Path, Path]:
    """A tiny quantized folder and its dense twin, both with the bundled tokenizer."""
    architecture = getattr(request, "param", "llama")
    source = write_tiny_model(tmp_path / "source", architecture, vocab_size=4096)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, source)
    out, twin = tmp_path / "quantized", tmp_path / "twin"
    write_native(source, out, LayerSpec(3, 64), twin)
    for path in source.glob("tokenizer*"):
        shutil.copy(path, twin)
    return out, twin


@pytest.mark.parametrize("quantized", ["llama", "llama_bias", "phi3"], indirect=True)
def test_quantized_folder_is_its_dense_twin(quantized):
    text = ["def twin(self):\n    return self.dense\n"]
    found = perplexity(*load_model(quantized[0]), text)
    expected = perplexity(*load_model(quantized[1]), text)
    assert found == expected


def test_tensors_of_another_architecture(quantized):
    path = quantized[0] / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(FluteError, match=r"missing keys.*LlamaForCausalLM"):
        load_model(quantized[0])


def test_missing_tokenizer(quantized):
    for path in quantized[0].glob("tokenizer*"):
        path.unlink()
    with pytest.raises(FluteError, match="cannot load the tokenizer"):
        load_model(quantized[0])


def test_divergence_of_the_best_tokens_is_exact_or_a_lower_bound():
    """vLLM names the best tokens only; the rest is one token, and lumping can only lower KL."""
    generator = np.random.default_rng(0)
    log_p, log_q = (np.log(generator.dirichlet(np.full(50, 0.3))) for _ in range(2))
    exact = float((np.exp(log_p) * (log_p - log_q)).sum())
    found = []
    for top in (50, 20, 5, 1):
        best = [np.argsort(-log)[:top] for log in (log_p, log_q)]
        positions = [Position(0.0, i, log[i]) for i, log in zip(best, (log_p, log_q), strict=True)]
        found.append(divergence(*positions))
        assert positions[0].first == int(log_p.argmax())
    assert found[0] == pytest.approx(exact, abs=1e-6)
    assert exact + 1e-9 >= found[1]
    assert all(0 <= value <= exact + 1e-9 for value in found)


@pytest.mark.parametrize(
    ("config", "other", "asked", "used"),
    [({"max_position_embeddings": 6}, None, 1024, 5), ({"n_positions": 6}, None, 1024, 5),
     ({"max_position_embeddings": 64}, {"max_position_embeddings": 6}, 1024, 5),
     ({"text_config": {"max_position_embeddings": 6}}, None, 1024, 5),
     ({"max_position_embeddings": 6}, None, 4, 4), ({}, None, 8, 8)],
)  # fmt: skip
def test_vllm_gets_windows_that_the_models_can_read(
    config, other, asked, used, tmp_path, monkeypatch
):
    """vLLM refuses a length beyond that of config.json, and generates a token after the window."""
    folders = [tmp_path / name for name in ("model", "reference")][: 1 if other is None else 2]
    for folder, content in zip(folders, (config, other), strict=False):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(content))
    seen: list = []

    @contextlib.contextmanager
    def engine(folder, window, dtype, top):
        seen.append(window)
        yield SimpleNamespace(get_tokenizer=Digits)

    def positions(llm, windows, top):
        seen.extend(len(piece.tokens) for piece in windows)
        for piece in windows:
            yield from [Position(-1.0, np.array([1]), np.array([-1.0]))] * piece.scored

    monkeypatch.setattr(evaluate_vllm, "_engine", engine)
    monkeypatch.setattr(evaluate_vllm, "_positions", positions)
    reference = None if other is None else folders[1]
    result = perplexity_vllm(folders[0], ["1234567" * 2], asked, reference=reference)
    assert max(seen) == used
    assert result.tokens == 14
    assert f"window {used} tokens" in result.protocol
    assert f"stride {used - 1}" in result.protocol
