"""The space: named genes over groups of tensors, and the way from a genome to a recipe."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from search.config import GeneRange, SpaceConfig
from search.errors import UserError, nearest
from search.genome import Gene, Genome
from search.grouping import Group, group_tensors
from search.merge.operator import Operator, Parameter
from search.recipe import ModelRef, Recipe, Rule, Value
from search.registry import OPERATORS


class SpaceError(UserError):
    """A space that its operator or its models do not allow; `key` is the key below `space`."""

    def __init__(self, key: tuple[str, ...], message: str) -> None:
        super().__init__(message)
        self.key = key


@dataclass(frozen=True)
class Space:
    """All recipes that a search can make.

    Attributes:
        genes: the searched numbers, in the order of a genome.
        groups: the tensors that share genes.
        operator: name of the operator that every group uses.
        sources: source names, in the order of the config.
        fixed: parameters that are not searched.
        models: what the recipes call their models.
        seed: seed that recipes carry, for operators that draw masks.
        dtype: dtype that recipes carry.
    """

    genes: tuple[Gene, ...]
    groups: tuple[Group, ...]
    operator: str
    sources: tuple[str, ...]
    fixed: Mapping[str, Value]
    searched: tuple[Parameter, ...]
    models: Mapping[str, ModelRef]
    seed: int
    dtype: str | None

    def decode(self, genome: Genome) -> Recipe:
        """The recipe of a genome.

        Raises:
            ValueError: a genome of another length.
        """
        return self._recipe_with(self._values(genome))

    def recipe_hash(self, genome: Genome) -> str:
        """`decode(genome).hash`, in a fraction of the time: the driver needs it for every candidate.

        Raises:
            ValueError: a genome of another length.
        """
        values, (first, *rest) = self._values(genome), self._text_between_values
        text = [first]
        for gene, piece in rest:
            value = values[gene]
            text += repr(value) if type(value) is float else json.dumps(value), piece
        return hashlib.sha256("".join(text).encode()).hexdigest()

    @cached_property
    def _text_between_values(self) -> tuple[Any, ...]:
        """What `Recipe.hash` covers, cut at the searched values: the text before the first of them, then for each the
        number of its gene and the text that follows."""
        marks = [f"\0{number}\0" for number in range(len(self.genes))]
        first, *rest = re.split(r'"\\u0000(\d+)\\u0000"', self._recipe_with(marks).hashed_text)
        return first, *((int(gene), piece) for gene, piece in zip(rest[::2], rest[1::2], strict=True))

    def _values(self, genome: Genome) -> list[Value]:
        if len(genome.coordinates) != len(self.genes):
            raise ValueError(f"genome has {len(genome.coordinates)} genes, this space has {len(self.genes)}")
        return [gene.value(x) for gene, x in zip(self.genes, genome.coordinates, strict=True)]

    def _recipe_with(self, searched: Iterable[Value]) -> Recipe:
        """The recipe in which the searched parameters have these values, in the order of the genes."""
        values = iter(searched)
        operator = OPERATORS.get(self.operator)
        fixed_source = {
            p.name: self.fixed[p.name] for p in operator.parameters if p.scope == "source" and p.name in self.fixed
        }
        fixed_shared = {
            p.name: self.fixed[p.name] for p in operator.parameters if p.scope == "shared" and p.name in self.fixed
        }
        rules = []
        for group in self.groups:
            sources: dict[str, dict[str, Value]] = {source: dict(fixed_source) for source in self.sources}
            shared = dict(fixed_shared)
            # The order of genes in `make_space`: parameter by parameter, source by source.
            for parameter in self.searched:
                if parameter.scope == "shared":
                    shared[parameter.name] = next(values)
                else:
                    for source in self.sources:
                        sources[source][parameter.name] = next(values)
            # Valid by construction, and there may be hundreds for every candidate.
            rules.append(
                Rule.model_construct(tensors=group.tensors, operator=self.operator, sources=sources, parameters=shared)
            )
        return self.recipe(tuple(rules))

    def recipe(self, rules: tuple[Rule, ...]) -> Recipe:
        """A recipe of this space's models with other rules, as the baselines make them."""
        return Recipe(base="base", models=dict(self.models), rules=rules, dtype=self.dtype, seed=self.seed)

    def initial(self) -> Genome:
        """Where the search starts when nothing better is known."""
        return Genome(tuple(gene.coordinate(gene.initial) for gene in self.genes))

    def suggest(self, weights: Mapping[str, float]) -> Genome | None:
        """The genome that gives every source this weight everywhere, all else at its initial value.

        None where the space does not search weights by source. Weights beyond the bounds are clipped.
        """
        if not any(p.name == "weight" and p.scope == "source" for p in self.searched):
            return None
        coordinates = []
        for gene in self.genes:
            _, _, tail = gene.name.partition("/")
            source, _, parameter = tail.partition(".")
            known = parameter == "weight" and source in weights
            coordinates.append(gene.coordinate(weights[source] if known else gene.initial))
        return Genome(tuple(coordinates))


