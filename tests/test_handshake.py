"""What processes tell each other about their code before the first trial."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from packages import PACKAGES, copy_packages

from cluster.handshake import compare, evaluator_sources, identity
from evaluators.base import EvaluatorSpec
from search.errors import WorkerError

if TYPE_CHECKING:
    pass


def identity_of(folder: Path) -> dict[str, Any]:
    """What a fresh process that imports our packages from `folder` says about itself."""
    code = "import json, dataclasses as d, cluster.handshake as h; print(json.dumps(d.asdict(h.identity())))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_digest_depends_on_the_source_and_not_on_its_place(tmp_path: Path) -> None:
    one, other = copy_packages(tmp_path / "one"), copy_packages(tmp_path / "other")
    with (other / "search" / "pool.py").open("a") as source:
        source.write("# another version\n")
    with (other / "evaluators" / "native.cpp").open("w") as source:
        source.write("// decides bits as well\n")
    (other / "evaluators" / "__pycache__").mkdir()
    (other / "evaluators" / "__pycache__" / "x.pyc").write_bytes(b"x")
    first, second = identity_of(one)["packages"], identity_of(other)["packages"]
    assert first["search"]["folder"] == str(one / "search")
    different = [name for name in PACKAGES if first[name]["sha256"] != second[name]["sha256"]]
    assert different == ["search", "evaluators"]


def test_a_difference_is_named_with_node_package_and_both_digests() -> None:
    ours = identity()
    compare(ours, replace(ours, node="elsewhere"), "worker-1")
    package = replace(ours.packages["search"], sha256="f" * 64, folder="/opt/search")
    theirs = replace(ours, node="node-7", packages={**ours.packages, "search": package})
    with pytest.raises(WorkerError) as caught:
        compare(ours, theirs, "worker-1")
    for part in (
        "worker-1",
        "node-7",
        "'search'",
        "f" * 16,
        ours.packages["search"].sha256[:16],
        "/opt/search",
    ):
        assert part in str(caught.value)
    with pytest.raises(WorkerError, match=r"torch 1\.0, expected"):
        compare(ours, replace(ours, libraries={**ours.libraries, "torch": "1.0"}), "worker-1")


EVALUATOR = """
from evaluators.base import Evaluator

class Own(Evaluator):
    metrics = {}
    def prepare(self, context): pass
    def items(self, pool): return []
    def evaluate(self, model, items): yield from ()
"""


def test_the_source_of_an_evaluator_is_its_class_file_and_its_function_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    plugin, function = tmp_path / "own_evaluator_source.py", tmp_path / "function.py"
    plugin.write_text(EVALUATOR)
    function.write_text("def score(model): return 1.0")
    specs = (
        EvaluatorSpec("ours", "perplexity", {"data": "a: text"}),
        EvaluatorSpec("own", "own_evaluator_source:Own"),
        EvaluatorSpec("function", "python", {"function": f"{function}:score"}),
    )
    seen = [evaluator_sources(specs)]
    for file in (plugin, function):
        file.write_text(file.read_text() + "\n")
        seen.append(evaluator_sources(specs))
    digests = [[package.sha256 for package in sources.values()] for sources in seen]
    assert len({ours for ours, _, _ in digests}) == 1
    assert digests[0][1] != digests[1][1] == digests[2][1]
    assert digests[0][2] == digests[1][2] != digests[2][2]
    assert seen[0]["own"].folder == str(plugin)
