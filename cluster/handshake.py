"""Whether a worker runs the same code as the driver.

Our packages have common names (`search`, `evaluators`), so "it imports" proves nothing: a folder of
that name, or another version on another node, would silently score other merges. Before the first
trial every worker says what it would run, and a difference stops the run; a worker that comes later
and runs something else gets no trial. The same holds for evaluators that are not ours: of them the
files of their classes are compared, and a file that they call a function of; what those import is not.
"""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import socket
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from evaluators.base import EvaluatorSpec
from evaluators.registry import EVALUATORS
from search.errors import WorkerError

PACKAGES = ("meiosis", "cluster", "search", "evaluators")

SOURCES = ("*.py", "*.cpp", "*.h")
"""Files of ours that decide what a worker computes."""
LIBRARIES = ("numpy", "safetensors", "tokenizers", "torch", "transformers")
"""Libraries whose version can change scores."""


@dataclass(frozen=True)
class Package:
    """Code as a process imports it: where it is, and the sha256 of its source files."""

    folder: str
    sha256: str


_NOTHING = Package("nowhere", "of nothing")
"""What a worker has that says nothing about a package."""


@dataclass(frozen=True)
class Identity:
    """What a process runs. `version` is that of the installed distribution, for people."""

    node: str
    version: str
    packages: Mapping[str, Package]
    libraries: Mapping[str, str]


def identity() -> Identity:
    """What this process runs. Imports nothing; reads the source files (a few milliseconds)."""
    libraries = {"python": platform.python_version()}
    libraries.update((name, _version(name)) for name in LIBRARIES)
    return Identity(socket.gethostname(), _version("meiosis"), {p: _package(p) for p in PACKAGES}, libraries)


def compare(driver: Identity, worker: Identity, name: str) -> None:
    """Do nothing if both run the same.

    Raises:
        WorkerError: a package or library differs; names node, package and both digests or versions.
    """
    for package, ours in driver.packages.items():
        theirs = worker.packages.get(package, _NOTHING)
        if theirs.sha256 != ours.sha256:
            raise WorkerError(
                f"{name} on node {worker.node} has another package '{package}': sha256 {theirs.sha256[:16]} "
                f"in {theirs.folder} (version {worker.version}), expected {ours.sha256[:16]} as in "
                f"{ours.folder} (version {driver.version}); install the same Meiosis on every node, and "
                "do not change its files during a run"
            )
    for library, expected in driver.libraries.items():
        found = worker.libraries.get(library, "of unknown version")
        if found != expected:
            raise WorkerError(
                f"{name} on node {worker.node} has {library} {found}, expected {expected} as in the driver; "
                "scores would depend on the worker: install the same version on every node"
            )


def evaluator_sources(specs: Iterable[EvaluatorSpec]) -> dict[str, Package]:
    """Name of an evaluator -> its source beyond our own packages; that of ours hashes to the same everywhere.

    Raises:
        UserError: an evaluator cannot be imported.
    """
    found = {}
    for spec in specs:
        files = [*_class_files(EVALUATORS.get(spec.use)), *_function_files(spec)]
        digest = hashlib.sha256()
        for file in files:
            source = file.read_bytes()
            digest.update(f"{file.name}\0{len(source)}\0".encode())
            digest.update(source)
        found[spec.name] = Package(str(files[-1]) if files else "the evaluators of Meiosis", digest.hexdigest())
    return found


def compare_evaluators(driver: Mapping[str, Package], worker: Mapping[str, Package], name: str, node: str) -> None:
    """Do nothing if the evaluators of both are the same. Raises `WorkerError` as `compare` does."""
    for evaluator, ours in driver.items():
        theirs = worker.get(evaluator, _NOTHING)
        if theirs.sha256 != ours.sha256:
            raise WorkerError(
                f"{name} on node {node} has another evaluator '{evaluator}': sha256 {theirs.sha256[:16]} in "
                f"{theirs.folder}, expected {ours.sha256[:16]} as in {ours.folder}; install the same on every "
                "node, and do not change its files during a run"
            )


def locations() -> dict[str, str]:
    """Package -> folder that this process imports it from."""
    return {name: folder for name in PACKAGES if (folder := _folder(name))}


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _folder(package: str) -> str:
    """Where the package was imported from, or would be; empty if nowhere."""
    if package in sys.modules:
        paths = list(sys.modules[package].__path__)
    else:
        spec = importlib.util.find_spec(package)
        paths = list(spec.submodule_search_locations or ()) if spec is not None else []
    return str(Path(paths[0]).absolute()) if paths else ""


def _class_files(evaluator: type) -> list[Path]:
    """Files of a class and of those that it inherits from, but for ours and those of Python."""
    modules = {cls.__module__ for cls in evaluator.__mro__}
    known = {*PACKAGES, *sys.stdlib_module_names}
    files = [getattr(sys.modules.get(name), "__file__", None) for name in modules if name.split(".")[0] not in known]
    return sorted(Path(file) for file in files if file is not None and file.endswith(".py"))


def _function_files(spec: EvaluatorSpec) -> Sequence[Path]:
    """Files of options such as `path/to/file.py:name`."""
    texts = [value for value in spec.options.values() if isinstance(value, str)]
    places = [Path(text.rpartition(":")[0]) for text in texts]
    return [place for place in places if place.suffix == ".py" and place.is_file()]


def _package(name: str) -> Package:
    folder = _folder(name)
    if not folder:
        return Package("nowhere", "missing")
    digest = hashlib.sha256()
    root = Path(folder)
    sources = (path for pattern in SOURCES for path in root.rglob(pattern))
    for path in sorted(sources, key=lambda path: path.relative_to(root).as_posix()):
        source = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(source)}\0".encode())
        digest.update(source)
    return Package(folder, digest.hexdigest())
