"""Plug-ins by name: modules of a package here, entry points of other packages, or `module:Class`.

The same few lines serve evaluators, merge operators, optimisers and baselines. Adding one is adding
one file with a `PLUGIN` (its name is the registered name), or an entry point in another package.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from evaluators.base import Evaluator, EvaluatorSpec
from evaluators.errors import UserError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """All plug-ins of one kind.

    Args:
        noun: what an entry is called in messages.
        package: package whose modules (sub-packages included) each define one `PLUGIN`.
        group: entry point group in which other packages publish theirs.
        fault: how the sentence "<noun> <name> ..." goes on for an object that is no plug-in of this kind; None
            for one that is.
    """

    def __init__(
        self, noun: str, package: str, group: str, fault: Callable[[object], str | None] | None = None
    ) -> None:
        self.noun, self.package, self.group, self._fault = noun, package, group, fault

    @cached_property
    def _modules(self) -> dict[str, str]:
        """Registered name -> module, for the built-in ones; nothing is imported but the packages."""
        found: dict[str, str] = {}
        pending = [self.package]
        while pending:
            package = pending.pop()
            for info in pkgutil.iter_modules(importlib.import_module(package).__path__, package + "."):
                if info.ispkg:
                    pending.append(info.name)
                elif package != self.package or not self._has_families:
                    found[info.name.rpartition(".")[2]] = info.name
        return found

    @cached_property
    def _has_families(self) -> bool:
        """Whether entries live in sub-packages, so that modules at the top are machinery."""
        return any(info.ispkg for info in pkgutil.iter_modules(importlib.import_module(self.package).__path__))

    @cached_property
    def _entry_points(self) -> dict[str, dict[str, EntryPoint]]:
        """Name -> what other packages publish under it, by `module:attribute`: more than one is a conflict."""
        found: dict[str, dict[str, EntryPoint]] = {}
        for point in entry_points(group=self.group):
            found.setdefault(point.name, {})[point.value] = point
        return found

    def names(self) -> list[str]:
        """Every registered name, sorted; nothing is imported."""
        return sorted({*self._modules, *self._entry_points})

    def __iter__(self) -> Iterator[tuple[str, T]]:
        for name in self.names():
            yield name, self.get(name)

    def listing(self) -> Iterator[tuple[str, T | UserError]]:
        """Every name with its plug-in, or with why that cannot be loaded: one that is broken hides no other."""
        for name in self.names():
            try:
                yield name, self.get(name)
            except UserError as error:
                yield name, error

    def get(self, name: str) -> T:
        """The plug-in called `name`, or found at `module:attribute`.

        Raises:
            UserError: no such name, two plug-ins of that name, one that cannot be imported, or something else.
        """
        points = self._entry_points.get(name, {})
        self._refuse_conflict(name, points)
        if name in self._modules:
            try:
                # What else a module of ours raises is our own fault, and keeps its traceback.
                plugin: Any = importlib.import_module(self._modules[name]).PLUGIN
            except ImportError as error:
                raise UserError(f"{self.noun} '{name}' cannot be imported: {error}") from error
        elif points:
            (point,) = points.values()
            plugin = self._load(f"'{name}' ({_published(point)})", point.value)
        elif ":" in name:
            plugin = self._load(f"'{name}'", name)
        else:
            raise UserError(f"unknown {self.noun} '{name}'{nearest(name, self.names())}")
        if self._fault is not None and (fault := self._fault(plugin)):
            raise UserError(f"{self.noun} '{name}' {fault}")
        return cast(T, plugin)

    def _load(self, what: str, reference: str) -> Any:
        """What is at `module:attribute`. Other people's code runs here, so anything may be raised."""
        module, _, attribute = reference.partition(":")
        attribute = attribute.partition("[")[0].strip()  # an entry point may name extras after it
        if not module.strip() or module.startswith(".") or not attribute:
            raise UserError(
                f"{self.noun} {what} cannot be imported: expected module:name with the full name of an "
                f"installed module, such as my_package.my_module:{self.noun.capitalize()}"
            )
        try:
            plugin: Any = importlib.import_module(module.strip())
            for part in attribute.split("."):
                plugin = getattr(plugin, part)
        except ModuleNotFoundError as error:
            raise UserError(
                f"{self.noun} {what} cannot be imported: {_first_line(error)}; is the package that holds it installed?"
            ) from error
        except (Exception, SystemExit) as error:
            raise UserError(
                f"{self.noun} {what} cannot be imported: {type(error).__name__}: {_first_line(error)}"
            ) from error
        return plugin

    def _refuse_conflict(self, name: str, points: Mapping[str, EntryPoint]) -> None:
        """Two of one name: which of them was meant must not depend on what happens to be installed."""
        found = {value: _published(point) for value, point in sorted(points.items())}
        if name in self._modules:
            found = {f"{self._modules[name]}:PLUGIN": "built in", **found}
        if len(found) > 1:
            ways = " or ".join(found)
            raise UserError(
                f"{self.noun} '{name}' is there {len(found)} times: {', '.join(found.values())}; "
                f"uninstall all but one, or say which by its place: {ways}"
            )


def _published(point: EntryPoint) -> str:
    package = point.dist.name if point.dist is not None else "another package"
    return f"{point.value} of {package}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"


def _evaluator_fault(plugin: object) -> str | None:
    if not (isinstance(plugin, type) and issubclass(plugin, Evaluator)):
        return "is not an evaluator: expected a subclass of evaluators.base.Evaluator"
    if missing := sorted(plugin.__abstractmethods__):
        return f"is not complete: it does not define {', '.join(missing)}"
    return None


EVALUATORS: Registry[type[Evaluator]] = Registry(
    "evaluator", "evaluators", "meiosis.evaluators", fault=_evaluator_fault
)


def make_evaluator(spec: EvaluatorSpec, folder: Path | None = None) -> Evaluator:
    """An evaluator with validated options.

    Args:
        spec: which one, and its options.
        folder: where relative paths in the options start, usually the folder of the config; None for
            the working directory.

    Raises:
        UserError: unknown evaluator, or something else under that name.
        pydantic.ValidationError: options that do not fit; the config reports them by line.
    """
    plugin = EVALUATORS.get(spec.use)
    return plugin(plugin.Options.model_validate(dict(spec.options), context={"folder": folder}))
