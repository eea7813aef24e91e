"""Whether a worker runs the same code as the driver.

Our packages have common names (`search`, `evaluators`), so "it imports" proves nothing: a folder of
that name, or another version on another node, would silently score other merges. Before the first
trial every worker says what it would run, and a difference stops the run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from search.errors import WorkerError

PACKAGES = ("meiosis", "cluster", "search", "evaluators")
LIBRARIES = ("numpy", "safetensors", "tokenizers", "torch", "transformers")
"""Libraries whose version can change scores."""


@dataclass(frozen=True)
class Package:
    """One of our packages as a process imports it: its folder, and the sha256 of its source files."""

    folder: str
    sha256: str


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
        theirs = worker.packages[package]
        if theirs.sha256 != ours.sha256:
            raise WorkerError(
                f"{name} on node {worker.node} has another package '{package}': sha256 {theirs.sha256[:16]} "
                f"in {theirs.folder} (version {worker.version}), expected {ours.sha256[:16]} as in "
                f"{ours.folder} (version {driver.version}); install the same Meiosis on every node, and "
                "do not change its files during a run"
            )
    for library, expected in driver.libraries.items():
        found = worker.libraries[library]
        if found != expected:
            raise WorkerError(
                f"{name} on node {worker.node} has {library} {found}, expected {expected} as in the driver; "
                "scores would depend on the worker: install the same version on every node"
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


def _package(name: str) -> Package:
    folder = _folder(name)
    if not folder:
        return Package("nowhere", "missing")
    digest = hashlib.sha256()
    root = Path(folder)
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        source = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(source)}\0".encode())
        digest.update(source)
    return Package(folder, digest.hexdigest())
