"""Likelihoods of texts against Hugging Face's own loss, one text at a time, and against plain softmax."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from evaluators.base import ITEM_POOLS, Context, EvaluatorSpec, Metric, Scores
from evaluators.errors import UserError
from evaluators.language.perplexity import Perplexity, windows_of
from evaluators.registry import make_evaluator
from evaluators.testing import TINY_POSITIONS, by_item, load_language_model, write_tiny_language_model

torch.set_num_threads(1)

WORDS = ["merge", "of", "the", "models", "def", "return", "values", "fox", "λ", "naïve", "0.5", "{}\n"]


def texts(count: int, words: int = 12) -> list[str]:
    rng = np.random.default_rng(3)
    return [" ".join(rng.choice(WORDS, size=int(n))) + f" {k}" for k, n in enumerate(rng.integers(1, words, count))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_language_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> torch.nn.Module:
    return load_language_model(folder)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def make(tmp_path: Path, folder: Path, items: list[str], **options: Any) -> Perplexity:
    lines = [json.dumps({"text": text, "id": n}) for n, text in enumerate(items)]
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    evaluator = make_evaluator(EvaluatorSpec("ppl", "perplexity", {"data": "items.jsonl", **options}), tmp_path)
    assert isinstance(evaluator, Perplexity)
    evaluator.check()
    evaluator.prepare(Context(folder))
    return evaluator


def everything(evaluator: Perplexity, model: torch.nn.Module) -> Scores:
    items = [item for pool in ITEM_POOLS for item in evaluator.items(pool)]
    return Scores.join(list(evaluator.evaluate(model, items)))


def softmax_nll(model: torch.nn.Module, tokens: list[int], first: int) -> list[float]:
    """-log p of tokens[first:] given all tokens before them, by softmax in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens[:-1]])).logits[0].double().numpy()
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    return [-math.log(probabilities[t - 1, tokens[t]]) for t in range(first, len(tokens))]


