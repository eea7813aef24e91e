"""Likelihoods of choices against one forward pass per choice, and lines that are wrong."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evaluators.base import ITEM_POOLS, Context, EvaluatorSpec, Scores
from evaluators.errors import UserError
from evaluators.language.multiple_choice import MultipleChoice
from evaluators.registry import make_evaluator
from evaluators.testing import TINY_POSITIONS, by_item, load_language_model, write_tiny_language_model

torch.set_num_threads(1)

WORDS = ["fox", "dog", "merge", "λόγος ἀρχή", "sum(values)", "a point between them", "lazy", "0.5"]


def questions(count: int) -> list[dict[str, Any]]:
    """Two to five choices of one or more tokens, contexts with and without a space at the end."""
    rng = np.random.default_rng(5)
    found = []
    for n in range(count):
        choices = [str(c) for c in rng.choice(WORDS, size=int(rng.integers(2, 6)), replace=False)]
        answer = int(rng.integers(len(choices)))
        context = f"Question {n}: " + " ".join(rng.choice(WORDS, size=3)) + ("  " if n % 3 == 0 else "")
        found.append({"id": n, "context": context, "choices": choices, "answer": choices[answer] if n % 2 else answer})
    return found


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


def make(tmp_path: Path, folder: Path, records: list[dict[str, Any]], **options: Any) -> MultipleChoice:
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    evaluator = make_evaluator(EvaluatorSpec("q", "multiple_choice", {"data": "q.jsonl", **options}), tmp_path)
    assert isinstance(evaluator, MultipleChoice)
    evaluator.check()
    evaluator.prepare(Context(folder))
    return evaluator


def everything(evaluator: MultipleChoice, model: torch.nn.Module) -> dict[str, tuple[float, ...]]:
    """Item -> (acc, acc_norm, nll, weight)."""
    items = [item for pool in ITEM_POOLS for item in evaluator.items(pool)]
    return by_item(Scores.join(list(evaluator.evaluate(model, items))))


def expected_of(model: Any, tokenizer: Any, record: dict[str, Any], bos: bool = False) -> tuple[float, ...]:
    """The same by hand: one forward pass per choice, softmax in float64, tokens past the stripped context."""
    context, stripped = record["context"], record["context"].rstrip()
    start = [tokenizer.bos_token_id] if bos or not stripped else []
    logs = []
    for choice in record["choices"]:
        before = tokenizer(stripped, add_special_tokens=False)["input_ids"]
        whole = tokenizer(context + " " + choice, add_special_tokens=False)["input_ids"]
        tokens = start + before + whole[len(before) :]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens])).logits[0].double()
        p = torch.softmax(logits, -1)
        positions = range(len(start) + len(before), len(tokens))
        logs.append(sum(math.log(p[t - 1, tokens[t]].item()) for t in positions))
    right = record["choices"].index(record["answer"]) if isinstance(record["answer"], str) else record["answer"]
    lengths = [len(choice.encode()) for choice in record["choices"]]
    return (
        float(max(range(len(logs)), key=lambda c: logs[c]) == right),
        float(max(range(len(logs)), key=lambda c: logs[c] / lengths[c]) == right),
        -math.log(math.exp(logs[right]) / sum(math.exp(x) for x in logs)),
        1.0,
    )


@pytest.mark.parametrize("options", [{}, {"batch_tokens": 1}, {"batch_tokens": 100_000}, {"add_bos": True}])
def test_scores_are_those_of_one_forward_pass_per_choice(
    tmp_path: Path, folder: Path, model: Any, tokenizer: Any, options: dict[str, Any]
) -> None:
    records = questions(50)
    found = everything(make(tmp_path, folder, records, **options), model)
    assert len(found) == 50
    for record in records:
        expected = expected_of(model, tokenizer, record, bos=bool(options.get("add_bos")))
        assert found[str(record["id"])] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    accuracies = np.array(list(found.values()))[:, :2].mean(0)
    assert ((accuracies > 0.1) & (accuracies < 0.9)).all(), "the cases should tell right from wrong"


def test_in_float64_padding_and_batches_change_nothing_visible(tmp_path: Path, folder: Path, model: Any) -> None:
    exact = copy.deepcopy(model).double()
    one, many = (everything(make(tmp_path, folder, questions(40), batch_tokens=n), exact) for n in (1, 512))
    for item, values in one.items():
        assert many[item] == pytest.approx(values, rel=1e-12)


def test_the_order_of_the_choices_does_not_matter(tmp_path: Path, folder: Path, model: Any) -> None:
    records = questions(40)
    turned = [
        {
            **record,
            "choices": record["choices"][::-1],
            "answer": record["answer"]
            if isinstance(record["answer"], str)
            else len(record["choices"]) - 1 - record["answer"],
        }
        for record in records
    ]
    first, second = (everything(make(tmp_path, folder, r), model) for r in (records, turned))
    for item, values in first.items():
        assert second[item] == pytest.approx(values, rel=1e-4)


def test_choices_of_one_token_share_one_forward_pass(tmp_path: Path, folder: Path, model: Any) -> None:
    records = [
        {"id": n, "context": f"Which {n}? ", "choices": ["A", "B", "C", "D"], "answer": n % 4} for n in range(30)
    ]
    evaluator = make(tmp_path, folder, records, delimiter="", batch_tokens=1)
    rows: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, a, k: rows.append(len(k["input_ids"])), with_kwargs=True)
    try:
        found = everything(evaluator, model)
    finally:
        hook.remove()
    assert sum(rows) == 30
    assert len(found) == 30


def test_an_empty_context_stands_for_the_beginning_of_a_text(
    tmp_path: Path, folder: Path, model: Any, tokenizer: Any
) -> None:
    records = [*questions(20), {"id": 99, "context": "", "choices": ["fox", "lazy dog"], "answer": 1}]
    found = everything(make(tmp_path, folder, records), model)
    assert found["99"] == pytest.approx(expected_of(model, tokenizer, records[-1]), rel=1e-4)


def test_a_context_that_is_too_long_loses_its_beginning(
    tmp_path: Path, folder: Path, model: Any, tokenizer: Any
) -> None:
    """What is further back than the model's positions changes nothing; what is nearer does."""
    tail = " " + "sum of values " * TINY_POSITIONS
    records = [{**record, "context": record["context"].strip() + tail} for record in questions(20)]
    found = everything(make(tmp_path, folder, records), model)
    other = [{**record, "context": "Something else entirely" + record["context"][10:]} for record in records]
    assert everything(make(tmp_path, folder, other), model) == found
    near = [{**record, "context": record["context"] + "not"} for record in records]
    assert everything(make(tmp_path, folder, near), model) != found


