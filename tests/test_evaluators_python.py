"""A user's function: what it is given, what it may return, and what is said when it is wrong."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from evaluators.base import ITEM_POOLS, Context, EvaluatorSpec, Scores
from evaluators.custom.python import PythonFunction
from evaluators.errors import MeiosisError, UserError
from evaluators.registry import make_evaluator
from evaluators.testing import by_item, load_language_model, write_tiny_language_model

torch.set_num_threads(1)


def make(tmp_path: Path, code: str, rows: int = 0, **options: Any) -> PythonFunction:
    (tmp_path / "mine.py").write_text(textwrap.dedent(code))
    if rows:
        (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"x": n, "deep": [n], "id": n}) for n in range(rows)))
        options["data"] = "rows.jsonl"
    evaluator = make_evaluator(EvaluatorSpec("f", "python", {"function": "mine.py:score", **options}), tmp_path)
    assert isinstance(evaluator, PythonFunction)
    return evaluator


def run(
    evaluator: PythonFunction,
    model: torch.nn.Module | None = None,
    folder: Path = Path(),
    pool: Any = "search",
) -> Scores:
    evaluator.check()
    evaluator.prepare(Context(folder, seed=11))
    return Scores.join(list(evaluator.evaluate(model or torch.nn.Linear(1, 1), evaluator.items(pool))))


def test_without_data_there_is_one_score_per_pool(tmp_path: Path) -> None:
    evaluator = make(tmp_path, "def score(model):\n    return model.weight.sum()")
    model = torch.nn.Linear(3, 2)
    for pool in ITEM_POOLS:
        scores = run(evaluator, model, pool=pool)
        assert scores.items == (pool,)
        assert evaluator.aggregate(scores) == {"score": pytest.approx(model.weight.sum().item())}


def test_with_data_the_function_sees_the_objects_of_a_pool_and_scores_each(tmp_path: Path) -> None:
    evaluator = make(tmp_path, "def score(model, items):\n    return [item['x'] * 2 for item in items]", rows=40)
    scores = run(evaluator)
    assert 10 < len(scores.items) < 30
    assert by_item(scores) == {item: (2.0 * int(item), 1.0) for item in evaluator.items("search")}


def test_a_generator_is_left_when_the_evaluation_is(tmp_path: Path) -> None:
    code = """
        seen = []
        def score(model, items):
            for item in items:
                seen.append(item)
                yield len(seen)
    """
    evaluator = make(tmp_path, code, rows=40)
    evaluator.check()
    evaluator.prepare(Context(tmp_path))
    running = evaluator.evaluate(torch.nn.Linear(1, 1), evaluator.items("search"))
    assert next(running).values["score"].tolist() == [1.0]
    assert next(running).values["score"].tolist() == [2.0]
    running.close()  # type: ignore[attr-defined]  # a generator
    assert len(evaluator._function.__globals__["seen"]) == 2


def test_several_metrics_are_returned_by_name(tmp_path: Path) -> None:
    code = """
        import numpy as np
        def score(model, items):
            return [{"a": np.float32(1), "b": item["x"]} for item in items]
    """
    metrics = {"a": {}, "b": {"direction": "minimize", "low": 0, "unit": "s"}}
    evaluator = make(tmp_path, code, rows=40, metrics=metrics)
    assert {name: m.direction for name, m in evaluator.metrics.items()} == {"a": "maximize", "b": "minimize"}
    scores = run(evaluator)
    assert evaluator.aggregate(scores) == {
        "a": 1.0,
        "b": pytest.approx(np.mean([int(i) for i in scores.items])),
    }


def test_the_function_gets_what_its_parameters_name(tmp_path: Path) -> None:
    folder = write_tiny_language_model(tmp_path / "model")
    code = """
        def score(model, tokenizer, items, device, *, seed, unused=3):
            tokens = tokenizer(items[0]["pool"], return_tensors="pt").to(device)
            assert not model.training and model(**tokens).logits.grad_fn is None
            return {"score": seed}
    """
    assert run(make(tmp_path, code), load_language_model(folder), folder).values["score"].tolist() == [11.0]
    everything = """
        def score(**given):
            return sorted(given) == ["device", "items", "model", "seed", "tokenizer"]
    """
    assert run(make(tmp_path, everything), load_language_model(folder), folder).values["score"].tolist() == [1.0]


def test_a_base_without_tokenizer_gives_none(tmp_path: Path) -> None:
    assert run(make(tmp_path, "def score(tokenizer):\n    return tokenizer is None")).values["score"].tolist() == [1.0]


def test_what_the_function_does_to_its_items_does_not_reach_the_next_candidate(tmp_path: Path) -> None:
    code = """
        def score(model, items):
            for item in items:
                item["x"] += 1
                item["deep"][0] += item["x"]
                yield item["deep"][0]
    """
    evaluator = make(tmp_path, code, rows=20)
    assert by_item(run(evaluator)) == by_item(run(evaluator))


def test_a_function_of_an_installed_module_is_found(tmp_path: Path) -> None:
    spec = EvaluatorSpec("f", "python", {"function": "math:prod", "metrics": {"score": {}}})
    make_evaluator(spec).check()
    evaluator = make_evaluator(EvaluatorSpec("f", "python", {"function": "platform:system"}))
    evaluator.check()
    evaluator.prepare(Context(tmp_path))
    other = make_evaluator(EvaluatorSpec("f", "python", {"function": "evaluators.custom.python:_is_one"}))
    with pytest.raises(UserError, match="asks for 'result'"):
        other.check()


def test_two_files_with_the_same_name_do_not_mix_and_an_edit_is_seen(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    one = make(tmp_path, "def score():\n    return 1")
    two = make(tmp_path / "other", "def score():\n    return 2")
    assert [run(e).values["score"][0] for e in (one, two)] == [1.0, 2.0]
    before = one.data_sha256()
    edited = make(tmp_path, "def score():\n    return 3")
    assert run(edited).values["score"][0] == 3.0
    assert edited.data_sha256() != before


def test_a_dataclass_in_the_file_works(tmp_path: Path) -> None:
    code = """
        from __future__ import annotations
        from dataclasses import dataclass
        @dataclass
        class Result:
            value: float
        def score():
            return Result(0.5).value
    """
    assert run(make(tmp_path, code)).values["score"].tolist() == [0.5]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def scor(model):\n    return 1", "mine.py: no function 'score' in it; did you mean 'scor'?"),
        ("x = 1", "mine.py: no function 'score' in it; there is none"),
        ("def score(model:\n    pass", "mine.py:1: not Python"),
        ("async def score(model):\n    pass", "mine.py:1: 'score' is async"),
        ("class score:\n    pass", "mine.py:1: 'score' is a class"),
        (
            "\ndef score(model, item):\n    pass",
            "mine.py:2: function 'score' asks for 'item'; did you mean 'items'?",
        ),
        ("def score(model, *, extra):\n    pass", "mine.py:1: function 'score' asks for 'extra'"),
    ],
)
def test_check_finds_the_mistake_without_running_the_file(tmp_path: Path, code: str, message: str) -> None:
    evaluator = make(tmp_path, code + "\nraise SystemExit('was run')" if "(model:" not in code else code)
    with pytest.raises(UserError) as caught:
        evaluator.check()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import no_such_module\ndef score():\n    return 1", "cannot be imported: ModuleNotFoundError"),
        ("score = 5", "mine.py:score: not a function"),
        ("from math import copysign as score", "asks for 'x'"),
        ("score = (lambda f: f)(lambda item: 1)", "asks for 'item'; did you mean 'items'?"),
    ],
)
def test_prepare_finds_what_only_running_the_file_can_show(tmp_path: Path, code: str, message: str) -> None:
    evaluator = make(tmp_path, code)
    evaluator.check()
    with pytest.raises(UserError) as caught:
        evaluator.prepare(Context(tmp_path))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError('too bad')", "mine.py:score raised ValueError: too bad"),
        ("yield 1; raise KeyError('k')", "mine.py:score raised KeyError: 'k'"),
        ("return [1]", "stopped before item"),
        ("return [1.0] * (len(items) + 1)", "returned more than the"),
        ("return 'good'", "returned str, expected a number"),
        ("return None", "returned NoneType, expected a number"),
        ("return ['a'] * len(items)", "returned something that is not a number: could not convert"),
        ("return [None] * len(items)", "returned something that is not a number"),
        (
            "return [{'sore': 1}] * len(items)",
            "returned 'sore', which is not under `metrics`; did you mean 'score'?",
        ),
        ("return [{}] * len(items)", "returned no 'score', which `metrics` declares"),
    ],
)
def test_what_goes_wrong_names_the_function(tmp_path: Path, body: str, message: str) -> None:
    evaluator = make(tmp_path, f"def score(items):\n    {body}", rows=20)
    with pytest.raises(MeiosisError) as caught:
        run(evaluator)
    assert message in str(caught.value)
    assert "mine.py:score" in str(caught.value)


def test_a_single_number_for_two_metrics_is_refused(tmp_path: Path) -> None:
    evaluator = make(tmp_path, "def score():\n    return 1", metrics={"a": {}, "b": {}})
    with pytest.raises(MeiosisError, match="returned a single number, expected a mapping with a, b"):
        run(evaluator)


@pytest.mark.parametrize("error", ["MemoryError()", "__import__('torch').OutOfMemoryError('CUDA')"])
def test_running_out_of_memory_stays_recognisable(tmp_path: Path, error: str) -> None:
    with pytest.raises((MemoryError, torch.OutOfMemoryError)):
        run(make(tmp_path, f"def score():\n    raise {error}"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"function": "score"},
            "'score' does not name a function; expected path/to/file.py:name or module:name",
        ),
        ({"function": "mine.py:"}, "does not name a function"),
        ({"function": "mine.py:a.b"}, "does not name a function"),
        ({"metrics": {}}, "at least 1 item"),
        ({"metrics": {"a.b": {}}}, "should match pattern"),
        ({"metrics": {"a": {"direction": "up"}}}, "'minimize' or 'maximize'"),
        ({"data": {"search": "a"}}, "Field required"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        make(tmp_path, "", **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("function", ["gone.py:score", "no.such.module:score", "nothing_like_it:score"])
def test_a_missing_file_or_module_is_refused(tmp_path: Path, function: str) -> None:
    evaluator = make(tmp_path, "", function=function)
    with pytest.raises(UserError, match=r"gone\.py: no such file|there is no module"):
        evaluator.check()


@pytest.fixture
def module_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder from which modules can be imported by name."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def scor(model):\n    return 1", "no function 'score' in it; did you mean 'scor'?"),
        ("class score:\n    pass", "'score' is a class"),
        ("def score(model, item):\n    pass", "asks for 'item'; did you mean 'items'?"),
        ("def score(model:\n    pass", "not Python"),
    ],
)
@pytest.mark.parametrize("inside", ["", "a_package_of_mine"])
def test_check_finds_the_mistake_in_a_module_without_importing_it(
    tmp_path: Path, module_folder: Path, code: str, message: str, inside: str
) -> None:
    (module_folder / inside).mkdir(exist_ok=True)
    if inside:
        (module_folder / inside / "__init__.py").write_text("raise SystemExit('was imported')")
    (module_folder / inside / "mine_by_name.py").write_text(f"{code}\nraise SystemExit('was imported')\n")
    function = f"{inside}.mine_by_name:score" if inside else "mine_by_name:score"
    with pytest.raises(UserError) as caught:
        make(tmp_path, "", function=function).check()
    assert message in str(caught.value)
    assert "mine_by_name.py" in str(caught.value)


def test_check_does_not_import_a_module_that_is_right(tmp_path: Path, module_folder: Path) -> None:
    (module_folder / "right_by_name.py").write_text("def score(model):\n    return 1\nraise SystemExit(1)\n")
    evaluator = make(tmp_path, "", function="right_by_name:score")
    evaluator.check()
    with pytest.raises(UserError, match="cannot be imported: SystemExit: 1"):
        evaluator.prepare(Context(tmp_path))


@pytest.mark.parametrize(
    "code", ["def __getattr__(name):\n    return print", "from os.path import *", "try: x\nfinally: 1"]
)
def test_a_name_that_only_running_the_module_can_show_is_let_pass(
    tmp_path: Path, module_folder: Path, code: str
) -> None:
    (module_folder / "open_by_name.py").write_text(code)
    make(tmp_path, "", function="open_by_name:score").check()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("os.path:nope", "function os.path:nope: module posixpath has no 'nope'"),
        ("os.path:joi", "has no 'joi'; did you mean 'join'?"),
        ("os.path:sep", "'sep' is of type str; expected a function"),
        ("json:JSONDecoder", "'JSONDecoder' is a class"),
        ("os.path:join", "asks for 'a'"),
        ("os:no:such", "there is no module 'os:no'"),
        ("json.nothing:score", "there is no module 'json.nothing'"),
    ],
)
def test_check_looks_into_modules_that_are_loaded(tmp_path: Path, function: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        make(tmp_path, "", function=function).check()
    assert message in str(caught.value)


def test_a_package_that_cannot_be_imported_is_told_with_its_reason(tmp_path: Path, module_folder: Path) -> None:
    (module_folder / "broken_of_mine").mkdir()
    (module_folder / "broken_of_mine" / "__init__.py").write_text("raise ValueError('too\\nbad')")
    with pytest.raises(UserError, match=r"broken_of_mine\.gone:score cannot be imported: ValueError: too$"):
        make(tmp_path, "", function="broken_of_mine.gone:score").check()
