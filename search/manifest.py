"""`run.yaml`: what a run is, written once at its start."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from search.errors import RunError
from search.setup import Setup, window
from search.store.run_folder import RunFolder

FORMAT = 1
PACKAGES = ("meiosis", "torch", "transformers", "nevergrad", "cma", "numpy", "ray", "pyarrow", "safetensors")
_KEYS = ("format", "window", "models", "data_sha256", "versions", "config")


def make_manifest(setup: Setup) -> dict[str, Any]:
    """Plain data for `RunFolder.create`."""
    config = setup.config
    return {
        "format": FORMAT,
        "name": config.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "window": window(config),
        "models": {name: ref.model_dump(mode="json") for name, ref in setup.models.items()},
        "data_sha256": dict(setup.data_sha256),
        "genes": [gene.name for gene in setup.space.genes],
        "versions": _versions(),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "config": config.model_dump(mode="json"),
    }


def read_manifest(folder: RunFolder) -> dict[str, Any]:
    """What `make_manifest` wrote.

    Raises:
        RunError: damaged, or of a format that this Meiosis does not read.
    """
    manifest = folder.manifest()
    missing = [key for key in _KEYS if key not in manifest]
    if missing:
        raise RunError(f"{folder.config} is damaged: '{missing[0]}' is missing; restore it from a backup")
    if manifest["format"] != FORMAT:
        raise RunError(f"{folder.config}: format {manifest['format']!r}, this Meiosis reads {FORMAT}")
    return manifest


def changed_versions(manifest: dict[str, Any]) -> Iterable[str]:
    """A line for every package that is not at the version the run started with."""
    for name, now in _versions().items():
        then = manifest["versions"].get(name)
        if then != now:
            yield f"the run started with {name} {then}, now it is {now}; results may differ in their last bits"


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