@pytest.mark.parametrize("batch_tokens", [1, 40, 100_000])
def test_every_item_has_the_loss_that_hugging_face_gives_it_alone(
    tmp_path: Path, folder: Path, model: Any, tokenizer: Any, batch_tokens: int
) -> None:
    items = texts(40)
    scores = everything(make(tmp_path, folder, items, batch_tokens=batch_tokens), model)
    assert len(scores.items) == 40
    for id_, nll, weight in zip(scores.items, scores.values["nll"], scores.weights, strict=True):
        tokens = tokenizer(items[int(id_)], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = model(input_ids=tokens, labels=tokens).loss.item()
        assert weight == tokens.shape[1] - 1
        assert nll == pytest.approx(expected, rel=2e-6)


def test_perplexity_is_that_of_all_tokens_together(tmp_path: Path, folder: Path, model: Any, tokenizer: Any) -> None:
    items = texts(30)
    evaluator = make(tmp_path, folder, items)
    metrics = evaluator.aggregate(everything(evaluator, model))
    losses = [loss for text in items for loss in softmax_nll(model, tokenizer(text)["input_ids"], 1)]
    assert metrics["nll"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert metrics["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def test_in_float64_padding_and_batches_change_nothing_visible(tmp_path: Path, folder: Path, model: Any) -> None:
    exact = copy.deepcopy(model).double()
    items = texts(40)
    one, many = (everything(make(tmp_path, folder, items, batch_tokens=n), exact) for n in (1, 512))
    for item, values in by_item(one).items():
        assert by_item(many)[item] == pytest.approx(values, rel=1e-12)


def test_a_bfloat16_model_is_normalised_in_float32(tmp_path: Path, folder: Path, model: Any, tokenizer: Any) -> None:
    half = copy.deepcopy(model).bfloat16()
    items = texts(20)
    scores = everything(make(tmp_path, folder, items, batch_tokens=1), half)
    for id_, nll in zip(scores.items, scores.values["nll"], strict=True):
        expected = np.mean(softmax_nll(half, tokenizer(items[int(id_)])["input_ids"], 1))
        assert nll == pytest.approx(expected, rel=1e-6)  # a softmax in bfloat16 is off by 1e-2


def test_the_softmax_in_pieces_equals_the_softmax_at_once(
    tmp_path: Path, folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = make(tmp_path, folder, texts(20))
    whole = everything(evaluator, model)
    monkeypatch.setattr("evaluators.likelihood.SOFTMAX_ELEMENTS", 1000)  # three rows of 320 at a time
    assert by_item(everything(evaluator, model)) == by_item(whole)


LONG = " ".join(texts(12, words=20))


@pytest.mark.parametrize(("max_tokens", "stride"), [(16, 16), (16, 5), (16, 1), (33, 32), (TINY_POSITIONS, 20)])
def test_long_texts_are_scored_as_a_loop_over_windows_says(
    tmp_path: Path, folder: Path, model: Any, tokenizer: Any, max_tokens: int, stride: int
) -> None:
    """Every token on its own: its window is the first that reaches it, and is read up to there."""
    items = [LONG, *texts(20)]
    evaluator = make(tmp_path, folder, items, max_tokens=max_tokens, stride=stride)
    found = by_item(everything(evaluator, model))["0"]
    tokens = tokenizer(LONG)["input_ids"]
    assert len(tokens) > 3 * TINY_POSITIONS
    losses = []
    for target in range(1, len(tokens)):
        start = 0
        while target > start + max_tokens:
            start += stride
        losses += softmax_nll(model, tokens[start : target + 1], target - start)
    assert found == pytest.approx((np.mean(losses), len(losses)), rel=1e-6)


@pytest.mark.parametrize(("max_length", "stride"), [(17, 16), (33, 7), (40, 1)])
def test_windows_are_those_of_the_perplexity_guide_of_hugging_face(
    tmp_path: Path, folder: Path, model: Any, tokenizer: Any, max_length: int, stride: int
) -> None:
    evaluator = make(tmp_path, folder, [LONG, *texts(20)], max_tokens=max_length - 1, stride=stride)
    tokens = torch.tensor([tokenizer(LONG)["input_ids"]])
    total, count, scored_to = 0.0, 0, 0
    for begin in range(0, tokens.shape[1], stride):
        end = min(begin + max_length, tokens.shape[1])
        window = tokens[:, begin:end]
        labels = window.clone()
        labels[:, : -(end - scored_to)] = -100
        labels[:, 0] = -100  # has nothing before it; the loss shifts it away too
        n = int((labels != -100).sum())
        with torch.no_grad():
            total += model(input_ids=window, labels=labels).loss.item() * n
        count += n
        scored_to = end
        if end == tokens.shape[1]:
            break
    assert by_item(everything(evaluator, model))["0"] == pytest.approx((total / count, count), rel=1e-6)


@given(st.integers(2, 200), st.integers(1, 50), st.data())
def test_windows_score_every_token_but_the_first_once_and_with_enough_context(
    length: int, max_tokens: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, max_tokens))
    tokens = np.arange(length)
    windows = windows_of(tokens, max_tokens, stride)
    assert np.concatenate([w.targets for w in windows]).tolist() == tokens[1:].tolist()
    for w in windows:
        assert 1 <= len(w.targets) <= len(w.tokens) <= max_tokens
        for k, target in enumerate(w.targets):
            context = w.tokens[: len(w.tokens) - len(w.targets) + k + 1]
            assert context[-1] + 1 == target
            assert context[0] == 0 or len(context) >= max_tokens - stride + 1


def test_a_beginning_token_lets_the_first_token_be_scored(
    tmp_path: Path, folder: Path, model: Any, tokenizer: Any
) -> None:
    items = texts(20)
    with_, without = (by_item(everything(make(tmp_path, folder, items, add_bos=b), model)) for b in (True, False))
    assert by_item(everything(make(tmp_path, folder, items), model)) == without  # this tokenizer adds none
    for n, text in enumerate(items):
        tokens = tokenizer(text)["input_ids"]
        expected = softmax_nll(model, [tokenizer.bos_token_id, *tokens], 1)
        assert with_[str(n)] == pytest.approx((np.mean(expected), len(tokens)), rel=1e-6)
        assert without[str(n)][1] == len(tokens) - 1


def test_a_tokenizer_that_starts_texts_with_a_beginning_token_is_followed(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, model: Any
) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    folder = write_tiny_language_model(tmp_path_factory.mktemp("bos"))
    starting = AutoTokenizer.from_pretrained(folder)
    starting.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    starting.save_pretrained(folder)
    items = texts(20)
    default = by_item(everything(make(tmp_path, folder, items), model))
    assert default == by_item(everything(make(tmp_path, folder, items, add_bos=True), model))


def test_padding_stands_on_the_right_and_is_masked(tmp_path: Path, folder: Path, model: Any, tokenizer: Any) -> None:
    items = texts(40)
    evaluator = make(tmp_path, folder, items, batch_tokens=200)
    inputs = {tuple(tokenizer(text)["input_ids"][:-1]) for text in items}
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    hook = model.register_forward_pre_hook(
        lambda _, a, given: seen.append((given["input_ids"], given["attention_mask"])), with_kwargs=True
    )
    try:
        everything(evaluator, model)
    finally:
        hook.remove()
    assert all(tokens.numel() <= 200 and tokens.shape == mask.shape for tokens, mask in seen)
    assert any((mask == 0).any() for _, mask in seen)
    rows = [(row, kept) for tokens, mask in seen for row, kept in zip(tokens, mask, strict=True)]
    assert {tuple(row[: int(kept.sum())].tolist()) for row, kept in rows} == inputs
    assert all(kept.tolist() == sorted(kept.tolist(), reverse=True) for _, kept in rows)


def test_scores_come_in_chunks_as_batches_end(tmp_path: Path, folder: Path, model: Any) -> None:
    evaluator = make(tmp_path, folder, texts(40), batch_tokens=64)
    items = evaluator.items("search")
    chunks = list(evaluator.evaluate(model, items))
    assert len(chunks) > 3
    assert all(chunk.items for chunk in chunks)


def test_a_model_in_training_mode_is_scored_without_dropout_and_put_back(
    tmp_path: Path, folder: Path, model: Any
) -> None:
    evaluator = make(tmp_path, folder, texts(20))
    expected = by_item(everything(evaluator, model))
    dropping = copy.deepcopy(model)
    dropping.config.attention_dropout = 0.9
    for layer in dropping.model.layers:
        layer.self_attn.attention_dropout = 0.9
    dropping.train()
    dropping.model.norm.eval()
    modes = [module.training for module in dropping.modules()]
    assert by_item(everything(evaluator, dropping)) == expected
    assert [module.training for module in dropping.modules()] == modes


def test_weights_that_are_not_numbers_give_a_metric_that_is_none(tmp_path: Path, folder: Path, model: Any) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = float("nan")
    evaluator = make(tmp_path, folder, texts(20))
    metrics = evaluator.aggregate(everything(evaluator, broken))
    assert all(math.isnan(value) for value in metrics.values())


def test_a_hopeless_model_has_infinite_perplexity_instead_of_an_overflow(tmp_path: Path, folder: Path) -> None:
    evaluator = make(tmp_path, folder, texts(20))
    metrics = evaluator.aggregate(Scores(("a",), {"nll": np.array([1e4])}, np.ones(1)))
    assert metrics == {"nll": 1e4, "perplexity": math.inf}


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "opt"])
def test_other_architectures_agree_with_their_own_loss(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, kind: str
) -> None:
    import transformers as tf

    folder = write_tiny_language_model(tmp_path_factory.mktemp(kind))
    config, architecture = {
        "gpt2": (
            tf.GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=48),
            tf.GPT2LMHeadModel,
        ),
        "qwen2": (
            tf.Qwen2Config(
                vocab_size=320,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=48,
            ),
            tf.Qwen2ForCausalLM,
        ),
        "opt": (
            tf.OPTConfig(
                vocab_size=320,
                hidden_size=32,
                word_embed_proj_dim=32,
                ffn_dim=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=48,
            ),
            tf.OPTForCausalLM,
        ),
    }[kind]
    config.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = architecture(config).eval()
    items = texts(25, words=9)
    evaluator = make(tmp_path, folder, items, batch_tokens=120)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    for id_, (nll, weight) in by_item(everything(evaluator, model)).items():
        tokens = tokenizer(items[int(id_)], return_tensors="pt")["input_ids"]
        if tokens.shape[1] <= 48:
            with torch.no_grad():
                assert nll == pytest.approx(model(input_ids=tokens, labels=tokens).loss.item(), rel=5e-6)
            assert weight == tokens.shape[1] - 1


