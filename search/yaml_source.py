"""YAML files whose faults can be reported by line: where a key stands, which names were possible."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from search.errors import ConfigError, nearest

Location = tuple[str | int, ...]


class YamlSource:
    """One parsed YAML document that remembers where every key stands.

    Args:
        text: the document.
        name: how messages call it, usually its path.

    Raises:
        ConfigError: not YAML, not a mapping, or a key that stands twice.
    """

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        try:
            self._root = yaml.compose(text, Loader=yaml.SafeLoader)
            self.data: Any = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{name}{_mark(error)}: not valid YAML: {_problem(error)}") from error
        if not isinstance(self.data, dict) or not isinstance(self._root, yaml.MappingNode):
            found = "nothing: the file is empty" if self.data is None else type(self.data).__name__
            raise ConfigError(f"{name}: expected a mapping of keys at the top, found {found}")
        faults = list(self._repeated(self._root, ()))
        if faults:
            raise ConfigError("\n".join(faults))

    @classmethod
    def read(cls, path: Path) -> YamlSource:
        """The document in a file; a missing or unreadable file is a `ConfigError`."""
        try:
            return cls(path.read_text(encoding="utf-8"), str(path))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file") from None
        except IsADirectoryError:
            raise ConfigError(f"{path}: is a folder, expected a YAML file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from error

    def override(self, key: str, value: Any) -> None:
        """Set `a.b.c` to a value, as `--set` does, making the mappings on the way."""
        *parents, last = key.split(".")
        here = self.data
        for part in parents:
            if here.get(part) is None:
                here[part] = {}
            here = here[part]
            if not isinstance(here, dict):
                raise ConfigError(f"--set {key}: '{part}' is not a mapping")
        here[last] = value

    def fault(self, location: Location, message: str) -> str:
        """`file:line:column: key.path: message`."""
        mark = self._mark(location)
        where = ".".join(str(part) for part in location)
        return f"{self.name}{mark}: {where + ': ' if where else ''}{message}"

    def faults(self, error: ValidationError, model: type[BaseModel], prefix: Location = ()) -> list[str]:
        """One line for every fault that pydantic found in data validated against `model`."""
        found: dict[Location, list[Mapping[str, Any]]] = {}
        for item in error.errors(include_url=False):
            location = self._existing(prefix, item["loc"], item["type"] == "missing")
            found.setdefault(location, []).append(item)
        lines = []
        for location, items in found.items():
            below = any(len(other) > len(location) and other[: len(location)] == location for other in found)
            if below and all(item["type"] == "too_short" for item in items):
                continue  # counted without what is wrong in it
            kinds = [_KINDS.get(item["type"].partition("_")[0]) for item in items]
            if len(items) > 1 and all(kinds):  # one value that may be several things
                *others, last = dict.fromkeys(map(str, kinds))
                expected = f"{', '.join(others)} or {last}" if others else last
                lines.append(self.fault(location, f"must be {expected}, found {_shown(items[0].get('input'))}"))
            else:
                lines += [self.fault(location, _message(item, model)) for item in items]
        return list(dict.fromkeys(lines))

    def _existing(self, prefix: Location, loc: Sequence[str | int], missing: bool) -> Location:
        """`prefix + loc` without the parts that pydantic adds for unions and that no key has.

        With `missing`, the last part is the key that should be there.
        """
        here: Any = self.data
        for part in prefix:
            here = _child(here, part)
        kept: list[str | int] = [*prefix]
        for index, part in enumerate(loc):
            child = _child(here, part)
            if child is _NOTHING and not (missing and index == len(loc) - 1):
                continue
            kept.append(part)
            here = child
        return tuple(kept)

    def _mark(self, location: Location) -> str:
        node: yaml.Node | None = self._root
        mark = node.start_mark if node is not None else None
        for part in location:
            found = None
            if isinstance(node, yaml.MappingNode):
                found = next(((k, v) for k, v in node.value if k.value == str(part)), None)
                if found:
                    mark, node = found[0].start_mark, found[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                mark = node.start_mark
                found = (node, node)
            if not found:
                break
        return f":{mark.line + 1}:{mark.column + 1}" if mark is not None else ""

    def _repeated(self, node: yaml.Node, location: Location, above: Set[int] = frozenset()) -> Iterable[str]:
        if id(node) in above:
            yield f"{self.name}: {'.'.join(map(str, location))}: an alias that contains itself"
            return
        above = {*above, id(node)}
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                here = (*location, str(key.value))
                if key.value in seen:
                    mark = key.start_mark
                    yield f"{self.name}:{mark.line + 1}:{mark.column + 1}: {'.'.join(map(str, here))}: stands twice"
                seen.add(key.value)
                yield from self._repeated(value, here, above)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                yield from self._repeated(value, (*location, index), above)


_NOTHING: Any = object()


def _child(here: Any, part: str | int) -> Any:
    if isinstance(here, dict):
        return here.get(part, _NOTHING)
    if isinstance(here, list) and isinstance(part, int) and part < len(here):
        return here[part]
    return _NOTHING


def _problem(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or error).replace("\n", " ")


def _mark(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f":{mark.line + 1}:{mark.column + 1}" if mark is not None else ""


def _message(item: Mapping[str, Any], model: type[BaseModel]) -> str:
    """A fault in the words of a person who writes YAML."""
    kind, value = item["type"], item.get("input")
    context = item.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key{nearest(str(item['loc'][-1]), _fields_at(model, item['loc'][:-1]))}"
    if kind == "missing":
        return "missing; this key must be given"
    if kind == "too_short":
        return "is empty; expected at least 1 item"
    if kind == "literal_error":
        return f"{value!r} is not possible; expected {context['expected']}"
    if kind == "value_error":
        return str(context.get("error", item["msg"]))
    shown = _shown(value)
    if kind in ("model_type", "dict_type"):
        return f"must be a mapping of keys, found {shown}"
    text = item["msg"].removeprefix("Input ").replace("should", "must", 1)
    return f"{text[0].lower() + text[1:]}, found {shown}"


_KINDS = {"bool": "true, false", "int": "a whole number", "float": "a number", "string": "text"}
"""First word of what pydantic calls a fault of type -> what would be right."""


def _shown(value: Any) -> str:
    shown = "nothing" if value is None else repr(value)
    return shown if len(shown) < 60 else shown[:57] + "..."


def _fields_at(model: type[BaseModel], loc: Sequence[str | int]) -> set[str]:
    """Names of the keys that are possible where `loc` leads."""
    current: list[Any] = [model]
    for part in loc:
        following: list[Any] = []
        for annotation in current:
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                field = annotation.model_fields.get(str(part))
                if field is not None:
                    following += _alternatives(field.annotation)
                elif annotation.__name__ == part:
                    following.append(annotation)
            elif typing.get_origin(annotation) in (dict, list, tuple):
                arguments = [a for a in typing.get_args(annotation) if a is not Ellipsis]
                if arguments:
                    following += _alternatives(arguments[-1])
        # Parts that pydantic adds for unions name no field: stay where we are.
        current = following or current
    return {
        name
        for annotation in current
        if isinstance(annotation, type) and issubclass(annotation, BaseModel)
        for name in annotation.model_fields
    }


def _alternatives(annotation: Any) -> list[Any]:
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return [a for argument in typing.get_args(annotation) for a in _alternatives(argument)]
    if origin is typing.Annotated:
        return _alternatives(typing.get_args(annotation)[0])
    return [annotation]
