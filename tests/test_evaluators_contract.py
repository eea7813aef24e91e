"""The public contract on every evaluator that ships with Meiosis, and what the registry says of them."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

from evaluators.base import Evaluator, EvaluatorSpec
from evaluators.errors import UserError
from evaluators.registry import EVALUATORS, make_evaluator
from evaluators.testing import EvaluatorContract

ROOT = Path(inspect.getfile(Evaluator)).parents[1]

TEXT_LINES = [
    {"text": f"Line {n} says that the dog {'jumps over ' * (n % 7)}the fox.", "document": f"d{n // 2}"}
    for n in range(60)
]
QUESTION_LINES = [
    {"context": f"After {n} comes", "choices": [f"{n + 1}", f"{n + 2}", "a fox"], "answer": n % 3} for n in range(40)
]
FUNCTION = """
def score(model, tokenizer, items):
    return [len(tokenizer(item["text"])["input_ids"]) for item in items]
"""


class ShippedContract(EvaluatorContract):
    use: ClassVar[str]
    lines: ClassVar[list[dict[str, Any]]] = TEXT_LINES
    options: ClassVar[dict[str, Any]] = {}

    def make_evaluator(self, folder: Path) -> Evaluator:
        (folder / "items.jsonl").write_text("\n".join(json.dumps(line) for line in self.lines))
        (folder / "function.py").write_text(FUNCTION)
        return make_evaluator(EvaluatorSpec("e", self.use, {"data": "items.jsonl", **self.options}), folder)


class TestPerplexity(ShippedContract):
    use = "perplexity"
    options: ClassVar[dict[str, Any]] = {"max_tokens": 16, "stride": 8, "batch_tokens": 100}


class TestMultipleChoice(ShippedContract):
    use = "multiple_choice"
    lines = QUESTION_LINES
    options: ClassVar[dict[str, Any]] = {"batch_tokens": 100}


class TestPython(ShippedContract):
    use = "python"
    options: ClassVar[dict[str, Any]] = {"function": "function.py:score"}


class TestCost(ShippedContract):
    use = "cost"

    def make_evaluator(self, folder: Path) -> Evaluator:
        return make_evaluator(EvaluatorSpec("e", self.use), folder)


def test_every_shipped_evaluator_is_under_the_contract() -> None:
    from test_image_classification import ImagesContract  # has models of its own, in a module of its own

    shipped = {name for name, plugin in EVALUATORS if plugin.__module__.startswith("evaluators.")}
    assert {kind.use for kind in (*ShippedContract.__subclasses__(), ImagesContract)} == shipped


def test_listing_all_evaluators_with_their_options_imports_no_torch() -> None:
    program = (
        "import sys\nfrom evaluators.registry import EVALUATORS\n"
        "assert {'perplexity', 'multiple_choice', 'python'} <= set(EVALUATORS.names())\n"
        "assert not any(name in EVALUATORS.names() for name in ('base', 'items', 'batching', 'testing'))\n"
        "for name, plugin in EVALUATORS: print(plugin.Options.model_json_schema())\n"
        "sys.exit(str({'torch', 'transformers', 'ray'} & set(sys.modules) or ''))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == ""


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ("perplexty", "unknown evaluator 'perplexty'; did you mean 'perplexity'?"),
        ("math:pi", "'math:pi' is not an evaluator"),
        ("evaluators.base:Evaluator", "is not complete: it does not define evaluate, items, prepare"),
        ("no_such_module:Class", "cannot be imported: No module named 'no_such_module'"),
        ("evaluators.base:Nothing", "cannot be imported"),
    ],
)
def test_a_wrong_name_is_refused_with_a_way_out(use: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_evaluator(EvaluatorSpec("e", use))
    assert message in str(caught.value)
