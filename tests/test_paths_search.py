"""A search over paths, from config to exported model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import end, meiosis, write_config

from search.config import load_config
from search.local_pool import LocalPool
from search.progress import Watcher
from search.run import export_trial, load_setup, make_population, start
from search.setup import check

torch.set_num_threads(1)


@pytest.fixture
def path_config(family_config: dict[str, Any]) -> dict[str, Any]:
    """A merge and its path in one genome."""
    family_config["space"]["path"] = {"pool": ["merged", "cpp"], "repeats": 2, "min_length": 2, "max_length": 5}
    family_config["search"] |= {"budget": 24, "baselines": ["uniform_soup"]}
    return family_config


def test_a_search_over_merge_and_path_ends_in_a_plain_checkpoint_that_computes_what_was_evaluated(
    path_config: dict[str, Any], tmp_path: Path
) -> None:
    import transformers

    setup = check(load_config(write_config(path_config, tmp_path)))
    found = start(setup, lambda setup, plan, folder: LocalPool(plan, setup.config.cluster.workers), Watcher(), "run")
    trials = [event for event in found.folder.events() if getattr(event, "items", None) == "search"]
    assert not [trial.failure_message for trial in trials if trial.failure_kind]
    space = load_setup(found.folder, Watcher()).space
    candidates = [event for event in found.folder.events() if getattr(event, "genome", None) is not None]
    from search.genome import Genome

    recipes = [space.decode(Genome(event.genome)) for event in candidates]
    lengths = {len(recipe.layers) for recipe in recipes if recipe.layers}
    assert lengths <= {2, 3, 4, 5}
    assert len(lengths) > 1
    number = next(e.candidate for e, r in zip(candidates, recipes, strict=True) if r.layers and len(r.layers) > 2)
    export_trial(found.folder, tmp_path / "out", number, Watcher())
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
