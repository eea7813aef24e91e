"""Parameters of a merge file: scalars, gradients over layers, and values for tensors whose names match."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from search.errors import nearest
from search.mergekit.methods import Method
from search.recipe import Value
from search.yaml_source import Location, YamlSource


@dataclass(frozen=True)
class Choice:
    """A value, or a gradient of values over the layers, for tensors whose names have `text` in them (None: all)."""

    text: str | None
    values: tuple[Value, ...]
    is_list: bool

    def at(self, t: float) -> Value:
        """The value at t between 0 (first layer) and 1 (last): gradients of numbers interpolate."""
        if not self.is_list:
            return self.values[0]
        x = t * (len(self.values) - 1)
        low = int(x)
        if any(isinstance(value, bool | str) for value in self.values):
            return self.values[low]
        high, share = min(low + 1, len(self.values) - 1), x - low
        return (1 - share) * float(self.values[low]) + share * float(self.values[high])


@dataclass(frozen=True)
class Setting:
    """All that one scope says of one parameter."""

    choices: tuple[Choice, ...]
    location: Location

    def at(self, tensor: str, t: float) -> Value | None:
        """The value for a tensor at t; None where no filter matches its name."""
        for choice in self.choices:
            if choice.text is None or choice.text in tensor:
                return choice.at(t)
        return None


Scope = Mapping[str, Setting]


@dataclass(frozen=True)
class Found:
    """A value, and where it stands."""

    value: Value
    location: Location


def look_up(name: str, scopes: Iterable[Scope], tensor: str, t: float) -> Found | None:
    """The value in the first scope that has one for this tensor."""
    for scope in scopes:
        setting = scope.get(name)
        if setting is not None and (value := setting.at(tensor, t)) is not None:
            return Found(value, setting.location)
    return None


class Reading:
    """Reads the scopes of one file, and collects faults and notes with their lines."""

    def __init__(self, source: YamlSource, method: Method) -> None:
        self._source, self._method = source, method
        self.faults: list[str] = []
        self.notes: list[str] = []
        self._missing: set[tuple[str, str]] = set()

    def fault(self, location: Location, message: str) -> None:
        self.faults.append(self._source.fault(location, message))

    def missing(self, location: Location, parameter: str, model: str, message: str) -> None:
        """A fault of one parameter of one model, told once however many tensors it concerns."""
        if (parameter, model) not in self._missing:
            self._missing.add((parameter, model))
            self.fault(location, message)

    def note(self, location: Location, message: str) -> None:
        line = self._source.fault(location, message)
        if line not in self.notes:
            self.notes.append(line)

    def scope(self, parameters: Mapping[str, Any] | None, location: Location, *, of_model: bool) -> Scope:
        """The settings of one `parameters` section.

        Args:
            location: of the section.
            of_model: whether it belongs to one model, where parameters that all models share have no effect.
        """
        found: dict[str, Setting] = {}
        known = self._method.kinds
        for name, value in (parameters or {}).items():
            place = (*location, name)
            if name not in known:
                if name in self._method.elsewhere:
                    self.note(place, f"has no effect: '{self._method.name}' has no such parameter in mergekit")
                else:
                    self.fault(place, f"method '{self._method.name}' has no such parameter{nearest(name, known)}")
            elif of_model and name not in self._method.of_models:
                self.fault(
                    place, "is shared by all models, so that it has no effect here; put it under the global parameters"
                )
            elif (choices := self._choices(value, known[name], place)) is not None:
                found[name] = Setting(choices, place)
        return found

    def _choices(self, value: Any, kind: str, place: Location) -> tuple[Choice, ...] | None:
        """The choices of a setting; None for one that says nothing, or was found faulty."""
        if isinstance(value, dict):
            choice = self._conditional(value, kind, place)
            return None if choice is None else (choice,)
        if isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
            choices = [self._conditional(entry, kind, (*place, index)) for index, entry in enumerate(value)]
            return None if any(choice is None for choice in choices) else tuple(c for c in choices if c is not None)
        choice = self._values(None, value, kind, place)
        return None if choice is None else (choice,)

    def _conditional(self, entry: Any, kind: str, place: Location) -> Choice | None:
        if not isinstance(entry, dict):
            self.fault(place, f"{entry!r} stands among filtered values; write it as {{value: {entry!r}}}")
            return None
        for key in entry:
            if key not in ("filter", "value"):
                self.fault((*place, key), f"unknown key{nearest(str(key), ('filter', 'value'))}")
                return None
        text = entry.get("filter")
        if "value" not in entry or not isinstance(text, str | None):
            self.fault(place, "expected 'value', and with it 'filter' with a part of tensor names")
            return None
        return self._values(None if text == "*" else text, entry["value"], kind, (*place, "value"))

    def _values(self, text: str | None, value: Any, kind: str, place: Location) -> Choice | None:
        entries = value if isinstance(value, list) else [value]
        if not entries:
            return None  # as mergekit has it, an empty list says nothing
        values: list[Value] = []
        for index, entry in enumerate(entries):
            converted = _convert(entry, kind)
            if converted is None:
                what = {"bool": "true or false", "int": "a whole number", "float": "a number"}[kind]
                self.fault((*place, index) if isinstance(value, list) else place, f"must be {what}, found {entry!r}")
                return None
            values.append(converted)
        return Choice(text, tuple(values), isinstance(value, list))


def _convert(value: Any, kind: str) -> Value | None:
    """A scalar as its parameter wants it (YAML reads 1e-5 as text); None if it does not fit."""
    if kind == "bool":
        return bool(value) if isinstance(value, bool | int) and value in (0, 1) else None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    if kind == "int":
        return int(number) if math.isfinite(number) and number == int(number) else None
    return number


def scopes_of(*scopes: Scope | None) -> Sequence[Scope]:
    """The scopes that there are, the innermost first."""
    return [scope for scope in scopes if scope]
