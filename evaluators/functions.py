"""Functions that a config names: `path/to/file.py:name` or `module:name`."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from evaluators.errors import UserError, nearest


def check_function(reference: str, arguments: Sequence[str]) -> None:
    """Look for a function without running anything: what its module imports may take seconds.

    Args:
        reference: the function.
        arguments: names of the parameters that it can be called with.

    Raises:
        UserError: no such file, module or name, a file that does not parse, or other parameters.
    """
    place, _, name = reference.rpartition(":")
    if place.endswith(".py"):
        _check_source(place, name, arguments)
    elif place in sys.modules:
        _check_loaded(sys.modules[place], name, arguments, reference)
    elif source := _source_of(place, reference):
        _check_source(source, name, arguments)


def _check_loaded(module: ModuleType, name: str, arguments: Sequence[str], reference: str) -> None:
    if not hasattr(module, name):
        hint = nearest(name, [n for n in dir(module) if not n.startswith("_")])
        hint = hint if "did you mean" in hint else ""  # instead of all that a large module has
        raise UserError(f"function {reference}: module {module.__name__} has no '{name}'{hint}")
    found = getattr(module, name)
    if not callable(found) or inspect.isclass(found):
        kind = "a class" if inspect.isclass(found) else f"of type {type(found).__name__}"
        raise UserError(f"function {reference}: '{name}' is {kind}; expected a function")
    if inspect.isfunction(found):
        parameters_of(found, arguments, reference)


def _check_source(place: str, name: str, arguments: Sequence[str]) -> None:
    try:
        tree = ast.parse(_read(place), filename=place)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise UserError(f"{place}:{line}: not Python: {getattr(error, 'msg', error)}") from None
    known: dict[str, ast.stmt] = {}
    for statement in tree.body:
        known.update(dict.fromkeys(_names_bound(statement), statement))
    has_star = any(isinstance(s, ast.ImportFrom) and s.names[0].name == "*" for s in tree.body)
    # Names may also come from elsewhere: other branches, or a module that makes them when they are asked for.
    is_open = has_star or "__getattr__" in known or any(isinstance(s, (ast.If, ast.Try)) for s in tree.body)
    if name not in known and not is_open:
        functions = [n for n, s in known.items() if isinstance(s, ast.FunctionDef)]
        raise UserError(f"{place}: no function '{name}' in it{nearest(name, functions)}")
    definition = known.get(name)
    if isinstance(definition, ast.AsyncFunctionDef):
        raise UserError(f"{place}:{definition.lineno}: '{name}' is async; expected an ordinary function")
    if isinstance(definition, ast.ClassDef):
        raise UserError(f"{place}:{definition.lineno}: '{name}' is a class; expected a function")
    if isinstance(definition, ast.FunctionDef) and not definition.decorator_list:
        required = definition.args.posonlyargs + definition.args.args
        required = required[: len(required) - len(definition.args.defaults)]
        keywords = zip(definition.args.kwonlyargs, definition.args.kw_defaults, strict=True)
        names = [a.arg for a in required] + [a.arg for a, default in keywords if default is None]
        _refuse_unknown(names, arguments, f"{place}:{definition.lineno}: function '{name}'")


def load_function(reference: str) -> Callable[..., Any]:
    """The function, its file or module loaded.

    A file is loaded once per content, under a name that no other module has.

    Raises:
        UserError: there is none, it cannot be imported, or is not callable.
    """
    place, _, name = reference.rpartition(":")
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise _not_imported(reference, error) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"function {reference}: {'not a function' if hasattr(module, name) else 'no such name'}")
    found: Callable[..., Any] = function
    return found


def parameters_of(function: Callable[..., Any], arguments: Sequence[str], reference: str) -> frozenset[str]:
    """Which of the arguments the function takes, all of them for one with `**`.

    Raises:
        UserError: it needs an argument that there is not.
    """
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return frozenset(arguments)
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.POSITIONAL_ONLY)]
    required = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    _refuse_unknown([n for n in required if n not in {p.name for p in named}], (), f"function {reference}")
    _refuse_unknown(required, arguments, f"function {reference}")
    return frozenset(p.name for p in named) & frozenset(arguments)


def _refuse_unknown(names: Sequence[str], arguments: Sequence[str], where: str) -> None:
    for name in names:
        if name not in arguments:
            raise UserError(f"{where} asks for '{name}'{nearest(name, arguments)}")


def _names_bound(statement: ast.stmt) -> list[str]:
    """Names that a statement at the top of a module defines."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [statement.name]
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return [(alias.asname or alias.name).partition(".")[0] for alias in statement.names]
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = list(statement.targets)
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]


def _source_of(module: str, reference: str) -> str | None:
    """The Python file of a module that is not loaded; None for one that is compiled.

    Looks without importing the packages that the module is in, unless it cannot be found otherwise.
    """
    spec, path = None, None
    parts = module.split(".")
    try:
        for count in range(1, len(parts) + 1):
            name = ".".join(parts[:count])
            found = (finder.find_spec(name, path) for finder in sys.meta_path if hasattr(finder, "find_spec"))
            spec = next((one for one in found if one is not None), None)
            path = spec.submodule_search_locations if spec is not None else None
            if path is None:
                break
        if spec is None or spec.name != module:
            spec = importlib.util.find_spec(module)
    except (Exception, SystemExit) as error:  # the packages ran: whatever they raise
        if not (isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}.")):
            raise _not_imported(reference, error) from error
        spec = None
    if spec is None:
        raise UserError(f"function {reference}: there is no module '{module}'; is the package that has it installed?")
    return spec.origin if spec.origin is not None and spec.origin.endswith(".py") else None


def _not_imported(reference: str, error: BaseException) -> UserError:
    reason = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
    return UserError(f"function {reference} cannot be imported: {reason}")


def _read(place: str) -> bytes:
    try:
        return Path(place).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{place}: no such file") from None
    except OSError as error:
        raise UserError(f"{place}: cannot be read: {error.strerror}") from error


def _load_file(path: Path) -> ModuleType:
    digest = hashlib.sha256(f"{path}\0".encode() + _read(str(path))).hexdigest()
    name = f"_meiosis_function_{digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses look themselves up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
