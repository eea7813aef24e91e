"""The genes of a merge: parameters of an operator, for every group of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from search.config import GeneRange, SpaceConfig
from search.errors import UserError, nearest
from search.genome import Gene
from search.grouping import Group, group_tensors
from search.merge.operator import Operator, Parameter
from search.recipe import Rule, Value
from search.registry import OPERATORS


class SpaceError(UserError):
    """A space that its operator or its models do not allow; `key` is the key below `space`."""

    def __init__(self, key: tuple[str | int, ...], message: str) -> None:
        super().__init__(message)
        self.key = key


@dataclass(frozen=True)
class ParameterGenes:
    """The part of a genome that says how every group of tensors is merged.

    Attributes:
        genes: the searched numbers, in the order of a genome.
        groups: the tensors that share genes.
        operator: name of the operator that every group uses.
        sources: source names, in the order of the config.
        fixed: parameters that are not searched.
        searched: the others.
    """

    genes: tuple[Gene, ...]
    groups: tuple[Group, ...]
    operator: str
    sources: tuple[str, ...]
    fixed: Mapping[str, Value]
    searched: tuple[Parameter, ...]

    def rules(self, values: Iterator[Value]) -> tuple[Rule, ...]:
        """The rules in which the searched parameters have these values, in the order of the genes; takes as many values
        as there are genes."""
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
            # The order of genes in `make_parameter_genes`: parameter by parameter, source by source.
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
        return tuple(rules)

    def suggest(self, weights: Mapping[str, float]) -> tuple[float, ...] | None:
        """The coordinates that give every source this weight everywhere, all else at its initial value.

        None where weights by source are not searched. Weights beyond the bounds are clipped.
        """
        if not any(p.name == "weight" and p.scope == "source" for p in self.searched):
            return None
        coordinates = []
        for gene in self.genes:
            _, _, tail = gene.name.partition("/")
            source, _, parameter = tail.partition(".")
            known = parameter == "weight" and source in weights
            coordinates.append(gene.coordinate(weights[source] if known else gene.initial))
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
    if not ranges and not may_be_none:
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
    return ParameterGenes(genes, groups, config.operator, source_names, fixed, searched)


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
