"""The models of a merge as tensors with the same names and shapes, whatever their files hold.

The one place where a checkpoint becomes something that is merged, for workers, export and one-shot merges.
Everything that models differ in is known from headers (`view_models`) before anything is read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.checkpoints.compatibility import check_compatible, view_of
from search.checkpoints.fp8 import FP8
from search.checkpoints.heads import agree_on_heads
from search.checkpoints.reading import Checkpoint, open_checkpoint
from search.checkpoints.tensor_bytes import TORCH_NAMES
from search.checkpoints.view import Spec, View, require_model
from search.errors import CheckpointError
from search.layers import LayerStack, check_layers, read_names, stack_sources, stacks_of
from search.merge.sources import TensorSource
from search.merge.statistics import KINDS, Statistics, kinds_needed, open_statistics
from search.recipe import ModelRef, Recipe
from search.vocabulary.merge import with_vocabulary

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class OpenedSources:
    """Models that can be merged, and what the output is beside its tensors.

    Attributes:
        tensors: model name -> its tensors.
        names: the tensors of the output, in order; None for those of the donor.
        config: keys of the donor's `config.json` that the output has other values for; None takes a key out.
        files: files of the output that replace the donor's, such as those of a tokenizer.
        without: files of the donor that the output must not have.
        statistics: model name -> its statistics, where it has some.
        specs: model name -> tensor -> shape, and the dtype of an output that takes after it.
        read_as: tensor of the output -> the name under which `tensors` have it, for paths.
        read_as_other: tensors that some model gives in another dtype than an output that takes after it has (fp8).
    """

    tensors: Mapping[str, TensorSource]
    names: tuple[str, ...] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    statistics: Mapping[str, TensorSource] = field(default_factory=dict)
    specs: Mapping[str, Mapping[str, Spec]] = field(default_factory=dict)
    read_as_other: frozenset[str] = frozenset()
    read_as: Mapping[str, str] = field(default_factory=dict)

    def dtypes(self, model: str) -> dict[str, torch.dtype]:
        """The dtypes of outputs that take after tensors of `model` which are read in another dtype (fp8)."""
        import torch

        return {
            name: getattr(torch, TORCH_NAMES[spec.dtype])
            for name, spec in self.specs[model].items()
            if name in self.read_as_other
        }


@dataclass(frozen=True)
class Viewed:
    """Models as a merge sees them, from headers alone.

    Attributes:
        views: model name -> view; all have the same names and shapes, but for layers that the recipe chooses.
        files, without: as in `OpenedSources`.
    """

    views: Mapping[str, View]
    files: Mapping[str, bytes] = field(default_factory=dict)
    without: tuple[str, ...] = ()


def open_models(models: Mapping[str, ModelRef], *, base: str | None, folder: Path = Path()) -> dict[str, Checkpoint]:
    """The folders of models, each adapter with the model that it is applied to.

    Args:
        base: the model that adapters are applied to which name none.
        folder: relative paths start here.

    Raises:
        CheckpointError: a model that is not there or is damaged; an adapter without a base.
    """
    found = {name: open_reference(ref, folder) for name, ref in models.items()}
    for name, checkpoint in found.items():
        if checkpoint.kind == "adapter":
            under = models[name].adapts or base
            if under is None or under == name:
                raise CheckpointError(
                    f"model '{name}': {checkpoint.folder} is a LoRA adapter; name the model that it was trained on "
                    f"as `base`, or under models.{name}.adapts"
                )
            require_model(found[under], "the base of another adapter")
            found[name] = replace(checkpoint, base=found[under])
    return found


def open_reference(ref: ModelRef, folder: Path = Path()) -> Checkpoint:
    """The checkpoint that a recipe or plan names."""
    local = (folder / Path(ref.path).expanduser()).resolve()
    if local.exists() or ref.path.startswith((".", "/", "~")):
        return open_checkpoint(local, ref.revision)
    return open_checkpoint(ref.path, ref.revision)


def check_models(checkpoints: Mapping[str, Checkpoint], recipe: Recipe) -> None:
    """Refuse models that the recipe cannot merge, and rules that do not fit them, before anything is read.

    Raises:
        UserError: the first fault.
    """
    donor = checkpoints[recipe.donor]
    require_model(donor, "the first model of a merge without a base")
    if recipe.layers is not None:
        views = view_models(checkpoints, recipe).views
        check_layers(views, recipe, stacks_of(views, recipe))
        return
    for name, checkpoint in checkpoints.items():
        if name != recipe.donor:
            try:
                check_compatible(donor, {name: checkpoint}, any_vocabulary=recipe.vocabulary is not None)
            except CheckpointError as error:
                first, *others = str(error).splitlines()
                raise CheckpointError(f"{first} (and in more tensors)" if others else first) from error
    recipe.assign(view_models(checkpoints, recipe).views[recipe.donor].tensors)


def view_models(
    checkpoints: Mapping[str, Checkpoint], recipe: Recipe | None = None, *, donor: str | None = None
) -> Viewed:
    """Every model as the others are, from headers alone; layers excepted.

    Args:
        checkpoints: model name -> its folder, opened.
        recipe: what it says about the vocabulary is carried out; None where there is none.
        donor: the base, or else the model that gives the config; by default the recipe's, or the first.

    Raises:
        CheckpointError, RecipeError: models that cannot be made equal; one line.
    """
    donor = donor or (recipe.donor if recipe is not None else next(iter(checkpoints)))
    views: Mapping[str, View] = {name: view_of(one, checkpoints[donor]) for name, one in checkpoints.items()}
    views = agree_on_heads(views, donor).views
    if recipe is None or recipe.vocabulary is None:
        return Viewed(views)
    merged = with_vocabulary(recipe.vocabulary, views, donor, recipe.compute)
    return Viewed(merged.views, merged.files, merged.without)


def open_sources(
    checkpoints: Mapping[str, Checkpoint],
    recipe: Recipe | None = None,
    models: Mapping[str, ModelRef] | None = None,
    *,
    donor: str | None = None,
) -> OpenedSources:
    """Every model's tensors, mapped.

    Args:
        checkpoints: model name -> its folder, opened.
        recipe: what it says about layers, vocabulary and statistics is carried out; None where there is none.
        models: where the statistics are, without a recipe.
        donor: the base, without a recipe; by default the first model.
    """
    donor = donor or (recipe.donor if recipe is not None else next(iter(checkpoints)))
    viewed = view_models(checkpoints, recipe, donor=donor)
    views = viewed.views
    tensors: Mapping[str, TensorSource] = {name: view.open() for name, view in views.items()}
    if recipe is not None and any(ref.random_delta is not None for ref in recipe.models.values()):
        from search.merge.random_deltas import Kept, with_random_deltas  # needs torch

        tensors = with_random_deltas(tensors, recipe.models, recipe.base, Kept(0))
    opened = OpenedSources(
        tensors,
        config=changes(checkpoints[donor].config, views[donor].config),
        files={**viewed.files, **_chat_template(recipe)},
        without=viewed.without,
        specs={name: view.tensors for name, view in views.items()},
        read_as_other=frozenset(_in_fp8(checkpoints[donor])),
    )
    if recipe is None or recipe.layers is None:
        return replace(opened, statistics=_open_statistics(recipe.models if recipe else models or {}, recipe))
    stacks = stacks_of(views, recipe)
    stacked = stack_sources(views, tensors, recipe)
    reads = {name: read_names(stack, name, recipe) for name, stack in stacks.items()}
    opened = replace(
        opened,
        names=stacked.names,
        config={**opened.config, **stacked.config},
        specs={n: {o: views[n].tensors[t] for o, t in read.items()} for n, read in reads.items()},
        read_as_other=frozenset(o for n, r in reads.items() for o, t in r.items() if t in _in_fp8(checkpoints[n])),
    )
    if recipe.scales is not None:  # a layer that is read twice is merged under its own name both times
        own = {ours: theirs for read in reads.values() for ours, theirs in read.items()}
        return replace(opened, read_as=own, statistics=_open_statistics(recipe.models, recipe))
    statistics: dict[str, TensorSource] = {}
    for name, found in _open_statistics(recipe.models, recipe).items():
        parts = {f"{kind}/{ours}": f"{kind}/{theirs}" for kind in KINDS for ours, theirs in reads[name].items()}
        statistics[name] = LayerStack(found, {ours: part for ours, part in parts.items() if part in found.names})
    return replace(opened, tensors=stacked.sources, statistics=statistics)


def merged_dtype(base: Checkpoint) -> str | None:
    """The dtype of candidates whose live model can have only one, as torch calls it, where the base has several or
    fp8: that of most of its numbers. None where it has one that a merge keeps."""
    counts: Counter[str] = Counter()
    for spec in view_of(base).tensors.values():
        if spec.floating:
            counts[spec.dtype] += math.prod(spec.shape)
    if len(counts) < 2 and not _in_fp8(base):
        return None
    return TORCH_NAMES[max(counts, key=lambda dtype: (counts[dtype], dtype))]


def _in_fp8(checkpoint: Checkpoint) -> set[str]:
    return {name for name, info in checkpoint.tensors.items() if info.dtype in FP8}


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that have other values afterwards; None for those that are gone."""
    changed = {key: value for key, value in after.items() if key not in before or before[key] != value}
    return changed | {key: None for key in before if key not in after}


def _open_statistics(models: Mapping[str, ModelRef], recipe: Recipe | None) -> dict[str, Statistics]:
    needed = kinds_needed(recipe) if recipe is not None else {}
    return {
        name: open_statistics(Path(ref.statistics), model=name, model_sha256=ref.sha256, kinds=needed.get(name, ()))
        for name, ref in models.items()
        if ref.statistics is not None
    }


def _chat_template(recipe: Recipe | None) -> dict[str, bytes]:
    template = None if recipe is None else recipe.chat_template
    return {} if template is None else {"chat_template.jinja": template.encode()}
