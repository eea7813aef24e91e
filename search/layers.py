"""Models with other layers than their sources: `Recipe.layers`, carried out by renaming tensors.

Layer k of the output is merged from the layers that the recipe names for it; a wrapper shows each of
them to the merge under the output's number, so that operators, masks and depths know nothing of it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from search.checkpoints.header import quoted
from search.errors import CheckpointError, RecipeError
from search.grouping import LAYER
from search.layer_config import LAYER_COUNTS, changed_config
from search.merge.sources import TensorSource
from search.paths.families import family_of
from search.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor


class _Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


class LayeredModel(Protocol):
    """What must be known of a model: a checkpoint, or a view of one."""

    @property
    def folder(self) -> Path: ...
    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def tensors(self) -> Mapping[str, _Shaped]: ...


@dataclass(frozen=True)
class Stack:
    """The layers of a model, by the names of its tensors.

    Attributes:
        prefix: what stands before the number of a layer, such as `model.layers`.
        layers: for every layer, what stands after its number -> name of the tensor.
        before, after: the tensors outside, as they stand around the layers in the order of names.
    """

    prefix: str
    layers: tuple[Mapping[str, str], ...]
    before: tuple[str, ...]
    after: tuple[str, ...]

    def name(self, layer: int, rest: str) -> str:
        """The tensor `rest` of a layer of a model of this kind."""
        return f"{self.prefix}.{layer}.{rest}" if self.prefix else f"{layer}.{rest}"


class Stacked(NamedTuple):
    """Models as the output sees them.

    Attributes:
        sources: model name -> its tensors under the names of the output.
        names: the tensors of the output, in order.
        config: keys of the donor's config that the output has other values for.
    """

    sources: dict[str, TensorSource]
    names: tuple[str, ...]
    config: dict[str, Any]


class LayerStack:
    """A model's tensors under other names (a `TensorSource`)."""

    def __init__(self, source: TensorSource, read: Mapping[str, str]) -> None:
        self._source, self._read = source, dict(read)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._read)

    def get(self, name: str) -> Tensor:
        return self._source.get(self._read[name])


def find_stack(names: Iterable[str], config: Mapping[str, Any], where: object) -> Stack:
    """The one stack of layers that a model has.

    Args:
        names: its tensors, in order.
        config: its `config.json`; decides where several things are numbered.
        where: how messages call the model.

    Raises:
        CheckpointError: no numbered layers, gaps in the numbers, or several stacks (encoder and decoder).
    """
    names = tuple(names)
    stacks: dict[str, dict[int, dict[str, str]]] = {}
    for name in names:
        if match := LAYER.match(name):
            layer = stacks.setdefault(match["stack"], {}).setdefault(int(match["index"]), {})
            layer[match["rest"]] = name
    if not stacks:
        raise CheckpointError(f"{where}: no tensor name numbers a layer, so `layers` cannot choose among them")
    counts = {value for part in _parts(config) for key in LAYER_COUNTS if isinstance(value := part.get(key), int)}
    counted = [prefix for prefix, layers in stacks.items() if len(layers) in counts]
    prefixes = counted if len(counted) == 1 else list(stacks)
    if len(prefixes) > 1:
        raise CheckpointError(
            f"{where}: has {len(prefixes)} stacks of layers ({', '.join(prefixes)}); `layers` can choose in models "
            "with one stack only"
        )
    (prefix,) = prefixes
    layers = stacks[prefix]
    missing = sorted(set(range(len(layers))) - set(layers))
    if missing:
        raise CheckpointError(f"{where}: has no layer {missing[0]} among {prefix}.0 to {prefix}.{max(layers)}")
    inside = {name for layer in layers.values() for name in layer.values()}
    first = next(index for index, name in enumerate(names) if name in inside)
    return Stack(
        prefix,
        tuple(layers[index] for index in range(len(layers))),
        tuple(name for name in names[:first] if name not in inside),
        tuple(name for name in names[first:] if name not in inside),
    )


def output_names(stacks: Mapping[str, Stack], recipe: Recipe) -> tuple[str, ...]:
    """The tensors of the output in order: what surrounds the donor's layers, and between it the layers."""
    assert recipe.layers is not None
    donor = stacks[recipe.donor]
    names = [*donor.before]
    for index, layer in enumerate(recipe.layers):
        model = next(iter(layer))
        names += [donor.name(index, rest) for rest in stacks[model].layers[layer[model]]]
    return (*names, *donor.after)


def read_names(stack: Stack, model: str, recipe: Recipe) -> dict[str, str]:
    """Output name -> own name, for all that the output can read from a model."""
    assert recipe.layers is not None
    read = {name: name for name in (*stack.before, *stack.after)}
    for index, layer in enumerate(recipe.layers):
        if model in layer:
            read |= {stack.name(index, rest): name for rest, name in stack.layers[layer[model]].items()}
    return read


