"""What the README shows works as shown."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from markdown_tables import table_rows

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_config_that_is_explained_is_the_one_that_make_search_runs() -> None:
    example = yaml.safe_load((ROOT / "meiosis" / "samples" / "text.yaml").read_text())
    assert example in [yaml.safe_load(block) for block in blocks("yaml")]


def test_the_operator_that_is_shown_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from search.merge.apply import Merger
    from search.merge.sources import InMemoryTensors
    from search.recipe import Recipe

    code = next(block for block in blocks("python") if "Operator" in block)
    (tmp_path / "shown_operator.py").write_text(code)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(300, 1000, generator=generator)
    other = base + 0.01 * torch.randn(300, 1000, generator=generator)
    recipe = Recipe.from_data(
        {
            "base": "base",
            "models": {"base": {"path": "b"}, "other": {"path": "o"}},
            "rules": [{"operator": "shown_operator:PLUGIN", "sources": {"other": {}}, "parameters": {"t": 0.003}}],
        }
    )
    models = {"base": InMemoryTensors({"w": base}), "other": InMemoryTensors({"w": other})}
    merged = dict(Merger(models).merge_tensors(recipe))["w"].double().numpy()
    x, b = other.double().numpy(), base.double().numpy()
    share = np.clip(0.003 / np.maximum(np.abs(b - x), 1e-6), 0, 1)
    assert np.allclose(merged, share * x + (1 - share) * b, atol=1e-6)


def test_every_command_of_the_readme_is_there() -> None:
    from meiosis.cli.main import _COMMANDS

    named = set(re.findall(r"^    meiosis (\w+)", README, re.MULTILINE)) | {"evaluators"}
    assert named == set(_COMMANDS)


def test_the_two_commands_are_the_first_thing() -> None:
    first = README.split("```")[0].split("\n\n")[1]
    assert re.findall(r"^    make (\w+)", first, re.MULTILINE) == ["search", "test"]


def test_the_table_of_results_is_the_committed_one_and_every_row_of_every_seed_is_beaten() -> None:
    import pyarrow.parquet as pq

    rows = pq.read_table(ROOT / "results" / "reference" / "three_seeds.parquet").to_pylist()
    for seed in (0, 1, 2):
        of_seed = {row["model"]: row for row in rows if row["seed"] == seed}
        found = of_seed.pop("found merge")
        assert len(of_seed) >= 9
        assert all(row["p_holm"] < 0.01 and row["winner_minus_this"] < 0 for row in of_seed.values())
        best = min(
            (row for name, row in of_seed.items() if not name.startswith("parent:")), key=lambda r: r["objective"]
        )
        line = next(line for line in README.splitlines() if line.startswith(f"| {seed} |"))
        assert f"{best['objective']:.4f} ({best['model']}) | **{found['objective']:.4f}**" in line


def ratios(page: str) -> list[float]:
    """How many times fewer items the default takes, by the rows of a committed page."""
    rows = table_rows((ROOT / "results" / "reference" / f"{page}.md").read_text())
    return [float(row["ratio"]) for row in rows if row["method"] == "default"]


def test_the_readme_says_how_many_fewer_items_as_the_committed_pages_do() -> None:
    line = next(line for line in README.splitlines() if line.startswith("| fewer items |"))
    (text,), (vision,), tables = map(ratios, ("search_quality_text", "search_quality_vision", "search_quality_tables"))
    assert f"on the text family {text} times fewer, on the vision family {vision} times" in line
    low, middle, high, answers = tables
    assert f"{low}, {middle:.0f} and {high:.0f} times, on one of 0/1 answers {answers} times" in line


def reference(name: str) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(ROOT / "results" / "reference" / f"{name}.parquet").to_pylist()
    return rows


def test_what_the_readme_says_of_the_cluster_is_in_the_committed_tables() -> None:
    text = " ".join(README.split())
    rows = reference("driver_cost")
    costs = {
        pool: [r["median_ms"] for r in rows if r["table"] == "cost" and r["pool"] == pool]
        for pool in ("simulated", "Ray")
    }
    low, high = min(costs["simulated"]), max(costs["simulated"])
    assert f"The driver takes {low:.1f} to {high:.1f} ms for a trial with 8 to 10,000 simulated workers" in text
    assert f"and {min(costs['Ray']):.0f} to {max(costs['Ray']):.0f} ms on two cores" in text
    of_eight = [
        r for r in rows if r["table"] == "utilisation" and r["workers"] == 8 and r["durations"].startswith("log")
    ]
    for said, way in (
        ("{} to {} % of their time in ordered commit", "ordered commit, window twice the workers"),
        ("{} to {} % in arrival order", "arrival order, window twice the workers"),
        ("{} to {} % with a barrier between generations", "barrier: generations as large as the pool"),
    ):
        shares = sorted(100 * r["utilisation"] for r in of_eight if r["discipline"] == way)
        assert len(shares) == 2
        assert said.format(*(f"{share:.0f}" for share in shares)) in text
    kills = reference("chaos")
    assert f"kills workers, nodes, drivers and whole clusters {len(kills)} times" in text
    times = [
        r["seconds"] for r in reference("first_evaluation") if r["what"] == "search" and r["case"].startswith("own Ray")
    ]
    assert f"is there after {min(times):.0f} s" in text
