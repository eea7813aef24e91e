"""Recipes as merge files of mergekit, where it can express them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from search.errors import RecipeError
from search.grouping import LAYER, place_of
from search.layers import output_names, read_names, stacks_of
from search.merge.check import BoundRule, bind_rules
from search.mergekit.dtypes import dtype_keys
from search.mergekit.filters import as_setting
from search.mergekit.methods import METHODS, TASK_VECTORS, Method
from search.mergekit.models import reference_to
from search.mergekit.vocabulary import tokenizer_keys
from search.recipe import Recipe, Value
from search.sources import open_models, view_models


@dataclass(frozen=True)
class Segment:
    """Neighbouring layers of the output, or the whole model, that one slice of a merge file can make.

    Attributes:
        sources: models in the order of the operator, the base not among them where it is one for task vectors.
        base: the base of the slice.
        first: model -> first layer that is read; empty for a whole model.
        depth: number of layers.
        tensors: output name -> model -> name there.
    """

    sources: tuple[str, ...]
    base: str | None
    first: Mapping[str, int]
    depth: int
    tensors: Mapping[str, Mapping[str, str]]


def write_merge_file(recipe: Recipe, folder: Path = Path(), report: Callable[[str], None] = lambda _: None) -> str:
    """A recipe as the YAML of mergekit 0.1.5, which merges to the same tensors.

    Filters and slices go by tensor names and layers, so the headers of the models are read.

    Args:
        folder: relative model paths start here; those of the result are absolute.
        report: called with a line for what the file leaves out although mergekit would merge it.

    Raises:
        RecipeError: what mergekit cannot express, one line per reason.
        UserError: recipe and models do not fit.
    """
    reasons = [
        f"model '{name}' is a placebo (random_delta), which no folder has"
        for name, ref in recipe.models.items()
        if ref.random_delta is not None
    ]
    if any(scale != 1.0 for scale in recipe.scales or ()):
        reasons.append("it has no scales between layers; `meiosis merge` folds those of a recipe into the weights")
    bound = bind_rules(recipe)
    method = _method(bound, reasons)
    if method is None or reasons:
        raise RecipeError(_told(reasons))
    checkpoints = open_models(recipe.models, base=recipe.base, folder=folder)
    views = view_models(checkpoints, recipe).views
    if recipe.layers is None:
        names = tuple(views[recipe.donor].tensors)
        reads = {model: dict(zip(names, names, strict=True)) for model in recipe.models}
    else:
        stacks = stacks_of(views, recipe)
        names = output_names(stacks, recipe)
        reads = {model: read_names(stack, model, recipe) for model, stack in stacks.items()}
    position = {id(rule): index for index, rule in enumerate(recipe.rules)}
    rules = {name: bound[position[id(rule)]] for name, rule in recipe.assign(names).items()}
    segments = _segments(recipe, rules, method, reads, reasons)
    data: dict[str, Any] = {"merge_method": method.name}
    base = _common_base(segments)
    if base is not None:
        data["base_model"] = reference_to(recipe, base, folder)
    data |= _body(recipe, method, segments, rules, folder, base, reasons)
    dtypes = {
        name: {model: views[model].tensors[reads[model][name]].dtype for model in rule.models}
        for name, rule in rules.items()
    }
    kept = {name: dtypes[name].get(recipe.donor, next(iter(dtypes[name].values()))) for name in rules}
    if recipe.layers is None:
        kept = {name: views[recipe.donor].tensors[name].dtype for name in rules}
    data |= dtype_keys(recipe, method, dtypes, kept, reasons)
    if recipe.vocabulary is not None and recipe.base is not None and base != recipe.base:
        merged = all(recipe.base in segment.sources for segment in segments)
        if method.base == "a source" and merged:
            data = {"merge_method": method.name, "base_model": reference_to(recipe, recipe.base, folder), **data}
        else:
            reasons.append(f"the vocabulary goes by the base, which '{method.name}' does not merge here; it would then")
    data |= tokenizer_keys(recipe, folder)
    if recipe.chat_template is not None:
        data["chat_template"] = recipe.chat_template
    if reasons:
        raise RecipeError(_told(reasons))
    if any(rule.operator.draws for rule in rules.values()):
        report(
            f"seed {recipe.seed}: mergekit draws other masks for '{method.name}', so its merge is another sample of "
            "the same distribution"
        )
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True)


def _told(reasons: list[str]) -> str:
    return "\n".join(f"mergekit cannot express this: {reason}" for reason in dict.fromkeys(reasons))


def _method(bound: tuple[BoundRule, ...], reasons: list[str]) -> Method | None:
    """The one method of all rules, with parameters that it has."""
    names = list(dict.fromkeys(rule.name for rule in bound))
    for name in names:
        if name not in METHODS:
            reasons.append(f"it has no method '{name}'")
    if len(names) > 1:
        reasons.append(f"a merge file has one method, the recipe has several: {', '.join(names)}")
    if reasons:
        return None
    method = METHODS[names[0]]
    known = {*method.per_model, *method.shared, *method.no_effect, TASK_VECTORS}
    for rule in bound:
        defaults = {parameter.name: parameter.default for parameter in rule.operator.parameters}
        for values in (*rule.per_source, rule.shared):
            for name, value in values.items():
                if name not in known and value != defaults[name]:
                    reasons.append(f"'{method.name}' has no parameter '{name}' there, the recipe sets it to {value}")
    if len({rule.base for rule in bound}) > 1:
        reasons.append(f"some rules of '{method.name}' take differences from a base and others do not")
    return method


def _segments(
    recipe: Recipe,
    rules: Mapping[str, BoundRule],
    method: Method,
    reads: Mapping[str, Mapping[str, str]],
    reasons: list[str],
) -> list[Segment]:
    """The slices of the output, in order, every tensor in one of them."""
    by_layer: dict[int, list[str]] = {}
    outside: list[str] = []
    stacks = {match["stack"] for name in rules if (match := LAYER.match(name))}
    sets = {name: (rule.sources, rule.base) for name, rule in rules.items()}
    if recipe.layers is None and (len(stacks) != 1 or len(set(sets.values())) == 1):
        if len(set(sets.values())) > 1:
            reasons.append("tensors are made of different models, and slices want a model with one stack of layers")
        sources, base = next(iter(sets.values()))
        tensors = {name: {model: reads[model][name] for model in rule.models} for name, rule in rules.items()}
        return [Segment(sources, _base(method, sources, base), {}, 0, tensors)]
    for name in rules:
        match = LAYER.match(name)
        if match and match["stack"] in stacks:
            by_layer.setdefault(int(match["index"]), []).append(name)
        else:
            outside.append(name)
    segments: list[Segment] = []
    for layer, names in sorted(by_layer.items()):
        if len({sets[name] for name in names}) > 1:
            reasons.append(f"the tensors of layer {layer} are not all made of the same models in the same order")
        sources, base = sets[names[0]]
        taking = sources if base is None else (*sources, base)
        first = {model: layer if recipe.layers is None else recipe.layers[layer][model] for model in taking}
        tensors = {
            name: {model: reads[model][name] for model in taking} for name in names if sets[name] == sets[names[0]]
        }
        last = segments[-1] if segments else None
        follows = last is not None and last.first == {model: number - last.depth for model, number in first.items()}
        if last is not None and follows and (last.sources, last.base) == (sources, _base(method, sources, base)):
            segments[-1] = Segment(sources, last.base, last.first, last.depth + 1, {**last.tensors, **tensors})
        else:
            segments.append(Segment(sources, _base(method, sources, base), first, 1, tensors))
    for name in outside:
        index = 0 if place_of(name).kind == "embedding" else -1
        segment, (sources, base) = segments[index], sets[name]
        if (sources, _base(method, sources, base)) != (segment.sources, segment.base):
            where = "first" if index == 0 else "last"
            reasons.append(f"'{name}' is not made of the models of the {where} layers, whose slice it belongs to")
            continue
        more = {**segment.tensors, name: {model: reads[model][name] for model in segment.first}}
        segments[index] = Segment(segment.sources, segment.base, segment.first, segment.depth, more)
    return segments


def _base(method: Method, sources: tuple[str, ...], base: str | None) -> str | None:
    return sources[0] if method.base == "first source" else base


def _common_base(segments: list[Segment]) -> str | None:
    bases = {segment.base for segment in segments}
    return next(iter(bases)) if len(bases) == 1 else None


def _body(
    recipe: Recipe,
    method: Method,
    segments: list[Segment],
    rules: Mapping[str, BoundRule],
    folder: Path,
    base: str | None,
    reasons: list[str],
) -> dict[str, Any]:
    """The models or slices, with the parameters of every scope."""
    whole = not segments[0].first
    parts: list[dict[str, Any]] = []
    shared: list[dict[str, Any]] = []
    for segment in segments:
        entries = []
        models = segment.sources
        if segment.base is not None and segment.base not in models and not whole:
            models = (*models, segment.base)  # in slices mergekit wants it listed
        for model in models:
            entry: dict[str, Any] = {"model": reference_to(recipe, model, folder)}
            if not whole:
                entry["layer_range"] = [segment.first[model], segment.first[model] + segment.depth]
            if model in segment.sources and (parameters := _of_model(method, model, segment, rules)):
                entry["parameters"] = parameters
            entries.append(entry)
        part: dict[str, Any] = {"sources": entries}
        if segment.base is not None and base is None:
            part["base_model"] = reference_to(recipe, segment.base, folder)
        parts.append(part)
        shared.append(_shared(method, segment, rules))
    everywhere = {key: value for key, value in shared[0].items() if all(other.get(key) == value for other in shared)}
    for part, own in zip(parts, shared, strict=True):
        if rest := {key: value for key, value in own.items() if key not in everywhere}:
            part["parameters"] = rest
    body = {"models": parts[0]["sources"]} if whole else {"slices": parts}
    return {**body, **({"parameters": everywhere} if everywhere else {})}


def _of_model(method: Method, model: str, segment: Segment, rules: Mapping[str, BoundRule]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for parameter, default in method.per_model.items():
        values = {
            reads[model]: rules[name].per_source[rules[name].sources.index(model)][parameter]
            for name, reads in segment.tensors.items()
        }
        if default is None or any(value != default for value in values.values()):
            found[parameter] = as_setting(values)
    return found


def _shared(method: Method, segment: Segment, rules: Mapping[str, BoundRule]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for parameter, default in method.shared.items():
        values: dict[str, Value] = {name: rules[name].shared[parameter] for name in segment.tensors}
        if default is None or any(value != default for value in values.values()):
            found[parameter] = as_setting(values)
    return found


class _Dumper(yaml.SafeDumper):
    """Writes short lists of numbers on one line, and no aliases for parts that are equal."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_list(dumper: yaml.SafeDumper, data: list[Any]) -> yaml.Node:
    numbers = all(isinstance(entry, int | float) for entry in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=numbers)


_Dumper.add_representer(list, _represent_list)