def test_the_context_is_what_the_model_has_positions_for(tmp_path: Path, folder: Path, model: Any) -> None:
    """Longer windows would run past the positions; the default does not."""
    evaluator = make(tmp_path, folder, [LONG, *texts(20)])
    explicit = make(tmp_path, folder, [LONG, *texts(20)], max_tokens=TINY_POSITIONS)
    assert by_item(everything(evaluator, model)) == by_item(everything(explicit, model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": TINY_POSITIONS + 1}, "max_tokens is 65, but the model in .* has 64 positions"),
        ({"stride": 100}, r"stride is 100, more than max_tokens \(64 for this model\)"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused(
    tmp_path: Path, folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make(tmp_path, folder, texts(20), **options)


def test_a_stride_beyond_the_window_is_refused_in_the_config(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"stride is 9, more than max_tokens \(8\)"):
        Perplexity.Options.model_validate({"data": "x", "stride": 9, "max_tokens": 8})


def test_a_text_of_one_token_is_refused_by_name_unless_there_is_a_beginning_token(tmp_path: Path, folder: Path) -> None:
    items = [*texts(20), "z"]
    with pytest.raises(UserError, match=r"items.jsonl:21: item '20' is 1 token"):
        make(tmp_path, folder, items)
    make(tmp_path, folder, items, add_bos=True)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma", "bert"])
def test_a_folder_without_tokenizer_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    """For some kinds transformers makes up an empty tokenizer, under which every text has no tokens."""
    from transformers import AutoConfig

    bare = tmp_path / "bare"
    AutoConfig.for_model(kind).save_pretrained(bare)
    with pytest.raises(UserError, match=r"bare: .*tokenizer"):
        make(tmp_path, bare, texts(20))


def test_a_damaged_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    bad = write_tiny_language_model(tmp_path / "bad")
    (bad / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="bad: its tokenizer cannot be loaded"):
        make(tmp_path, bad, texts(20))


def test_a_tokenizer_of_a_larger_model_is_refused(tmp_path: Path) -> None:
    small = write_tiny_language_model(tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": 40}))
    with pytest.raises(UserError, match="the model knows only 40 tokens"):
        make(tmp_path, small, texts(20))


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    from transformers import T5Config

    folder = write_tiny_language_model(tmp_path / "t5")
    T5Config(vocab_size=320).save_pretrained(folder)
    with pytest.raises(UserError, match="encoder-decoder"):
        make(tmp_path, folder, texts(20))


def test_the_perplexity_metric_is_declared_as_derived() -> None:
    assert Perplexity.metrics["nll"].per_item
    assert Perplexity.metrics["perplexity"] == Metric(
        "minimize", low=1, help="exp(nll) over all tokens of the pool", per_item=False
    )
