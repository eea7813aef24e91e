"""The genes of a merge: parameters of an operator, for every group of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from search.config import GeneRange, SpaceConfig
from search.genome import Gene
from search.grouping import Group, group_tensors, positions
from search.merge.operator import Parameter
from search.operator_ranges import (
    Chosen,
    SpaceError,
    check_parameter_names,
    checked_operator,
    chosen_operator,
    union_of_searched,
    widest_range,
)
from search.recipe import Rule, Value

INCLUDED = "included"
"""Name of the genes that say whether a source takes part."""

ALL_GROUPS = "all"
"""What stands before the `/` in the names of genes that every group shares."""


@dataclass(frozen=True)
class ParameterGenes:
    """The part of a genome that says how every group of tensors is merged.

    Genes that all groups share come first (which sources take part), then those of every group: its operator, its
    sources, and what its operators search: parameter by parameter, source by source. A parameter that several operators
    have is one gene. What the chosen operator does not have, and the parameters of sources that take no part, leave no
    trace in a recipe, so that equal merges have equal hashes.

    Attributes:
        genes: the searched numbers, in the order of a genome.
        groups: the tensors that share genes.
        chosen: the operators; a group uses one of them.
        sources: source names, in the order of the config.
        searched: what their operators search.
        subset: whether it is searched which sources take part, for the whole model (True) or for every group.
    """

    genes: tuple[Gene, ...]
    groups: tuple[Group, ...]
    chosen: tuple[Chosen, ...]
    sources: tuple[str, ...]
    searched: tuple[Parameter, ...]
    subset: Literal[False, True, "group"] = False

    @property
    def operators(self) -> tuple[str, ...]:
        """Names of the operators, in the order of the config."""
        return tuple(operator.name for operator in self.chosen)

    @property
    def fixed_structure(self) -> bool:
        """Whether all recipes have the same operators, sources and parameters, and differ in values only."""
        return len(self.chosen) == 1 and not self.subset

    def rules(self, values: Iterator[Value]) -> tuple[Rule, ...]:
        """The rules in which the searched parameters have these values, in the order of the genes; takes as many values
        as there are genes."""
        members = self._members(values) if self.subset is True else self.sources
        by_name = {operator.name: operator for operator in self.chosen}
        rules = []
        for group in self.groups:
            operator = by_name[str(next(values))] if len(self.chosen) > 1 else self.chosen[0]
            if self.subset == "group":
                members = self._members(values)
            found: dict[str, dict[str | None, Value]] = {
                parameter.name: {source: next(values) for source in self._scope(parameter)}
                for parameter in self.searched
            }
            rules.append(self._rule(group, operator, members, found))
        return tuple(rules)

    def _members(self, values: Iterator[Value]) -> tuple[str, ...]:
        taken = [bool(next(values)) for _ in self.sources]
        return tuple(source for source, takes in zip(self.sources, taken, strict=True) if takes)

    def _scope(self, parameter: Parameter) -> tuple[str | None, ...]:
        return self.sources if parameter.scope == "source" else (None,)

    def _rule(
        self,
        group: Group,
        operator: Chosen,
        members: tuple[str, ...],
        found: Mapping[str, Mapping[str | None, Value]],
    ) -> Rule:
        # Rules are valid by construction, and there may be hundreds for every candidate.
        if not members:
            base: dict[str, dict[str, Value]] = {"base": {"weight": 1.0}}
            return Rule.model_construct(tensors=group.tensors, operator="linear", sources=base, parameters={})
        sources: dict[str, dict[str, Value]] = {source: dict(operator.fixed_source) for source in members}
        shared = dict(operator.fixed_shared)
        for parameter in operator.searched:
            for source in members if parameter.scope == "source" else (None,):
                value = found[parameter.name][source]
                if len(self.chosen) > 1:
                    value = operator.own(parameter.name, value)
                (shared if source is None else sources[source])[parameter.name] = value
        return Rule.model_construct(tensors=group.tensors, operator=operator.name, sources=sources, parameters=shared)

    def suggest(self, weights: Mapping[str, float], operator: str | None = None) -> tuple[float, ...] | None:
        """The coordinates that give every source this weight everywhere, all else at its initial value.

        None where weights by source are not searched. Weights beyond the bounds are clipped.

        Args:
            operator: what to merge with, where it is one of several; else the first that has weights.
        """
        known = operator in self.operators and len(self.chosen) > 1
        if not known:
            operator = next((chosen.name for chosen in self.chosen if chosen.has_weights), None)
        if operator is None:
            return None
        coordinates = []
        for gene in self.genes:
            _, _, tail = gene.name.partition("/")
            source, _, parameter = tail.partition(".")
            value = gene.initial
            if parameter == "weight" and source in weights:
                value = weights[source]
            elif gene.kind == "choice":
                value = gene.choices.index(operator)
            coordinates.append(gene.coordinate(value))
        return tuple(coordinates)


def make_parameter_genes(
    config: SpaceConfig, tensors: Iterable[str], sources: Iterable[str], *, may_be_none: bool = False
) -> ParameterGenes:
    """The genes of a config.

    Args:
        config: the `space` section.
        tensors: tensor names of the base.
        sources: names of the sources, in order.
        may_be_none: whether there is something else to search.

    Raises:
        SpaceError: see `make_space`.
    """
    source_names = tuple(sources)
    operators = {
        name: checked_operator(config, index, len(source_names)) for index, name in enumerate(config.operators)
    }
    check_parameter_names(config, operators)
    chosen = tuple(chosen_operator(config, name, operator, operators) for name, operator in operators.items())
    searched = union_of_searched(chosen)
    if not searched and len(chosen) == 1 and not config.subset and not may_be_none:
        raise SpaceError(("parameters",), f"nothing to search: every parameter of '{chosen[0].name}' is fixed")
    groups = group_tensors(tensors, config.layers_per_group, config.split, config.patterns)
    unused = [name for name in config.patterns if name not in {group.name for group in groups}]
    if unused:
        raise SpaceError(("patterns", unused[0]), f"no tensor name matches {config.patterns[unused[0]]!r}")
    where = positions(groups)
    genes: list[Gene] = []
    if config.subset is True:
        genes += (_included(ALL_GROUPS, source, 0) for source in source_names)
    for group in groups:
        at = where[group.name]
        if len(chosen) > 1:
            names = tuple(operator.name for operator in chosen)
            genes.append(Gene(f"{group.name}/operator", 0, len(names) - 1, 0, "choice", None, names, at))
        if config.subset == "group":
            genes += (_included(group.name, source, at) for source in source_names)
        genes += (
            _gene(group, source, parameter, widest_range(parameter.name, chosen), at)
            for parameter in searched
            for source in (source_names if parameter.scope == "source" else (None,))
        )
    return ParameterGenes(tuple(genes), groups, chosen, source_names, searched, config.subset)


def _included(group: str, source: str, position: int) -> Gene:
    # The search starts with all sources, in the middle of the half of the range that means so.
    return Gene(f"{group}/{source}.{INCLUDED}", 0, 1, 0.75, "bool", position=position)


def _gene(group: Group, source: str | None, parameter: Parameter, bounds: GeneRange, position: int) -> Gene:
    middle = (bounds.low + bounds.high) / 2
    name = f"{group.name}/{source}.{parameter.name}" if source else f"{group.name}/{parameter.name}"
    initial = middle if bounds.initial is None else bounds.initial
    return Gene(name, bounds.low, bounds.high, initial, parameter.kind, parameter.step, position=position)
