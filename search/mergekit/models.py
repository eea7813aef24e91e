"""The models that a merge file names: found, opened, called by short names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.checkpoints.compatibility import view_of
from search.checkpoints.heads import agree_on_heads
from search.checkpoints.reading import Checkpoint, open_checkpoint
from search.checkpoints.view import Spec
from search.errors import CheckpointError, ConfigError
from search.mergekit.merge_file import ModelPath, ModelReference
from search.recipe import ModelRef, Recipe
from search.yaml_source import Location, YamlSource

_RESERVED = ("base", "union", "zero")
"""What a recipe's vocabulary means by these words must not be the name of some model."""


@dataclass(frozen=True)
class Models:
    """The models of one merge file.

    Attributes:
        names: how the file refers to a model -> what the recipe calls it, in the order of the recipe.
        refs: name -> where it is.
        checkpoints: name -> its folder, opened.
        tensors: name -> its tensors as a merge sees them, from headers.
        base: name of the recipe's base.
    """

    names: Mapping[ModelReference, str]
    refs: Mapping[str, ModelRef]
    checkpoints: Mapping[str, Checkpoint]
    tensors: Mapping[str, Mapping[str, Spec]]
    base: str | None

    @property
    def donor(self) -> str:
        """As in the recipe: the base, or else the first model."""
        return self.base if self.base is not None else next(iter(self.refs))


def open_models(
    references: Mapping[ModelReference, Location], base: ModelReference | None, source: YamlSource, folder: Path
) -> Models:
    """Open every model that a file refers to.

    Args:
        references: every model of the file, in order -> where it is named.
        base: the file's `base_model`.
        folder: of the file. Relative paths start where the command runs, as in mergekit, or else here.

    Raises:
        ConfigError: every model that is not there or not whole, with its line.
    """
    faults: list[str] = []
    ordered: dict[ModelReference, Location] = {}
    for reference, location in {**({} if base is None else {base: references[base]}), **references}.items():
        if reference.override_architecture is not None:
            message = "override_architecture is not supported; edit the model's config.json"
            faults.append(source.fault(location, message))
        if reference.lora is not None:
            ordered.setdefault(ModelReference(model=reference.model), location)
        ordered.setdefault(reference, location)
    names = short_names(ordered, base)
    refs: dict[str, ModelRef] = {}
    checkpoints: dict[str, Checkpoint] = {}
    for reference, name in names.items():
        place, location = reference.lora or reference.model, ordered[reference]
        under = None if reference.lora is None else names[ModelReference(model=reference.model)]
        try:
            refs[name] = ModelRef(path=find_place(place, folder), revision=place.revision, adapts=under)
            checkpoints[name] = open_checkpoint(refs[name].path, place.revision)
        except CheckpointError as error:
            faults.append(source.fault(location, str(error)))
    if faults:
        raise ConfigError("\n".join(dict.fromkeys(faults)))
    views = {
        name: view_of(checkpoint, None if (under := refs[name].adapts) is None else checkpoints[under])
        for name, checkpoint in checkpoints.items()
    }
    base_name = None if base is None else names[base]
    views = dict(agree_on_heads(views, base_name or next(iter(views))).views)
    return Models(names, refs, checkpoints, {name: view.tensors for name, view in views.items()}, base_name)


def find_place(place: ModelPath, folder: Path) -> str:
    """The absolute path of a local model, or a hub id as it is."""
    path = Path(place.path).expanduser()
    here, beside = path.absolute(), (folder / path).absolute()
    found = list(dict.fromkeys(p.resolve() for p in (here, beside) if p.is_dir()))
    if len(found) > 1:
        raise CheckpointError(
            f"'{place.path}' could be {found[0]}, from where the command runs (as in mergekit), or {found[1]}, from "
            "where the file is; write the whole path"
        )
    return str(found[0]) if found else place.path


def short_names(references: Iterable[ModelReference], base: ModelReference | None) -> dict[ModelReference, str]:
    """The last part of every path, with as many parts before it as it takes to tell the models apart."""
    references = list(references)
    parts = {r: [p for p in str(r.lora or r.model).split("/") if p not in ("", ".", "..", "~")] for r in references}
    names: dict[ModelReference, str] = {}
    for reference in references:
        mine = parts[reference] or [str(reference)]
        for count in range(1, len(mine) + 1):
            name = "/".join(mine[-count:])
            taken = any("/".join(parts[other][-count:]) == name for other in references if other != reference)
            if not taken and (name not in _RESERVED or (name == "base" and reference == base)):
                break
        else:
            name = str(reference)
        names[reference] = name
    return names


def reference_to(recipe: Recipe, model: str, folder: Path) -> Any:
    """How a merge file refers to a model: `path`, `path@revision`, `path+adapter`, or the parts of these."""
    ref = recipe.models[model]
    own = _place(ref, folder)
    under = None if ref.adapts is None else _place(recipe.models[ref.adapts], folder)
    parts = {"model": own} if under is None else {"model": under, "lora": own}
    if any(mark in place["path"] for place in parts.values() for mark in "+@"):
        return parts
    return "+".join("@".join(place.values()) for place in parts.values())


def _place(ref: ModelRef, folder: Path) -> dict[str, str]:
    local = (folder / Path(ref.path).expanduser()).resolve()
    there = local.exists() or ref.path.startswith((".", "/", "~"))
    revision = {} if ref.revision is None or there else {"revision": ref.revision}
    return {"path": str(local) if there else ref.path, **revision}
