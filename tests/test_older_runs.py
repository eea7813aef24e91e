"""Runs whose folders lack what was added to configs later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from racing_runs import Quiet, checked, contents, pool_of, stopped

from search.run import resume, start

pytest_plugins = ["family", "racing_family"]


def test_a_run_goes_on_as_it_began_when_its_folder_knows_neither_halvings_nor_parts(
    family_config: dict[str, Any], tmp_path: Path
) -> None:
    baselines = [{"task_arithmetic": {"scales": [0.5, 1], "halvings": 0}}, {"ties": {"halvings": 0}}, "slerp"]
    family_config["search"] |= {"budget": 18, "window": 2, "baselines": baselines}
    setup = checked(family_config, tmp_path)
    whole, folder = start(setup, pool_of(1), Quiet(), "whole").folder, stopped(setup, 1, stop_after=4)
    text = yaml.safe_load(folder.config.read_text())
    for entry in text["config"]["search"]["baselines"]:
        [options] = entry.values()
        options.pop("halvings", None)
    del text["config"]["search"]["fitness"]["rotate"]
    folder.config.write_text(yaml.safe_dump(text))
    resume(folder, pool_of(1), Quiet())
    assert contents(folder) == contents(whole)


def test_a_run_on_parts_goes_on_with_the_estimate_that_is_refused_beside_them_today(
    racing_config: dict[str, Any], tmp_path: Path
) -> None:
    racing_config["search"] |= {"budget": 20, "window": 2, "optimizer": "gaussian_process", "fitness": {"first": 0.1}}
    setup = checked(racing_config, tmp_path)
    assert setup.config.search.fitness.rotate
    whole, folder = start(setup, pool_of(1), Quiet(), "whole").folder, stopped(setup, 1, stop_after=10)
    text = yaml.safe_load(folder.config.read_text())
    # Scores that are not all 0 or 1 have no item-response model: the history is that of control variates.
    text["config"]["search"]["fitness"]["estimate"] = "p_irt"
    folder.config.write_text(yaml.safe_dump(text))
    resume(folder, pool_of(1), Quiet())
    assert contents(folder) == contents(whole)


def test_a_run_on_parts_goes_on_with_parents_on_all_items_when_its_folder_knows_no_share(
    racing_config: dict[str, Any], tmp_path: Path
) -> None:
    fitness = {"first": 0.1, "parents": 1}
    racing_config["search"] |= {"budget": 20, "window": 2, "optimizer": "gaussian_process", "fitness": fitness}
    setup = checked(racing_config, tmp_path)
    whole, folder = start(setup, pool_of(1), Quiet(), "whole").folder, stopped(setup, 1, stop_after=10)
    text = yaml.safe_load(folder.config.read_text())
    del text["config"]["search"]["fitness"]["parents"]
    folder.config.write_text(yaml.safe_dump(text))
    resume(folder, pool_of(1), Quiet())
    assert contents(folder) == contents(whole)
