"""Write a candidate as an ordinary Hugging Face checkpoint, with its recipe and a model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from evaluators.base import ITEM_POOLS, ItemPool
from search.checkpoint import Checkpoint, CheckpointTensors, open_checkpoint
from search.checkpoint_writer import write_checkpoint
from search.errors import MeiosisError, RecipeError
from search.finals import Verdict
from search.fingerprint import fingerprint
from search.merge.apply import Merger
from search.merge.check import check_recipe
from search.model_card import model_card
from search.population import Candidate
from search.recipe import Recipe
from search.setup import Setup
from search.store.events import Trial


def merge_recipe(recipe: Recipe, out: Path, *, folder: Path = Path(), overwrite: bool = False) -> Path:
    """Carry out a recipe from a file, without a search.

    Args:
        recipe: checked against its models here.
        out: folder to write; must not exist, or be empty.
        folder: relative model paths start here.

    Raises:
        UserError: recipe and models do not fit, or `out` is taken.
    """
    from search.compatibility import check_compatible

    check_recipe(recipe)
    checkpoints = {}
    for name, ref in recipe.models.items():
        local = (folder / Path(ref.path).expanduser()).resolve()
        checkpoints[name] = open_checkpoint(local if local.exists() or ref.path.startswith((".", "/", "~")) else ref.path)
        if ref.sha256 is not None and (found := fingerprint(checkpoints[name]).sha256) != ref.sha256:
            raise RecipeError(f"models.{name}: {ref.path} has sha256 {found[:12]}, the recipe expects {ref.sha256[:12]}")
    donor = checkpoints[recipe.donor]
    check_compatible(donor, {name: c for name, c in checkpoints.items() if name != recipe.donor})
    write_merge(recipe, checkpoints, out, {"README.md": model_card(recipe, donor)}, overwrite=overwrite)
    return out


def export_candidate(
    setup: Setup,
    candidate: Candidate,
    trials: Mapping[tuple[int, ItemPool], Trial],
    out: Path,
    *,
    verdict: Verdict | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a candidate of a run; the tensors are those that were evaluated, verified by hash.

    Raises:
        UserError: `out` is taken.
        MeiosisError: the tensors differ from those that were evaluated.
    """
    trial = next((t for items in reversed(ITEM_POOLS) if (t := trials.get((candidate.id, items)))), None)
    card = model_card(candidate.recipe, setup.checkpoints["base"], candidate, trial, verdict, setup)
    write_merge(candidate.recipe, setup.checkpoints, out, {"README.md": card}, overwrite=overwrite)
    expected = next(
        (t.weights_sha256 for (id_, _), t in trials.items() if id_ == candidate.id and t.weights_sha256), None
    )
    written = fingerprint(open_checkpoint(out), cache=False).sha256
    if expected is not None and written != expected:
        raise MeiosisError(
            f"{out}: the exported tensors (sha256 {written[:12]}) are not those that were evaluated "
            f"({expected[:12]}); this is a fault of this machine or of Meiosis, do not use the model"
        )
    return out


def write_merge(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    out: Path,
    extra_files: Mapping[str, str],
    *,
    overwrite: bool = False,
) -> None:
    """Merge and write; the same code path and the same bits as in a worker."""
    donor = checkpoints[recipe.donor]
    used = {recipe.donor, *(name for rule in recipe.rules for name in rule.sources), *([recipe.base] if recipe.base else [])}
    merger = Merger(
        {name: CheckpointTensors(checkpoints[name]) for name in used},
        identity={name: recipe.models[name].sha256 or recipe.models[name].path for name in used},
    )
    write_checkpoint(
        merger.merge_tensors(recipe),
        donor,
        out,
        extra_files={"recipe.yaml": recipe.to_yaml(), **extra_files},
        dtype=recipe.dtype,
        overwrite=overwrite,
    )