def stack_sources(
    checkpoints: Mapping[str, LayeredModel], sources: Mapping[str, TensorSource], recipe: Recipe
) -> Stacked:
    """The models of a recipe with the layers that it chooses.

    Args:
        checkpoints: model name -> its folder, opened; must have the models of the recipe.
        sources: model name -> its tensors, under the names of its checkpoint.
        recipe: one with `layers`.

    Raises:
        CheckpointError: a model whose layers cannot be told by number.
        RecipeError: a layer that a model does not have, layers that do not fit each other, or a rule that
            merges a model where `layers` reads none of its layers.
    """
    stacks = stacks_of(checkpoints, recipe)
    check_layers(checkpoints, recipe, stacks)
    names = output_names(stacks, recipe)
    wrapped: dict[str, TensorSource] = {
        model: LayerStack(sources[model], read_names(stack, model, recipe)) for model, stack in stacks.items()
    }
    assert recipe.layers is not None
    configs = {model: checkpoints[model].config for model in stacks}
    depths = {model: len(stack.layers) for model, stack in stacks.items()}
    return Stacked(wrapped, names, changed_config(configs, depths, recipe.layers, recipe.donor))


def stacks_of(checkpoints: Mapping[str, LayeredModel], recipe: Recipe) -> dict[str, Stack]:
    """The stack of every model of a recipe; see `find_stack`."""
    return {
        model: find_stack(checkpoints[model].tensors, checkpoints[model].config, checkpoints[model].folder)
        for model in recipe.models
    }


def check_layers(checkpoints: Mapping[str, LayeredModel], recipe: Recipe, stacks: Mapping[str, Stack]) -> None:
    """What `check_compatible` is for merges of whole models: see `stack_sources` for what is refused."""
    assert recipe.layers is not None
    donor, config = stacks[recipe.donor], checkpoints[recipe.donor].config
    if recipe.scales is not None:
        try:
            family_of(config)
        except RecipeError as error:
            raise RecipeError(f"scales: {error}") from error
    for model, stack in stacks.items():
        for key in ("architectures", "model_type"):
            theirs = checkpoints[model].config.get(key)
            if theirs != config.get(key):
                raise CheckpointError(
                    f"{checkpoints[model].folder}: its config.json has {key} {quoted(theirs)}, that of "
                    f"'{recipe.donor}' has {quoted(config.get(key))}; merge models of one architecture"
                )
        if stack.prefix != donor.prefix:
            raise CheckpointError(
                f"{checkpoints[model].folder}: calls its layers {stack.prefix}, {checkpoints[recipe.donor].folder} "
                f"calls them {donor.prefix}; merge models of one architecture"
            )
    for index, layer in enumerate(recipe.layers):
        if not layer:
            raise RecipeError(f"layers[{index}]: names no model; expected model name -> number of the layer")
        for model, number in layer.items():
            if number >= len(stacks[model].layers):
                raise RecipeError(
                    f"layers[{index}].{model}: there is no layer {number}; the model has layers 0 to "
                    f"{len(stacks[model].layers) - 1}"
                )
        if recipe.scales is not None and len(set(layer.values())) > 1:
            raise RecipeError(
                f"layers[{index}]: merges layers {', '.join(map(str, sorted(set(layer.values()))))}; in a recipe with "
                "scales a layer has the same number in all its models, since the layer is merged once, as that layer"
            )
        _check_equal_layers(index, layer, checkpoints, stacks)
    _check_rules(recipe, output_names(stacks, recipe), donor)


def _check_equal_layers(
    index: int, layer: Mapping[str, int], checkpoints: Mapping[str, LayeredModel], stacks: Mapping[str, Stack]
) -> None:
    (first, number), *others = layer.items()
    theirs = stacks[first].layers[number]
    for model, other in others:
        ours = stacks[model].layers[other]
        for rest in [*theirs, *ours]:
            if rest not in ours or rest not in theirs:
                has, lacks = ((first, number), (model, other))[:: 1 if rest in theirs else -1]
                raise RecipeError(
                    f"layers[{index}]: layer {has[1]} of '{has[0]}' has a tensor {quoted(rest)}, layer {lacks[1]} of "
                    f"'{lacks[0]}' has none; merge layers of one kind"
                )
            shapes = [checkpoints[m].tensors[t[rest]].shape for m, t in ((first, theirs), (model, ours))]
            if shapes[0] != shapes[1]:
                raise RecipeError(
                    f"layers[{index}]: {quoted(rest)} has shape {list(shapes[0])} in layer {number} of '{first}' and "
                    f"{list(shapes[1])} in layer {other} of '{model}'; merge layers of one shape"
                )


def _check_rules(recipe: Recipe, names: Collection[str], donor: Stack) -> None:
    from search.merge.check import bind_rules

    assert recipe.layers is not None
    bound = dict(zip(map(id, recipe.rules), bind_rules(recipe), strict=True))
    position = {id(rule): index for index, rule in enumerate(recipe.rules)}
    inside = re.compile(re.escape(donor.prefix) + r"\.?(\d+)\." if donor.prefix else r"(\d+)\.")
    for name, rule in recipe.assign(names).items():
        match = inside.match(name)
        if match is None:
            continue
        layer = recipe.layers[int(match[1])]
        for model in bound[id(rule)].models:
            if model not in layer:
                raise RecipeError(
                    f"layers[{match[1]}]: reads no layer of '{model}', which rules[{position[id(rule)]}] merges "
                    f"into '{name}'; name one, or give the layer a rule of its own"
                )


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A config and the ones inside it."""
    return [config, *(value for value in config.values() if isinstance(value, dict))]
