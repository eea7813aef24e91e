"""Which layers and which scopes make every output tensor of a merge file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from search.errors import ConfigError
from search.grouping import place_of
from search.layers import Stack, find_stack
from search.mergekit.merge_file import MergeFile, ModelReference, Module
from search.mergekit.methods import Method
from search.mergekit.models import Models
from search.mergekit.settings import Reading, Scope
from search.yaml_source import Location, YamlSource


@dataclass(frozen=True)
class Part:
    """One slice of the output, or the whole model of the `models` form.

    Attributes:
        sources: model name -> its own parameters, in the order of the file.
        first: model name -> the first layer that is read; None: every layer of the output reads the same layer.
        depth: number of layers; None with `first`.
        base: name of the base here.
        scopes: parameters of the slice, of the module and of the file.
        location: of the slice, for messages.
    """

    sources: Mapping[str, Scope]
    scopes: tuple[Scope, ...]
    base: str | None
    location: Location
    first: Mapping[str, int] | None = None
    depth: int | None = None


@dataclass(frozen=True)
class Tensor:
    """One output tensor: its part of the file, its place between the first layer (0) and the last (1) there, and
    what each model calls it."""

    part: Part
    t: float
    inputs: Mapping[str, str]


@dataclass(frozen=True)
class Plan:
    """Every output tensor, and the layers that the recipe must name, if any."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    layers: tuple[dict[str, int], ...] | None = None


def references_of(file: MergeFile) -> dict[ModelReference, Location]:
    """Every model that a file merges, in order -> where it is named first."""
    found: dict[ModelReference, Location] = {}
    if file.base_model is not None:
        found[file.base_model] = ("base_model",)
    location, module = only_module(file)
    for i, model in enumerate(module.models or ()):
        found.setdefault(model.model, (*location, "models", i))
    for i, part in enumerate(module.slices or ()):
        if part.base_model is not None:
            found.setdefault(part.base_model, (*location, "slices", i, "base_model"))
        for j, entry in enumerate(part.sources):
            found.setdefault(entry.model, (*location, "slices", i, "sources", j))
    return found


def only_module(file: MergeFile) -> tuple[Location, Module]:
    """The models or slices of a file, and below which key they are.

    Raises:
        ConfigError: several modules.
    """
    if not file.modules:
        return (), Module(models=file.models, slices=file.slices)
    if len(file.modules) > 1:
        raise ConfigError(
            f"modules: found {', '.join(file.modules)}; models of several modules, such as a vision tower beside a "
            "language model, cannot be merged by a merge file here; write a recipe with rules by tensor name"
        )
    ((name, module),) = file.modules.items()
    return ("modules", name), module


def parts_of(file: MergeFile, models: Models, reading: Reading, method: Method) -> list[Part]:
    """The slices of the output, with the parameters of every scope checked; faults go to `reading`."""
    location, module = only_module(file)
    outer = (
        reading.scope(module.parameters, (*location, "parameters"), of_model=False) if file.modules else {},
        reading.scope(file.parameters, ("parameters",), of_model=False),
    )
    base = None if file.base_model is None else models.names[file.base_model]
    if module.models:
        sources: dict[str, Scope] = {}
        for i, entry in enumerate(module.models):
            place: Location = (*location, "models", i)
            _add(sources, models.names[entry.model], entry.parameters, place, reading)
        if base is not None and base not in sources:
            sources[base] = {}
        return [Part(sources, outer, base, (*location, "models"))]
    parts = []
    for i, part in enumerate(module.slices or ()):
        at: Location = (*location, "slices", i)
        if part.residual_weight is not None:
            reading.note((*at, "residual_weight"), "has no effect: mergekit reads it and never uses it")
        own = reading.scope(part.parameters, (*at, "parameters"), of_model=False)
        sources, first = {}, {}
        lengths = {high - low for low, high in (entry.layer_range for entry in part.sources)}
        if len(lengths) > 1:
            reading.fault((*at, "sources"), "the layer ranges of one slice must hold equally many layers")
            continue
        for j, source in enumerate(part.sources):
            name = models.names[source.model]
            _add(sources, name, source.parameters, (*at, "sources", j), reading)
            first[name] = source.layer_range[0]
        here = base if part.base_model is None else models.names[part.base_model]
        if method.base in ("task vectors", "may be", "first source") and here is not None and here not in sources:
            reading.fault((*at, "sources"), f"base_model '{here}' must be one of the sources of every slice")
            continue
        parts.append(Part(sources, (own, *outer), here, at, first, lengths.pop()))
    return parts


