"""An evaluator in somebody else's package: installed, found by name, used; or named as module:Class."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "examples" / "plugin"

PROGRAM = """
import json, sys
from pathlib import Path
import torch
from evaluators.base import Context, EvaluatorSpec, Scores
from evaluators.registry import EVALUATORS, make_evaluator
from evaluators.testing import load_language_model, write_tiny_language_model

torch.set_num_threads(1)
use, folder = sys.argv[1], Path(sys.argv[2])
(folder / "prompts.jsonl").write_text("\\n".join(json.dumps({"prompt": f"The {n}. fox"}) for n in range(30)))
evaluator = make_evaluator(EvaluatorSpec("variety", use, {"data": "prompts.jsonl", "new_tokens": 8}), folder)
evaluator.check()
model = load_language_model(write_tiny_language_model(folder / "model"))
evaluator.prepare(Context(folder / "model"))
with torch.no_grad():
    scores = Scores.join(list(evaluator.evaluate(model, evaluator.items("search"))))
print(json.dumps({
    "names": EVALUATORS.names(),
    "module": type(evaluator).__module__,
    "file": sys.modules[type(evaluator).__module__].__file__,
    "items": len(scores.items),
    "distinct": evaluator.aggregate(scores)["distinct"],
}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the example, without network."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    done = subprocess.run(
        [*pip, "--no-deps", "--no-build-isolation", "--target", str(target), str(PLUGIN)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return target


def run_python(*arguments: str, path: list[Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in `folder` with `path` before everything else."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )


def use(name: str, path: list[Path], folder: Path) -> dict[str, object]:
    import json

    done = run_python("-c", PROGRAM, name, str(folder), path=path, folder=folder)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_an_installed_plugin_is_found_by_its_name_and_scores_a_model(installed: Path, tmp_path: Path) -> None:
    found = use("distinct_ngrams", [installed, ROOT], tmp_path)
    assert "distinct_ngrams" in found["names"]  # type: ignore[operator]  # a list
    assert str(found["file"]).startswith(str(installed))
    assert found["items"] > 5  # type: ignore[operator]  # an int
    assert 0 < found["distinct"] <= 1  # type: ignore[operator]  # a float


def test_a_class_that_can_be_imported_needs_no_installation(tmp_path: Path) -> None:
    found = use("meiosis_example_evaluator:DistinctNgrams", [PLUGIN, ROOT], tmp_path)
    assert "distinct_ngrams" not in found["names"]  # type: ignore[operator]  # a list
    assert found["module"] == "meiosis_example_evaluator"


def test_the_example_passes_the_public_contract(installed: Path, tmp_path: Path) -> None:
    """Its own test file, run as its author would, against the installed package."""
    tests = tmp_path / "test_distinct_ngrams.py"
    tests.write_text((PLUGIN / "test_distinct_ngrams.py").read_text())
    done = run_python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests), path=[installed, ROOT], folder=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout
