"""The models that a config names: whether they are there, fit each other and can be scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from evaluators.base import Evaluator
from search.checkpoints.compatibility import check_compatible
from search.checkpoints.reading import Checkpoint, open_checkpoint
from search.checkpoints.view import require_model
from search.config import LoadedConfig
from search.errors import CheckpointError
from search.faults import Faults
from search.sources import view_models
from search.yaml_source import Location

BASE = "base"


def model_key(name: str) -> Location:
    """Where a config names a model."""
    return ("models", "base") if name == BASE else ("models", "sources", name)


def open_models(loaded: LoadedConfig, faults: Faults) -> dict[str, Checkpoint]:
    """`base` and the sources, as far as they can be opened."""
    config = loaded.config
    found: dict[str, Checkpoint] = {}
    for name, path in {BASE: config.models.base, **config.models.sources}.items():
        try:
            checkpoint = open_checkpoint(loaded.path(path))
            if name == BASE:
                require_model(checkpoint, "the base of a search")
            found[name] = checkpoint
        except CheckpointError as error:
            faults.add(model_key(name), str(error))
    return {name: replace(one, base=found.get(BASE)) if one.kind == "adapter" else one for name, one in found.items()}


def tensor_names(checkpoints: Mapping[str, Checkpoint]) -> tuple[str, ...]:
    """The tensors of a candidate: those of the base, and a head where only some models tie theirs."""
    try:
        return tuple(view_models(checkpoints, donor=BASE).views[BASE].tensors)
    except CheckpointError:  # will be reported when the sources are compared
        return tuple(checkpoints[BASE].tensors)


def check_sources(checkpoints: Mapping[str, Checkpoint], faults: Faults) -> None:
    """Look for sources that do not fit the base."""
    base = checkpoints[BASE]
    for name, checkpoint in checkpoints.items():
        if name == BASE:
            continue
        try:
            check_compatible(base, {name: checkpoint})
        except CheckpointError as error:
            faults.add(model_key(name), first_difference(error))


def first_difference(error: CheckpointError) -> str:
    """One line about a model that does not fit: one of another width differs in every tensor."""
    first, *others = str(error).splitlines()
    return f"{first} (and in more tensors)" if others else first


def check_architecture(base: Checkpoint, evaluators: Mapping[str, Evaluator], faults: Faults) -> None:
    """Look for evaluators that cannot score such models."""
    for name, evaluator in evaluators.items():
        wanted, found = evaluator.architectures, base.architecture or ""
        if wanted and not found.endswith(wanted):
            faults.add(
                ("evaluators", name, "use"),
                f"needs a model whose architecture ends in {' or '.join(wanted)}; {base.folder} is a "
                f"'{found or 'checkpoint without architectures in config.json'}'",
            )
