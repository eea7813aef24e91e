"""Merge files as recipes: `meiosis merge FILE.yml OUT` takes either."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from search.errors import ConfigError, RecipeError, nearest
from search.grouping import LAYER
from search.merge.check import DTYPES, check_recipe
from search.mergekit.chat_template import read_chat_template
from search.mergekit.dtypes import output_dtype
from search.mergekit.merge_file import MergeFile, parse_merge_file
from search.mergekit.methods import METHODS, TASK_VECTORS, Method
from search.mergekit.models import open_models
from search.mergekit.plan import Part, Tensor, parts_of, plan_tensors, references_of
from search.mergekit.settings import Reading, look_up, scopes_of
from search.mergekit.vocabulary import read_vocabulary
from search.recipe import Recipe, Rule, Value
from search.registry import OPERATORS
from search.yaml_source import Location, YamlSource


class _RuleKey(NamedTuple):
    """What two tensors of one rule have in common."""

    sources: tuple[tuple[str, tuple[tuple[str, Value], ...]], ...]
    shared: tuple[tuple[str, Value], ...]


def read_merge_file(source: YamlSource, folder: Path, report: Callable[[str], None] = lambda _: None) -> Recipe:
    """The recipe that makes what mergekit 0.1.5 makes of a merge file.

    Gradients depend on the number of layers and filters on tensor names, so the headers of the models are read.

    Args:
        source: the file.
        folder: where it lies. Relative paths start where the command runs, or else there.
        report: called with a line for everything in the file that has no effect in mergekit.

    Raises:
        ConfigError: every fault, with its line.
        CheckpointError: models whose layers cannot be told apart.
    """
    file = parse_merge_file(source)
    method = _method(file, source)
    reading = Reading(source, method)
    references = references_of(file)
    models = open_models(references, file.base_model, source, folder)
    parts = parts_of(file, models, reading, method)
    _check_base(file, method, parts, reading)
    for key in ("dtype", "out_dtype"):
        dtype = getattr(file, key)
        if dtype is not None and dtype not in DTYPES:
            reading.fault((key,), f"'{dtype}' is not one of {', '.join(DTYPES)}{nearest(dtype, DTYPES)}")
    vocabulary = read_vocabulary(file, models, references, reading)
    template = read_chat_template(file.chat_template, models, reading)
    if reading.faults:
        raise ConfigError("\n".join(dict.fromkeys(reading.faults)))
    plan = plan_tensors(parts, models, source)
    places: dict[_RuleKey, dict[str, Location]] = {}
    grouped: dict[_RuleKey, list[str]] = {}
    for name, tensor in plan.tensors.items():
        made, where = _rule_of(name, tensor, method, reading)
        grouped.setdefault(made, []).append(name)
        places.setdefault(made, where)
    if reading.faults:
        raise ConfigError("\n".join(dict.fromkeys(reading.faults)))
    groups = _largest_last(grouped)
    recipe = Recipe(
        base=models.base,
        models=dict(models.refs),
        rules=tuple(
            Rule(
                tensors=("*",) if index == len(groups) - 1 else _patterns(names, list(plan.tensors)),
                operator=method.name,
                sources={model: dict(values) for model, values in key.sources},
                parameters=dict(key.shared),
            )
            for index, (key, names) in enumerate(groups)
        ),
        dtype=output_dtype(file, method, plan, models, source),
        input_dtype=file.dtype,
        compute="inputs",
        layers=plan.layers,
        vocabulary=vocabulary,
        chat_template=template,
    )
    try:
        check_recipe(recipe)
    except RecipeError as error:
        raise RecipeError(_with_line(str(error), [places[key] for key, _ in groups], source)) from error
    for note in reading.notes:
        report(note)
    return recipe


def _method(file: MergeFile, source: YamlSource) -> Method:
    name = file.merge_method
    if name not in METHODS:
        hint = nearest(name, METHODS)
        if name in OPERATORS.names():
            hint = "; mergekit has no such method, so write a recipe for our operator of that name"
        raise ConfigError(source.fault(("merge_method",), f"mergekit has no method '{name}'{hint}"))
    if name not in OPERATORS.names():
        raise ConfigError(source.fault(("merge_method",), f"there is no operator '{name}' for this method"))
    return METHODS[name]


def _check_base(file: MergeFile, method: Method, parts: list[Part], reading: Reading) -> None:
    bases = dict.fromkeys(part.base for part in parts)
    if method.base == "task vectors" and None in bases:
        reading.fault(("merge_method",), f"'{method.name}' takes differences from a base; name it under base_model")
    if method.base == "first source" and None in bases:
        reading.fault(("merge_method",), f"'{method.name}' goes from base_model (t = 0); name it under base_model")
    if method.base in ("task vectors", "may be"):
        for part in parts:
            if part.base != parts[0].base or (file.base_model is None and part.base is not None):
                where = (*part.location, "base_model")
                reading.fault(where, "task vectors from another base than the file's base_model are not supported")


def _rule_of(name: str, tensor: Tensor, method: Method, reading: Reading) -> tuple[_RuleKey, dict[str, Location]]:
    """What makes one tensor, and where its parameters stand: by the places that `check_recipe` names."""
    part, where = tensor.part, {}
    from_base = method.base in ("task vectors", "may be") and part.base is not None
    models = [model for model in part.sources if not (from_base and model == part.base)]
    if method.base == "first source" and part.base in part.sources:
        models.sort(key=lambda model: model != part.base)
    sources = []
    for model in models:
        values: list[tuple[str, Value]] = []
        scopes = scopes_of(part.sources[model], *part.scopes)
        for parameter, default in method.per_model.items():
            found = look_up(parameter, scopes, tensor.inputs[model], tensor.t)
            if found is not None:
                values.append((parameter, found.value))
                where[f"sources.{model}.{parameter}"] = found.location
            elif default is None:
                reading.missing(
                    part.location,
                    parameter,
                    model,
                    f"method '{method.name}' needs '{parameter}' for every model; '{model}' has none at '{name}'",
                )
        sources.append((model, tuple(values)))
    shared: list[tuple[str, Value]] = []
    for parameter, default in method.shared.items():
        found = look_up(parameter, scopes_of(*part.scopes), name, tensor.t)
        if found is not None:
            shared.append((parameter, found.value))
            where[f"parameters.{parameter}"] = found.location
        elif default is None:
            message = f"method '{method.name}' needs '{parameter}'; there is none at '{name}'"
            reading.missing(("merge_method",), parameter, "", message)
    if method.base == "may be" and from_base:
        shared.append((TASK_VECTORS, True))
    where["sources"] = where[""] = part.location
    return _RuleKey(tuple(sources), tuple(shared)), where


def _largest_last(grouped: Mapping[_RuleKey, list[str]]) -> list[tuple[_RuleKey, list[str]]]:
    """The groups in the order of their first tensors, but that of most tensors last: it will be all the rest."""
    groups = list(grouped.items())
    largest = max(range(len(groups)), key=lambda index: len(groups[index][1]))
    return [*groups[:largest], *groups[largest + 1 :], groups[largest]]


def _patterns(names: list[str], every: list[str]) -> tuple[str, ...]:
    """Tensor names as a rule lists them: a whole layer as one pattern."""
    layers: dict[str, list[str]] = {}
    for name in every:
        if prefix := _layer_prefix(name):
            layers.setdefault(prefix, []).append(name)
    mine = set(names)
    patterns: dict[str, None] = {}
    for name in names:
        prefix = _layer_prefix(name)
        whole = prefix and len(layers[prefix]) > 1 and mine.issuperset(layers[prefix])
        patterns[f"{prefix}*" if whole else name] = None
    return tuple(patterns)


def _layer_prefix(name: str) -> str:
    match = LAYER.match(name)
    return name[: match.start("rest")] if match else ""


def _with_line(message: str, places: list[dict[str, Location]], source: YamlSource) -> str:
    """A fault of the recipe, told where the merge file says it."""
    for index, where in enumerate(places):
        start = f"rules[{index}]"
        if not message.startswith((f"{start}.", f"{start}:")):
            continue
        rest = message[len(start) :].lstrip(".")
        for key in sorted(where, key=len, reverse=True):
            if rest.startswith(key):
                said = message.partition(": ")[2]
                return source.fault(where[key], said or message)
    return source.fault((), message)