def make_space(
    config: SpaceConfig,
    *,
    tensors: Iterable[str],
    models: Mapping[str, ModelRef],
    sources: Iterable[str],
    seed: int = 0,
    dtype: str | None = None,
) -> Space:
    """Build the space of a config.

    Args:
        config: the `space` section.
        tensors: tensor names of the base.
        models: `base` and the sources.
        sources: names of the sources, in order.

    Raises:
        SpaceError: unknown operator or parameter, bounds beyond those of the operator, the wrong number
            of sources, or nothing left to search.
    """
    try:
        operator = OPERATORS.get(config.operator)
    except UserError as error:
        raise SpaceError(("operator",), str(error)) from error
    source_names = tuple(sources)
    _check_source_count(operator, config.operator, len(source_names))
    known = {parameter.name: parameter for parameter in operator.parameters}
    for name in config.parameters:
        if name not in known:
            raise SpaceError(
                ("parameters", name),
                f"operator '{config.operator}' has no parameter '{name}'{nearest(name, known)}",
            )
    fixed: dict[str, Value] = {}
    ranges: dict[str, GeneRange] = {}
    for parameter in operator.parameters:
        asked = config.parameters.get(parameter.name)
        if isinstance(asked, GeneRange):
            _check_bounds(parameter, asked)
            ranges[parameter.name] = asked
        elif asked is not None:
            fixed[parameter.name] = _fixed_value(parameter, asked)
        elif parameter.search is not None:
            low, high, initial = parameter.search
            ranges[parameter.name] = GeneRange(low=low, high=high, initial=initial)
    if not ranges:
        raise SpaceError(("parameters",), f"nothing to search: every parameter of '{config.operator}' is fixed")
    groups = group_tensors(tensors, config.layers_per_group, config.split, config.patterns)
    unused = [name for name in config.patterns if name not in {group.name for group in groups}]
    if unused:
        raise SpaceError(("patterns", unused[0]), f"no tensor name matches {config.patterns[unused[0]]!r}")
    searched = tuple(parameter for parameter in operator.parameters if parameter.name in ranges)
    genes = tuple(
        _gene(group, source, parameter, ranges[parameter.name])
        for group in groups
        for parameter in searched
        for source in (source_names if parameter.scope == "source" else (None,))
    )
    return Space(genes, groups, config.operator, source_names, fixed, searched, dict(models), seed, dtype)


def _gene(group: Group, source: str | None, parameter: Parameter, bounds: GeneRange) -> Gene:
    middle = (bounds.low + bounds.high) / 2
    name = f"{group.name}/{source}.{parameter.name}" if source else f"{group.name}/{parameter.name}"
    initial = middle if bounds.initial is None else bounds.initial
    return Gene(name, bounds.low, bounds.high, initial, parameter.kind, parameter.step)


def _check_source_count(operator: Operator, name: str, count: int) -> None:
    if count < operator.min_sources or (operator.max_sources is not None and count > operator.max_sources):
        most = operator.max_sources
        wanted = f"exactly {most}" if most == operator.min_sources else f"at least {operator.min_sources}"
        raise SpaceError(("operator",), f"operator '{name}' takes {wanted} sources, the config has {count}")


def _check_bounds(parameter: Parameter, bounds: GeneRange) -> None:
    too_low = parameter.low is not None and bounds.low < parameter.low
    too_high = parameter.high is not None and bounds.high > parameter.high
    if too_low or too_high:
        low = "-inf" if parameter.low is None else f"{parameter.low:g}"
        high = "inf" if parameter.high is None else f"{parameter.high:g}"
        raise SpaceError(
            ("parameters", parameter.name),
            f"bounds [{bounds.low:g}, {bounds.high:g}] go beyond what '{parameter.name}' can be: [{low}, {high}]",
        )


def _fixed_value(parameter: Parameter, value: bool | int | float) -> Value:
    key = ("parameters", parameter.name)
    if parameter.kind == "bool":
        if not isinstance(value, bool):
            raise SpaceError(key, f"'{parameter.name}' must be true or false, found {value!r}")
        return value
    if isinstance(value, bool):
        raise SpaceError(key, f"'{parameter.name}' must be a number, found {value!r}")
    if (parameter.low is not None and value < parameter.low) or (parameter.high is not None and value > parameter.high):
        raise SpaceError(key, f"'{parameter.name}' cannot be {value:g}")
    if parameter.kind == "int" and value != int(value):
        raise SpaceError(key, f"'{parameter.name}' must be a whole number, found {value!r}")
    return int(value) if parameter.kind == "int" else float(value)
