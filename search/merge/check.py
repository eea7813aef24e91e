"""Recipes against operators, before any tensor is read: parameters, sources, base, dtype.

Nothing here imports torch, so that `meiosis plan` answers at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from search.errors import RecipeError, UserError, nearest
from search.merge.operator import Operator, Parameter
from search.recipe import Recipe, Rule, Value
from search.registry import OPERATORS

DTYPES = ("float32", "bfloat16", "float16", "float64")
"""What a merged tensor may be stored in."""


@dataclass(frozen=True)
class BoundRule:
    """A rule whose parameters are checked and complete.

    Attributes:
        name: registered name of the operator.
        sources: model names in the operator's order.
        base: the base, None for operators that do not need one.
        per_source: parameter name -> value, one mapping per source.
        shared: parameter name -> value.
        seed: the recipe's, None for operators that draw nothing.
        compute, input_dtype: as in the recipe.
    """

    name: str
    operator: Operator
    sources: tuple[str, ...]
    base: str | None
    per_source: tuple[Mapping[str, Any], ...]
    shared: Mapping[str, Any]
    seed: int | None
    compute: Literal["float32", "inputs"] = "float32"
    input_dtype: str | None = None

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that is read, the base last."""
        return self.sources if self.base is None else (*self.sources, self.base)

    @property
    def fingerprint(self) -> tuple[object, ...]:
        """Equal for two rules exactly when they make the same tensors from the same models."""
        values = tuple(tuple(sorted(values.items())) for values in (*self.per_source, self.shared))
        return (self.name, self.sources, self.base, values, self.seed, self.compute, self.input_dtype)


def check_recipe(recipe: Recipe) -> None:
    """Raise `RecipeError` for the first thing that an operator or this version cannot carry out.

    Unknown operator or parameter (with the nearest name), value of the wrong kind or out of bounds,
    missing value, values that do not go together, too few or too many sources, a base that is needed and
    absent, a base that is also a source where task vectors are taken, a dtype that is no floating point type.
    """
    bind_rules(recipe)


def bind_rules(recipe: Recipe) -> tuple[BoundRule, ...]:
    """The rules of a recipe in order, checked; see `check_recipe` for what is refused."""
    check_common(recipe)
    return tuple(bind_rule(recipe, index) for index in range(len(recipe.rules)))


def check_common(recipe: Recipe) -> None:
    """What concerns a recipe as a whole: names of models, dtypes."""
    recipe.check()
    for key, dtype in (("dtype", recipe.dtype), ("input_dtype", recipe.input_dtype)):
        if dtype is not None and dtype not in DTYPES:
            raise RecipeError(f"{key}: '{dtype}' is not one of {', '.join(DTYPES)}{_hint(dtype)}")


def _hint(dtype: str) -> str:
    hint = nearest(dtype, DTYPES)
    return hint if "did you mean" in hint else ""


def bind_rule(recipe: Recipe, index: int) -> BoundRule:
    """One rule of a recipe, checked; which tensors it is for plays no part."""
    rule, where = recipe.rules[index], f"rules[{index}]"
    try:
        operator = OPERATORS.get(rule.operator)
    except UserError as error:
        raise RecipeError(f"{where}.operator: {error}") from error
    if not isinstance(operator, Operator):
        raise RecipeError(f"{where}.operator: '{rule.operator}' is not an instance of search.merge.operator.Operator")
    sources = tuple(rule.sources)
    _check_sources(recipe, rule, operator, where)
    known = {parameter.name: parameter for parameter in operator.parameters}
    for name in rule.parameters:
        _known(known, name, rule.operator, f"{where}.parameters")
    per_source = []
    for source, values in rule.sources.items():
        place = f"{where}.sources.{source}"
        for name in values:
            if _known(known, name, rule.operator, place).scope == "shared":
                raise RecipeError(f"{place}.{name}: is shared by all sources; write it under {where}.parameters")
        # A value under `parameters` serves every source that does not give its own.
        common = {name: value for name, value in rule.parameters.items() if known[name].scope == "source"}
        given = {**common, **values}
        per_source.append(_complete(_scope(known.values(), "source"), given, rule.operator, place))
    given_shared = {name: value for name, value in rule.parameters.items() if known[name].scope == "shared"}
    shared = _complete(_scope(known.values(), "shared"), given_shared, rule.operator, f"{where}.parameters")
    if (fault := operator.check(dict(zip(sources, per_source, strict=True)), shared)) is not None:
        raise RecipeError(f"{where}: operator '{rule.operator}': {fault}")
    uses_base = operator.uses_base(shared)
    _check_base(recipe, rule, uses_base, where)
    return BoundRule(
        name=rule.operator,
        operator=operator,
        sources=sources,
        base=recipe.base if uses_base else None,
        per_source=tuple(per_source),
        shared=shared,
        seed=recipe.seed if operator.draws else None,
        compute=recipe.compute,
        input_dtype=recipe.input_dtype,
    )