def _add(
    sources: dict[str, Scope], name: str, parameters: Mapping[str, object] | None, place: Location, reading: Reading
) -> None:
    if name in sources:
        reading.fault((*place, "model"), f"'{name}' stands here already; give every model once")
    sources[name] = reading.scope(parameters, (*place, "parameters"), of_model=True)


def plan_tensors(parts: list[Part], models: Models, source: YamlSource) -> Plan:
    """Every tensor of the output in order.

    Tensors before the layers belong to the first part, those after them to the last, both at t = 0, as
    mergekit has it.

    Raises:
        ConfigError: a layer that a model does not have.
        CheckpointError: slices of a model whose layers cannot be told by number.
    """
    donor = models.tensors[models.donor]
    if parts[0].first is None:
        return Plan(_whole_models(parts[0], list(donor)))
    stacks = {
        name: find_stack(models.tensors[name], models.checkpoints[name].config, models.checkpoints[name].folder)
        for part in parts
        for name in part.sources
    }
    layers: list[dict[str, int]] = []
    faults = []
    for part in parts:
        assert part.first is not None
        assert part.depth is not None
        for name, first in part.first.items():
            depth = len(stacks[name].layers)
            if first + part.depth > depth:
                faults.append(
                    source.fault(
                        (*part.location, "sources"),
                        f"layer_range [{first}, {first + part.depth}] goes beyond the {depth} layers of '{name}'",
                    )
                )
        layers += [{name: first + k for name, first in part.first.items()} for k in range(part.depth)]
    if faults:
        raise ConfigError("\n".join(faults))
    whole = stacks[models.donor] if models.donor in stacks else next(iter(stacks.values()))
    same = all(set(layer.values()) == {index} for index, layer in enumerate(layers))
    same = same and len(layers) == len(whole.layers) and models.donor in stacks
    return Plan(_sliced(parts, stacks, whole), None if same else tuple(layers))


def _whole_models(part: Part, names: list[str]) -> dict[str, Tensor]:
    places = {name: place_of(name) for name in names}
    depths: dict[str, int] = {}
    for place in places.values():
        if place.layer is not None:
            depths[place.stack] = max(depths.get(place.stack, 0), place.layer + 1)
    tensors = {}
    for name, place in places.items():
        t = 0.0 if place.layer is None else _position(place.layer, depths[place.stack])
        tensors[name] = Tensor(part, t, dict.fromkeys(part.sources, name))
    return tensors


def _sliced(parts: list[Part], stacks: Mapping[str, Stack], whole: Stack) -> dict[str, Tensor]:
    outside = {name: parts[0 if place_of(name).kind == "embedding" else -1] for name in (*whole.before, *whole.after)}
    tensors = {name: Tensor(outside[name], 0.0, dict.fromkeys(outside[name].sources, name)) for name in whole.before}
    index = 0
    for part in parts:
        assert part.first is not None
        assert part.depth is not None
        for k in range(part.depth):
            some = next(iter(part.first))
            for rest in stacks[some].layers[part.first[some] + k]:
                inputs = {name: whole.name(first + k, rest) for name, first in part.first.items()}
                tensors[whole.name(index, rest)] = Tensor(part, _position(k, part.depth), inputs)
            index += 1
    return tensors | {
        name: Tensor(outside[name], 0.0, dict.fromkeys(outside[name].sources, name)) for name in whole.after
    }


def _position(layer: int, depth: int) -> float:
    return 1.0 if depth == 1 else layer / (depth - 1)
