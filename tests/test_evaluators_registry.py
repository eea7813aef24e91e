"""Plug-ins of other people: whatever is wrong with one is told in a line, and hides no other."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import end, spawn, write_config

from evaluators.base import EvaluatorSpec
from evaluators.errors import UserError
from evaluators.registry import Registry, make_evaluator

GOOD = """
import numpy as np
from evaluators.base import Evaluator, Metric, Scores

class Good(Evaluator):
    help = "a good one"
    metrics = {"one": Metric("minimize")}
    def prepare(self, context): pass
    def items(self, pool): return [pool]
    def evaluate(self, model, items): yield Scores(tuple(items), {"one": np.ones(1)}, np.ones(1))

class Half(Evaluator):
    help = "says nothing of its metrics"
    def prepare(self, context): pass
    def items(self, pool): return [pool]
    def evaluate(self, model, items): yield

class Partial(Evaluator):
    metrics = {}
"""

ON_IMPORT = {
    "ValueError: no good": "raise ValueError('no good\\nat all')",
    "NameError: name 'nothing' is not defined": "nothing",
    "SyntaxError: invalid syntax": "def (",
    "SystemExit: 3": "raise SystemExit(3)",
    "No module named 'a_library_that_is_not_there'": "import a_library_that_is_not_there",
    "ImportError: cannot import name 'nothing'": "from os import nothing",
    "RuntimeError: no message": "raise RuntimeError",
}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))  # for processes that are spawned
    (folder / "good_plugin.py").write_text(GOOD)
    return folder


def install(site: Path, package: str, kind: str = "evaluators", **points: str) -> None:
    """What pip leaves of a package: its name and its entry points."""
    folder = site / f"{package}-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"[meiosis.{kind}]", *(f"{name} = {place}" for name, place in points.items())]
    (folder / "entry_points.txt").write_text("\n".join(lines) + "\n")


def registry() -> Registry[object]:
    """The evaluators as a new process finds them."""
    return Registry("evaluator", "evaluators", "meiosis.evaluators")


@pytest.mark.parametrize("use", [":Foo", ".foo:Bar", "..:Bar", "foo:", ":", "good_plugin:"])
def test_a_place_that_names_no_module_or_nothing_in_it_is_refused(use: str) -> None:
    with pytest.raises(UserError, match="expected module:name with the full name"):
        make_evaluator(EvaluatorSpec("e", use))


@pytest.mark.parametrize("cause", ON_IMPORT)
def test_whatever_a_plugin_raises_on_import_is_one_line_with_its_cause(cause: str, site: Path) -> None:
    name = f"raises_{list(ON_IMPORT).index(cause)}"
    (site / f"{name}.py").write_text(ON_IMPORT[cause])
    install(site, "some-package", odd=f"{name}:Odd")
    for use, named in ((f"{name}:Odd", f"'{name}:Odd'"), ("odd", f"'odd' ({name}:Odd of some-package)")):
        with pytest.raises(UserError) as caught:
            registry().get(use)
        assert f"evaluator {named} cannot be imported: {cause}" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_two_packages_with_one_name_are_both_named_and_neither_is_chosen(site: Path) -> None:
    install(site, "first-package", same="good_plugin:Good")
    install(site, "second-package", same="good_plugin:Half")
    with pytest.raises(UserError) as caught:
        registry().get("same")
    message = str(caught.value)
    assert "'same' is there 2 times: good_plugin:Good of first-package, good_plugin:Half of second-package" in message
    assert registry().get("good_plugin:Good").__name__ == "Good"  # type: ignore[attr-defined]  # the way out


def test_a_package_with_the_name_of_a_built_in_is_refused_and_both_can_be_had_by_their_place(site: Path) -> None:
    install(site, "some-package", perplexity="good_plugin:Good")
    with pytest.raises(UserError) as caught:
        registry().get("perplexity")
    message = str(caught.value)
    assert "'perplexity' is there 2 times: built in, good_plugin:Good of some-package" in message
    places = message.rpartition("its place: ")[2].split(" or ")
    assert [registry().get(place).__name__ for place in places] == ["Perplexity", "Good"]  # type: ignore[attr-defined]


def test_the_same_class_published_twice_is_no_conflict(site: Path) -> None:
    install(site, "first-package", same="good_plugin:Good")
    install(site, "second-package", same="good_plugin:Good")
    assert registry().get("same").__name__ == "Good"  # type: ignore[attr-defined]


def test_the_list_of_evaluators_shows_the_good_ones_and_why_others_cannot_be_loaded(site: Path) -> None:
    (site / "bad_plugin.py").write_text("raise ValueError('no good')")
    install(
        site,
        "some-package",
        bad="bad_plugin:Bad",
        good="good_plugin:Good",
        half="good_plugin:Half",
        number="math:pi",
        part="good_plugin:Partial",
        python="good_plugin:Good",
    )
    ended = end(spawn("evaluators", "--json"))
    assert ended.status == 0, ended.err
    found = ended.json
    assert found["good"]["help"] == "a good one"
    assert {"nll", "ppl"} & set(found["perplexity"]["metrics"])
    for name, message in {
        "bad": "cannot be loaded: evaluator 'bad' (bad_plugin:Bad of some-package) cannot be imported: ValueError",
        "half": "cannot be loaded: it is not what is listed here: AttributeError",
        "number": "is not an evaluator",
        "part": "is not complete: it does not define evaluate, items, prepare",
        "python": "is there 2 times: built in, good_plugin:Good of some-package",
    }.items():
        assert message in found[name]["error"]
    shown = end(spawn("evaluators"))
    assert shown.status == 0, shown.err
    assert "a good one" in shown.out
    assert shown.out.count("cannot be loaded: ") == 5


def test_the_list_of_operators_shows_the_good_ones_and_why_others_cannot_be_loaded(site: Path) -> None:
    (site / "bad_plugin.py").write_text("1 / 0")
    install(site, "some-package", "operators", bad="bad_plugin:Bad", number="math:pi", slerp="good_plugin:Good")
    ended = end(spawn("operators", "--json"))
    assert ended.status == 0, ended.err
    found = ended.json
    assert found["linear"]["parameters"]
    assert "ZeroDivisionError: division by zero" in found["bad"]["error"]
    assert "AttributeError" in found["number"]["error"]
    assert "is there 2 times" in found["slerp"]["error"]
    shown = end(spawn("operators"))
    assert shown.status == 0, shown.err
    assert "Wortsman" in shown.out
    assert shown.out.count("cannot be loaded: ") == 3


def test_a_config_with_a_broken_plugin_ends_in_one_line_and_status_2(site: Path, tmp_path: Path) -> None:
    (site / "bad_plugin.py").write_text("raise ValueError('no good')")
    config = {
        "name": "x",
        "models": {"base": str(tmp_path), "sources": {"a": str(tmp_path)}},
        "space": {"operator": "linear"},
        "evaluators": {"bad": {"use": "bad_plugin:Bad"}},
        "objectives": ["bad.score"],
    }
    ended = end(spawn("plan", write_config(config, tmp_path)))
    assert ended.status == 2, ended.err
    (line,) = [line for line in ended.err.splitlines() if "bad_plugin" in line]
    assert "evaluator 'bad_plugin:Bad' cannot be imported: ValueError: no good" in line
    assert "fault of Meiosis" not in ended.err
