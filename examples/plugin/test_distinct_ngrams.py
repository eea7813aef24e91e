"""The contract that Meiosis publishes for evaluators, and what this one adds."""

import json
from pathlib import Path

import pytest
from meiosis_example_evaluator import DistinctNgrams, distinct

from evaluators.testing import EvaluatorContract


class TestDistinctNgrams(EvaluatorContract):
    def make_evaluator(self, folder: Path) -> DistinctNgrams:
        lines = [json.dumps({"prompt": f"The {n}. fox"}) for n in range(16)]
        (folder / "prompts.jsonl").write_text("\n".join(lines))
        return DistinctNgrams(DistinctNgrams.Options(data=folder / "prompts.jsonl", new_tokens=6))


@pytest.mark.parametrize(
    ("tokens", "n", "expected"),
    [([1, 1, 1, 1], 2, 1 / 3), ([1, 2, 3], 2, 1), ([1, 2, 1, 2, 1], 2, 0.5), ([1], 2, 1)],
)
def test_repeated_ngrams_count_once(tokens: list[int], n: int, expected: float) -> None:
    assert distinct(tokens, n) == pytest.approx(expected)
