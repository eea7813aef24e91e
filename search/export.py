"""Write a candidate as an ordinary Hugging Face checkpoint, with its recipe and a model card."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from search.checkpoints.byte_progress import Meter
from search.checkpoints.fingerprint import Fingerprint
from search.checkpoints.pages import drop_mapped_pages, return_large_blocks
from search.checkpoints.reading import Checkpoint
from search.checkpoints.shard_writer import SHARD_BYTES
from search.checkpoints.source_hashes import SourceHashes
from search.checkpoints.writing import check_not_a_source, check_space, check_target, write_checkpoint, written_sha256
from search.devices import usable_device
from search.errors import MeiosisError, RecipeError, UserError
from search.merge.apply import Merger
from search.merge.check import check_recipe
from search.merge.parallel import MOST_AT_ONCE, merge_side_by_side
from search.merge.statistics import open_statistics, with_statistics_from
from search.merge_plan import HashState, MergePlan, output_layout, plan_merge
from search.model_card import model_card
from search.paths.fold import fold_of
from search.recipe import Recipe
from search.sources import check_models, open_models, open_sources

if TYPE_CHECKING:
    from torch import Tensor

    from evaluators.base import ItemPool
    from search.candidate import Candidate
    from search.setup import Setup
    from search.store.events import Trial
    from search.verdict import Verdict

DROP_BYTES = 64 << 20
"""Output after which the pages of the sources are let go of: each time costs a system call or a few."""


@dataclass(frozen=True)
class ReadyMerge:
    """A recipe that fits its models, which are opened; nothing of their tensors was read."""

    recipe: Recipe
    checkpoints: Mapping[str, Checkpoint]


def prepare_merge(recipe: Recipe, *, folder: Path = Path(), dtype: str | None = None) -> ReadyMerge:
    """Check a recipe against its models.

    Args:
        folder: relative model paths start here.
        dtype: of the output, instead of the recipe's.

    Raises:
        UserError: recipe and models do not fit.
    """
    if dtype is not None:
        recipe = recipe.model_copy(update={"dtype": dtype})
    recipe = with_statistics_from(recipe, folder)
    check_recipe(recipe)
    checkpoints = open_models(recipe.models, base=recipe.base, folder=folder)
    check_models(checkpoints, recipe)
    return ReadyMerge(recipe, checkpoints)


def dry_run(
    recipe: Recipe,
    out: Path,
    *,
    folder: Path = Path(),
    overwrite: bool = False,
    dtype: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    hash_models: bool = False,
) -> MergePlan:
    """What `merge_recipe` would do; reads headers, writes nothing.

    Raises:
        UserError: as `merge_recipe`, as far as headers and the cache of fingerprints show it.
        MeiosisError: the disk has no room for the model.
    """
    check_target(Path(out).resolve(), overwrite)
    ready = prepare_merge(recipe, folder=folder, dtype=dtype)
    check_not_a_source(out, ready.checkpoints)
    opened = open_sources(ready.checkpoints, ready.recipe)
    with SourceHashes(ready.checkpoints, (), (), threads=0) as hashes:
        known = hashes.known()
    _with_hashes(ready.recipe, ready.checkpoints, known)
    wanted = _to_hash(ready.recipe, hash_models)
    states: dict[str, HashState] = {
        name: "known" if name in known else "to be taken" if name in wanted else "not asked for"
        for name in ready.recipe.models
    }
    plan = plan_merge(ready.recipe, ready.checkpoints, opened, max_shard_bytes, states)
    check_space(Path(out).resolve(), plan.bytes_written)
    return plan


def merge_recipe(
    recipe: Recipe,
    out: Path,
    *,
    folder: Path = Path(),
    overwrite: bool = False,
    dtype: str | None = None,
    device: str = "cpu",
    max_shard_bytes: int = SHARD_BYTES,
    threads: int | None = None,
    hash_models: bool = False,
    meter: Meter | None = None,
) -> Path:
    """Carry out a recipe from a file, without a search, in one pass over the models.

    Args:
        recipe: checked against its models here.
        out: folder to write; must not exist, or be empty.
        folder: relative model paths start here.
        overwrite: whether `out` may be a model that Meiosis wrote.
        dtype: of the output, instead of the recipe's.
        device: where to merge, or `auto`.
        max_shard_bytes: size of the files of the output.
        hash_models: whether the recipe beside the output says which bytes every model had; of a model whose hash
            the recipe has, or that the cache of this user knows, it does in any case.
        threads: of arithmetic and of hashing; by default what torch chose, and as many as there are cores.
        meter: told how far it is.

    Raises:
        UserError: recipe and models do not fit, a model is not finite or not the one that the recipe wants, or
            `out` is taken.
    """
    check_target(Path(out).resolve(), overwrite)
    ready = prepare_merge(recipe, folder=folder, dtype=dtype)
    check_not_a_source(out, ready.checkpoints)
    write_merge(
        ready.recipe,
        ready.checkpoints,
        out,
        lambda known: {"README.md": model_card(known, ready.checkpoints[known.donor])},
        check_sources=True,
        hashed=_to_hash(ready.recipe, hash_models),
        overwrite=overwrite,
        device=device,
        max_shard_bytes=max_shard_bytes,
        threads=threads,
        meter=meter,
    )
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
    from evaluators.base import ITEM_POOLS

    trial = next((t for items in reversed(ITEM_POOLS) if (t := trials.get((candidate.id, items)))), None)
    card = model_card(candidate.recipe, setup.checkpoints["base"], candidate, trial, verdict, setup)
    expected = next(
        (t.weights_sha256 for (id_, _), t in trials.items() if id_ == candidate.id and t.weights_sha256), None
    )

    def verify(folder: Path) -> None:
        written = written_sha256(folder)
        if expected is not None and written != expected:
            raise MeiosisError(
                f"{out}: the merged tensors (sha256 {written[:12]}) are not those that were evaluated "
                f"({expected[:12]}); nothing was written. Export on the kind of device that evaluated them: "
                f"arithmetic differs between devices ({setup.device} in the config)"
            )

    write_merge(
        candidate.recipe,
        setup.checkpoints,
        out,
        lambda _: {"README.md": card},
        overwrite=overwrite,
        device=setup.device,
        verify=verify,
    )
    return out


def write_merge(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    out: Path,
    extra_files: Callable[[Recipe], Mapping[str, str]],
    *,
    check_sources: bool = False,
    hashed: Collection[str] = (),
    overwrite: bool = False,
    device: str = "cpu",
    max_shard_bytes: int = SHARD_BYTES,
    threads: int | None = None,
    verify: Callable[[Path], None] = lambda _: None,
    meter: Meter | None = None,
) -> None:
    """Merge and write; the same arithmetic and, on the same kind of device, the same bits as in a worker.

    Args:
        extra_files: makes the files beside model and recipe, of the recipe with all hashes.
        check_sources: whether the models are looked through for NaN while they are merged, and compared with
            the hashes that the recipe has; False where that was done before.
        hashed: of which of them the hash is wanted.
    """
    import torch

    return_large_blocks()
    recipe_of = {name: checkpoints[name] for name in recipe.models}
    opened = open_sources(recipe_of, recipe)
    layout = output_layout(recipe, recipe_of, opened)
    names = [planned.name for planned in layout]
    files = [file for checkpoint in recipe_of.values() for file in checkpoint.files]
    to_hash = recipe_of if check_sources else {}
    with SourceHashes(to_hash, names, hashed, threads or len(os.sched_getaffinity(0))) as hashes:
        _with_hashes(recipe, to_hash, hashes.known())
        place, count = usable_device(device), threads or torch.get_num_threads()

        def merger() -> Merger:
            return Merger(
                opened.tensors,
                device=place,
                identity={} if check_sources else _identity(recipe),
                names=opened.names,
                statistics=opened.statistics,
                dtypes=opened.dtypes(recipe.donor),
                read_as=opened.read_as,
                keep_prepared=False,
            )

        fold = fold_of(recipe, recipe_of[recipe.donor].config)
        sizes = {planned.name: math.prod(planned.shape) for planned in layout}
        # One tensor at a time keeps an accelerator busy.
        at_once = MOST_AT_ONCE if place == "cpu" else 1
        stream = merge_side_by_side(merger, recipe, sizes, threads=count, most_at_once=at_once)

        def merged() -> Iterator[tuple[str, Tensor]]:
            unread = 0
            for planned in layout:
                hashes.merging(planned.name)
                try:
                    name, tensor = next(stream)
                except Exception as error:
                    # NaN in a source is the better explanation; of a decomposition that failed the only one.
                    hashes.check() if isinstance(error, UserError) else hashes.finish()
                    raise
                yield name, tensor if fold is None else fold(name, tensor)
                unread += planned.nbytes
                if unread >= DROP_BYTES:
                    drop_mapped_pages(files)
                    unread = 0

        def extra() -> dict[str, str | bytes]:
            known = _with_hashes(recipe, to_hash, hashes.finish())
            return {"recipe.yaml": known.to_yaml(), **opened.files, **extra_files(known)}

        with contextlib.closing(stream):
            write_checkpoint(
                merged(),
                checkpoints[recipe.donor],
                out,
                layout=layout,
                max_shard_bytes=max_shard_bytes,
                extra_files=extra,
                config_changes=opened.config,
                without=opened.without,
                dtype=recipe.dtype,
                finite=True,
                overwrite=overwrite,
                verify=verify,
                meter=meter,
            )


def _identity(recipe: Recipe) -> dict[str, str]:
    """The bytes of the models that are merged; of a placebo there are none that have a hash."""
    return {name: ref.sha256 or ref.path for name, ref in recipe.models.items() if ref.random_delta is None}


def _to_hash(recipe: Recipe, every: bool) -> tuple[str, ...]:
    """Models whose content must be known: to be recorded, or compared with what the recipe or statistics say."""
    return tuple(name for name, ref in recipe.models.items() if every or ref.sha256 or ref.statistics)


def _with_hashes(recipe: Recipe, checkpoints: Mapping[str, Checkpoint], prints: Mapping[str, Fingerprint]) -> Recipe:
    """The recipe as it goes with the model: relative paths start at the file that has them, so they are absolute.

    Raises:
        RecipeError: a model is not the one that the recipe wants, or statistics are not those of the model.
    """
    models = {
        name: ref.model_copy(update={"path": str(checkpoints[name].folder)}) if name in checkpoints else ref
        for name, ref in recipe.models.items()
    }
    for name, found in prints.items():
        wanted, folder = recipe.models[name].sha256, checkpoints[name].folder
        if wanted is not None and wanted != found.sha256:
            raise RecipeError(
                f"models.{name}.sha256: {folder} has the weights {found.sha256[:12]}, the recipe wants "
                f"{wanted[:12]}; point it at the model it was made from, or leave sha256 out"
            )
        if (statistics := models[name].statistics) is not None:
            open_statistics(Path(statistics), model=name, model_sha256=found.sha256)
        models[name] = models[name].model_copy(update={"sha256": found.sha256})
    return recipe.model_copy(update={"models": models})
