"""The operators of a space: what a config fixes of their parameters, and where it searches the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from search.config import GeneRange, SpaceConfig
from search.errors import UserError, nearest
from search.genome import Gene
from search.merge.operator import Operator, Parameter
from search.recipe import Value
from search.registry import OPERATORS


class SpaceError(UserError):
    """A space that its operator or its models do not allow; `key` is the key below `space`."""

    def __init__(self, key: tuple[str | int, ...], message: str) -> None:
        super().__init__(message)
        self.key = key


@dataclass(frozen=True)
class Chosen:
    """An operator of a space, and what the space says of its parameters.

    Attributes:
        name: registered name.
        fixed_source, fixed_shared: parameters that are not searched, of every source and of the group.
        ranges: parameter that is searched -> where its values lie.
    """

    name: str
    fixed_source: Mapping[str, Value]
    fixed_shared: Mapping[str, Value]
    ranges: Mapping[str, GeneRange]

    @property
    def searched(self) -> tuple[Parameter, ...]:
        """The searched parameters, in the order of the operator."""
        return tuple(parameter for parameter in OPERATORS.get(self.name).parameters if parameter.name in self.ranges)

    @property
    def has_weights(self) -> bool:
        """Whether a weight of every source is searched."""
        return any(parameter.name == "weight" and parameter.scope == "source" for parameter in self.searched)

    def own(self, parameter: str, value: Value) -> Value:
        """The value of a gene that several operators share, as this one takes it: within its own bounds, by its own
        step."""
        bounds, steps = self.ranges[parameter], {p.name: (p.kind, p.step) for p in self.searched}
        kind, step = steps[parameter]
        gene = Gene(parameter, bounds.low, bounds.high, bounds.low, kind, step)
        if kind == "float" and step is None and bounds.low <= float(value) <= bounds.high:
            return value
        return gene.value(gene.coordinate(float(value)))


def checked_operator(config: SpaceConfig, index: int, sources: int) -> Operator:
    """An operator of the config's list, which must be able to merge so many sources."""
    name = config.operators[index]
    key = ("operator",) if isinstance(config.operator, str) else ("operator", index)
    try:
        operator = OPERATORS.get(name)
    except UserError as error:
        raise SpaceError(key, str(error)) from error
    _check_source_count(operator, name, sources, key)
    if config.subset and operator.min_sources > 1:
        raise SpaceError(
            ("subset",),
            f"operator '{name}' takes no fewer than {operator.min_sources} sources, a subset can have one; search "
            "another operator, or leave subset out",
        )
    return operator


def check_parameter_names(config: SpaceConfig, operators: Mapping[str, Operator]) -> None:
    """Raise `SpaceError` for a parameter in the config that none of the operators has."""
    known = {parameter.name for operator in operators.values() for parameter in operator.parameters}
    for name in config.parameters:
        if name not in known:
            asked = ", ".join(f"'{operator}'" for operator in operators)
            none = f"operator {asked} has no" if len(operators) == 1 else f"none of the operators {asked} has a"
            raise SpaceError(("parameters", name), f"{none} parameter '{name}'{nearest(name, known)}")


def chosen_operator(config: SpaceConfig, name: str, operator: Operator, all_: Mapping[str, Operator]) -> Chosen:
    """What a config says of an operator; `all_` are the operators that it stands beside."""
    fixed: dict[str, dict[str, Value]] = {"source": {}, "shared": {}}
    ranges: dict[str, GeneRange] = {}
    recommended = {p.name for other in all_.values() for p in other.parameters if p.search is not None}
    for parameter in operator.parameters:
        asked = config.parameters.get(parameter.name)
        if isinstance(asked, GeneRange):
            # Operators of a list that only accept a parameter, or seldom need it searched, leave it to the others.
            if parameter.search is None and parameter.name in recommended:
                continue
            _check_bounds(parameter, asked)
            ranges[parameter.name] = asked
        elif asked is not None:
            fixed[parameter.scope][parameter.name] = _fixed_value(parameter, asked)
        elif parameter.search is not None:
            low, high, initial = parameter.search
            ranges[parameter.name] = GeneRange(low=low, high=high, initial=initial)
    return Chosen(name, fixed["source"], fixed["shared"], ranges)


def union_of_searched(chosen: tuple[Chosen, ...]) -> tuple[Parameter, ...]:
    """What the operators search, each parameter once, in the order in which they name it."""
    found: dict[str, Parameter] = {}
    first: dict[str, str] = {}
    for operator in chosen:
        for parameter in operator.searched:
            known = found.setdefault(parameter.name, parameter)
            other = first.setdefault(parameter.name, operator.name)
            if (known.scope, known.kind) != (parameter.scope, parameter.kind):
                raise SpaceError(
                    ("operator",),
                    f"'{other}' and '{operator.name}' mean something else by '{parameter.name}', so they cannot share "
                    "its gene; leave one of them out",
                )
    return tuple(found.values())


def widest_range(parameter: str, chosen: tuple[Chosen, ...]) -> GeneRange:
    """Bounds that hold those of all operators; the start of the first."""
    found = [operator.ranges[parameter] for operator in chosen if parameter in operator.ranges]
    low, high = min(bounds.low for bounds in found), max(bounds.high for bounds in found)
    return found[0].model_copy(update={"low": low, "high": high})


def _check_source_count(operator: Operator, name: str, count: int, key: tuple[str | int, ...]) -> None:
    if count < operator.min_sources or (operator.max_sources is not None and count > operator.max_sources):
        most = operator.max_sources
        wanted = f"exactly {most}" if most == operator.min_sources else f"at least {operator.min_sources}"
        raise SpaceError(key, f"operator '{name}' takes {wanted} sources, the config has {count}")


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
