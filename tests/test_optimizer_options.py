"""The optimiser of a config: chosen by the genome where it is left open, and its options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import meiosis

from search.auto_optimizer import best_for
from search.config import OptimizerConfig, SearchConfig
from search.genome import Gene
from search.optimizer import OPTIMIZERS, options_class
from search.optimizers import optimizer_named
from search.optimizers.natural_niches import Options


def genes(numbers: int, choices: int = 0, wholes: int = 0) -> list[Gene]:
    return [
        *(Gene(f"{index}/a.weight", 0, 1, 0.5) for index in range(numbers)),
        *(Gene(f"{index}/operator", 0, 1, 0, "choice", None, ("x", "y")) for index in range(choices)),
        *(Gene(f"{index}/n", 0, 9, 0, "int") for index in range(wholes)),
    ]


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        (genes(6), "gaussian_process"),
        (genes(64), "gaussian_process"),
        (genes(65), "diagonal_cma"),
        (genes(20, wholes=4), "gaussian_process"),
        (genes(300, wholes=4), "diagonal_cma"),
        (genes(300, choices=1), "natural_niches"),
        (genes(0, choices=9), "natural_niches"),
    ],
)
def test_the_genome_decides_which_optimiser_auto_is(given: list[Gene], chosen: str) -> None:
    assert best_for(given)[0] == chosen
    assert chosen in OPTIMIZERS.names()


def test_auto_is_the_default_and_a_name_alone_is_short_for_the_section() -> None:
    assert SearchConfig().optimizer == OptimizerConfig(name="auto", step=0.1)
    short = SearchConfig.model_validate({"optimizer": "TwoPointsDE"}).optimizer
    assert (short.name, short.options) == ("TwoPointsDE", {})


def test_options_reach_the_optimiser_and_have_their_own_defaults() -> None:
    assert options_class("natural_niches") is Options
    assert Options().model_dump() == {"archive": 15, "alpha": 1.0, "crossover": "blend", "mutation": 0.05}
    make = optimizer_named("natural_niches", {"archive": 3})
    assert make.options == Options(archive=3)  # type: ignore[attr-defined]  # of WithOptions


def config(family_config: dict[str, Any], folder: Path, optimizer: object, **space: object) -> Path:
    family_config["search"] |= {"optimizer": optimizer, "budget": 22, "baselines": ["uniform_soup"], "finalists": 1}
    if optimizer is None:
        del family_config["search"]["optimizer"]
    family_config["space"] |= space
    path = folder / "my.yaml"
    path.write_text(yaml.safe_dump(family_config, sort_keys=False))
    return path


@pytest.mark.parametrize(
    ("optimizer", "key", "message"),
    [
        ({"name": "natural_niches", "archve": 3}, "archve", "unknown key; did you mean 'archive'?"),
        ({"name": "natural_niches", "archive": 1}, "archive", "must be greater than or equal to 2"),
        ({"name": "natural_niches", "stepp": 0.2}, "stepp", "unknown key; did you mean 'step'?"),
        ({"name": "diagonal_cma", "archive": 3}, "archive", "unknown key"),
        ({"name": "auto", "archive": 3}, "archive", "unknown key"),
        ({"name": "TwoPointsDE", "scale": 3}, "scale", "unknown key"),
        ({"name": "diagonal_cma", "step": 2}, "step", "must be less than or equal to 1"),
        ({"name": "natural_nices"}, "", "unknown optimizer 'natural_nices'; did you mean 'natural_niches'?"),
    ],
)
def test_a_fault_in_the_options_is_told_at_its_line(
    optimizer: dict[str, Any], key: str, message: str, family_config: dict[str, Any], tmp_path: Path
) -> None:
    path = config(family_config, tmp_path, optimizer)
    at = next(
        n for n, line in enumerate(path.read_text().splitlines(), 1) if line.strip().startswith(key or "optimizer")
    )
    ended = meiosis("plan", path)
    assert ended.status == 2
    assert f"my.yaml:{at}:" in ended.err
    assert f"search.optimizer{'.' if key else ''}{key}: " in ended.err
    assert message in ended.err
    assert ended.err.count("\n") == 1


def test_operators_of_a_list_are_found_faulty_at_their_line(family_config: dict[str, Any], tmp_path: Path) -> None:
    path = config(family_config, tmp_path, "auto", operator=["ties", "slerp", "tie"])
    ended = meiosis("plan", path)
    assert ended.status == 2
    assert "space.operator.1: operator 'slerp' takes exactly 2 sources, the config has 3" in ended.err
    assert f"my.yaml:{path.read_text().splitlines().index('  - slerp') + 1}:" in ended.err


def test_a_search_over_operators_and_sources_runs_resumes_and_says_what_it_chose(
    family_config: dict[str, Any], tmp_path: Path
) -> None:
    path = config(
        family_config,
        tmp_path,
        None,
        operator=["task_arithmetic", "ties"],
        subset="group",
        layers_per_group=0,
        split=[],
    )
    plan = meiosis("plan", path, "--json").json
    assert plan["optimizer"] == "natural_niches"
    assert plan["optimizer_chosen"] == "8 of 20 genes are choices without an order"
    assert plan["operator"] == ["task_arithmetic", "ties"]
    assert plan["genes"][0] == {
        "name": "layers/operator",
        "kind": "choice",
        "choices": ["task_arithmetic", "ties"],
        "initial": "task_arithmetic",
    }
    shown = meiosis("plan", path).out
    assert "Operator task_arithmetic or ties, optimizer natural_niches (auto: 8 of 20 genes" in shown
    ended = meiosis("search", path, "--run", "one")
    assert ended.status == 0, ended.err
    run = tmp_path / "results" / "one"
    written = yaml.safe_load((run / "run.yaml").read_text())["config"]
    assert written["search"]["optimizer"] == {"name": "natural_niches", "step": 0.1, **Options().model_dump()}
    assert written["space"]["operator"] == ["task_arithmetic", "ties"]
    assert meiosis("resume", run, "--budget", "26").status == 0
    recipe = yaml.safe_load((run / "best" / "recipe.yaml").read_text())
    assert {rule["operator"] for rule in recipe["rules"]} <= {"task_arithmetic", "ties", "linear"}