def test_weights_that_are_not_numbers_give_no_accuracy(tmp_path: Path, folder: Path, model: Any) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = float("nan")
    evaluator = make(tmp_path, folder, questions(20))
    scores = Scores.join(list(evaluator.evaluate(broken, evaluator.items("search"))))
    assert all(math.isnan(value) for value in evaluator.aggregate(scores).values())


GOOD = {"context": "Is it?", "choices": ["yes", "no"], "answer": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": None}, "'context' is null, expected text"),
        ({"choices": "yes"}, "'choices' must be a list of at least 2 texts"),
        ({"choices": ["yes"]}, "'choices' must be a list of at least 2 texts"),
        ({"choices": ["yes", 3]}, "choices[1] is a number, expected text"),
        ({"choices": ["yes", " "]}, "choices[1] is empty"),
        ({"choices": ["yes", "no", "yes"]}, "choices[0] and choices[2] are the same: 'yes'"),
        ({"answer": 2}, "'answer' is 2, expected 0 to 1: there are 2 choices"),
        ({"answer": -1}, "'answer' is -1, expected 0 to 1"),
        ({"answer": "maybe"}, "'answer' is 'maybe', which is none of the choices"),
        ({"answer": 1.0}, "'answer' is 1.0, expected the index of a choice"),
        ({"answer": True}, "'answer' is True, expected the index of a choice"),
        ({"answer": None}, "'answer' is None, expected the index of a choice"),
    ],
)
def test_a_wrong_line_is_reported_with_its_number(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make(tmp_path, tmp_path, [*questions(3), {**GOOD, **change}])
    assert f"q.jsonl:4: {message}" in str(caught.value)


@pytest.mark.parametrize("key", ["context", "choices", "answer"])
def test_a_missing_key_is_reported_with_those_that_are_there(tmp_path: Path, key: str) -> None:
    line = {k: v for k, v in GOOD.items() if k != key} | {"other": 1}
    with pytest.raises(UserError, match=rf"q.jsonl:4: no key '{key}'; the line has .*'other'"):
        make(tmp_path, tmp_path, [*questions(3), line])


def test_a_choice_longer_than_the_model_reads_is_refused_by_name(tmp_path: Path, folder: Path) -> None:
    records = [*questions(20), {"id": "long", "context": "x", "choices": ["y", "zqxj " * 80], "answer": 0}]
    with pytest.raises(UserError, match=r"q.jsonl:21: choices\[1\] of item 'long' has \d+ tokens, but .* 64 at once"):
        make(tmp_path, folder, records)


def test_a_choice_that_melts_into_its_context_is_refused_by_name(tmp_path: Path, folder: Path) -> None:
    """'t' + 'he' may be the one token 'the', and then nothing is left to score."""
    records = [*questions(20), {"id": "melt", "context": "t", "choices": ["he", "x"], "answer": 0}]
    with pytest.raises(UserError, match=r"q.jsonl:21: choices\[0\] of item 'melt' adds no token"):
        make(tmp_path, folder, records, delimiter="")
