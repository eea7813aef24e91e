"""Write a candidate as an ordinary Hugging Face checkpoint, with its recipe and a model card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from evaluators.base import ITEM_POOLS, ItemPool
from search.checkpoints.compatibility import check_compatible
from search.checkpoints.fingerprint import fingerprint, refuse_non_finite
from search.checkpoints.reading import Checkpoint, open_checkpoint
from search.checkpoints.writing import write_checkpoint
from search.errors import CheckpointError, MeiosisError, RecipeError
from search.finals import Verdict
from search.merge.apply import Merger
from search.merge.check import check_recipe
from search.model_card import model_card
from search.population import Candidate
from search.recipe import ModelRef, Recipe
from search.setup import Setup, first_difference
from search.sources import open_sources
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
    check_recipe(recipe)
    checkpoints = {}
    for name, ref in recipe.models.items():
        local = (folder / Path(ref.path).expanduser()).resolve()
        checkpoints[name] = open_checkpoint(
            local if local.exists() or ref.path.startswith((".", "/", "~")) else ref.path
        )
    donor = checkpoints[recipe.donor]
    recipe.assign(donor.tensors)
    for name, checkpoint in checkpoints.items():
        if name != recipe.donor:
            try:
                check_compatible(donor, {name: checkpoint})
            except CheckpointError as error:
                raise CheckpointError(first_difference(error)) from error
    models = {}
    for name, checkpoint in checkpoints.items():
        print_ = fingerprint(checkpoint)
        refuse_non_finite(name, print_)
        wanted = recipe.models[name].sha256
        if wanted is not None and wanted != print_.sha256:
            raise RecipeError(
                f"models.{name}.sha256: {checkpoint.folder} has the weights {print_.sha256[:12]}, the recipe wants "
                f"{wanted[:12]}; point it at the model it was made from, or leave sha256 out"
            )
        models[name] = ModelRef(path=str(checkpoint.folder), sha256=print_.sha256)
    # The recipe that goes with the model must work from there: relative paths start at the file that has them.
    recipe = recipe.model_copy(update={"models": models})
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
    expected = next(
        (t.weights_sha256 for (id_, _), t in trials.items() if id_ == candidate.id and t.weights_sha256), None
    )

    def verify(folder: Path) -> None:
        written = fingerprint(open_checkpoint(folder), cache=False)
        refuse_non_finite(f"candidate {candidate.id}", written)
        if expected is not None and written.sha256 != expected:
            raise MeiosisError(
                f"{out}: the merged tensors (sha256 {written.sha256[:12]}) are not those that were evaluated "
                f"({expected[:12]}); nothing was written. Export on the kind of device that evaluated them: "
                f"arithmetic differs between devices ({setup.device} in the config)"
            )

    write_merge(
        candidate.recipe,
        setup.checkpoints,
        out,
        {"README.md": card},
        overwrite=overwrite,
        device=setup.device,
        verify=verify,
    )
    return out


def write_merge(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    out: Path,
    extra_files: Mapping[str, str],
    *,
    overwrite: bool = False,
    device: str = "cpu",
    verify: Callable[[Path], None] = lambda _: None,
) -> None:
    """Merge and write; the same code path and, on the same kind of device, the same bits as in a worker."""
    from search.evaluation import resolve_device

    donor = checkpoints[recipe.donor]
    opened = open_sources({name: checkpoints[name] for name in recipe.models}, recipe)
    merger = Merger(
        opened.tensors,
        device=resolve_device(device),
        identity={name: ref.sha256 or ref.path for name, ref in recipe.models.items()},
        names=opened.names,
        statistics=opened.statistics,
        keep_prepared=False,
    )
    write_checkpoint(
        merger.merge_tensors(recipe),
        donor,
        out,
        extra_files={"recipe.yaml": recipe.to_yaml(), **opened.files, **extra_files},
        config_changes=opened.config,
        dtype=recipe.dtype,
        overwrite=overwrite,
        verify=verify,
    )