def _check_sources(recipe: Recipe, rule: Rule, operator: Operator, where: str) -> None:
    count, least, most = len(rule.sources), operator.min_sources, operator.max_sources
    if count < least or (most is not None and count > most):
        wanted = f"exactly {least}" if most == least else f"at least {least}" if count < least else f"at most {most}"
        raise RecipeError(f"{where}.sources: operator '{rule.operator}' takes {wanted}, found {count}")
    if operator.statistics is not None:
        for source in rule.sources:
            if recipe.models[source].statistics is None:
                raise RecipeError(
                    f"models.{source}: operator '{rule.operator}' needs its {operator.statistics} statistics; make "
                    "them with `meiosis statistics` and name the file under `statistics`"
                )


def _check_base(recipe: Recipe, rule: Rule, uses_base: bool, where: str) -> None:
    if uses_base and recipe.base is None:
        raise RecipeError(
            f"{where}: operator '{rule.operator}' takes differences from a base; name one of the models under `base`"
        )
    if uses_base and recipe.base in rule.sources:
        raise RecipeError(
            f"{where}.sources: '{recipe.base}' is the base, whose difference from itself is nothing to "
            f"operator '{rule.operator}'; leave it out"
        )


def _known(known: Mapping[str, Parameter], name: str, operator: str, where: str) -> Parameter:
    if name not in known:
        raise RecipeError(f"{where}.{name}: operator '{operator}' has no such parameter{nearest(name, known)}")
    return known[name]


def _scope(parameters: Iterable[Parameter], scope: str) -> list[Parameter]:
    return [parameter for parameter in parameters if parameter.scope == scope]


def _complete(parameters: list[Parameter], given: Mapping[str, Value], operator: str, where: str) -> dict[str, Value]:
    """Every parameter with a value, given or default, in the declared kind."""
    values: dict[str, Value] = {}
    for parameter in parameters:
        value = given.get(parameter.name, parameter.default)
        if value is None:
            raise RecipeError(f"{where}: operator '{operator}' needs a value for '{parameter.name}' ({parameter.help})")
        values[parameter.name] = _checked(parameter, value, f"{where}.{parameter.name}")
    return values


def _checked(parameter: Parameter, value: Value, where: str) -> Value:
    match parameter.kind:
        case "bool":
            fits = isinstance(value, bool)
        case "int":
            fits = isinstance(value, int) and not isinstance(value, bool)
        case "float":
            fits = isinstance(value, int | float) and not isinstance(value, bool)
    if not fits:
        wanted = {"bool": "true or false", "int": "a whole number", "float": "a number"}[parameter.kind]
        raise RecipeError(f"{where}: found {value!r}, expected {wanted}")
    if isinstance(value, bool | str):
        return value
    number = float(value) if parameter.kind == "float" else value
    if not math.isfinite(number):
        raise RecipeError(f"{where}: found {value!r}, expected a finite number")
    below = parameter.low is not None and number < parameter.low
    if below or (parameter.high is not None and number > parameter.high):
        low = "-infinity" if parameter.low is None else f"{parameter.low:g}"
        high = "infinity" if parameter.high is None else f"{parameter.high:g}"
        raise RecipeError(f"{where}: found {value!r}, expected a value from {low} to {high}")
    return number
