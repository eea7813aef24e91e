"""Plug-ins by name: modules of a package here, entry points of other packages, or `module:Class`.

The same few lines serve evaluators, merge operators, optimisers and baselines. Adding one is adding
one file with a `PLUGIN` (its name is the registered name), or an entry point in another package.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
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
    """

    def __init__(self, noun: str, package: str, group: str) -> None:
        self.noun, self.package, self.group = noun, package, group

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
    def _entry_points(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)}

    def names(self) -> list[str]:
        """Every registered name, sorted; nothing is imported."""
        return sorted({*self._modules, *self._entry_points})

    def __iter__(self) -> Iterator[tuple[str, T]]:
        for name in self.names():
            yield name, self.get(name)

    def get(self, name: str) -> T:
        """The plug-in called `name`, or found at `module:attribute`.

        Raises:
            UserError: no such name, or the plug-in cannot be imported.
        """
        try:
            if name in self._modules:
                return cast(T, importlib.import_module(self._modules[name]).PLUGIN)
            if name in self._entry_points:
                return cast(T, self._entry_points[name].load())
            if ":" in name:
                module, _, attribute = name.partition(":")
                plugin: Any = importlib.import_module(module)
                for part in attribute.split("."):
                    plugin = getattr(plugin, part)
                return cast(T, plugin)
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"{self.noun} '{name}' cannot be imported: {error}; is the package that holds it installed?"
            ) from error
        raise UserError(f"unknown {self.noun} '{name}'{nearest(name, self.names())}")


EVALUATORS: Registry[type[Evaluator]] = Registry("evaluator", "evaluators", "meiosis.evaluators")


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
    if not (isinstance(plugin, type) and issubclass(plugin, Evaluator)):
        raise UserError(f"'{spec.use}' is not an evaluator: expected a subclass of evaluators.base.Evaluator")
    if missing := sorted(plugin.__abstractmethods__):
        raise UserError(f"evaluator '{spec.use}' is not complete: it does not define {', '.join(missing)}")
    return plugin(plugin.Options.model_validate(dict(spec.options), context={"folder": folder}))
