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
from search.machine import has_gpu
from search.optimizer import OPTIMIZERS
from search.setup import Setup, window
from search.store.run_folder import RunFolder

FORMAT = 1
PACKAGES = ("meiosis", "torch", "transformers", "nevergrad", "cma", "numpy", "scipy", "ray", "pyarrow", "safetensors")
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
        "models": {
            name: {**ref.model_dump(mode="json"), "bytes": setup.checkpoints[name].nbytes}
            for name, ref in setup.models.items()
        },
        "data_sha256": dict(setup.data_sha256),
        # So that whoever looks at the run knows what is better without making its evaluators.
        "directions": {name: metric.direction for name, metric in setup.metrics.items()},
        "genes": [gene.name for gene in setup.space.genes],
        "versions": versions(),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "device": device_kind(setup)},
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


_BITS = "scores and merged weights may differ in their last bits from what this run recorded before"
_ASKS = (
    "what the optimiser proposes may differ; what is recorded is compared ask by ask before the run goes on, new "
    "candidates may be others than without the change"
)
_NOTHING = "this changes nothing that is recorded"
_CONSEQUENCE = {
    "python": _NOTHING,
    "meiosis": "operators and evaluators may have changed: what was asked is checked, scores are not; see CHANGELOG",
    "torch": _BITS,
    "transformers": _BITS,
    "nevergrad": _ASKS,
    "cma": _ASKS,
    "numpy": _ASKS,
    "scipy": _ASKS,
    "ray": _NOTHING,
    "pyarrow": _NOTHING,
    "safetensors": _NOTHING,
}
"""What another version of a package means for a run that goes on."""


def changed_versions(manifest: dict[str, Any]) -> Iterable[str]:
    """A line for every package and part of the machine that is not what the run started with, and what it means."""
    ours = manifest["config"]["search"]["optimizer"]["name"] in OPTIMIZERS.names()
    unused = {"nevergrad"} if ours else set()
    for name, now in versions().items():
        then = manifest["versions"].get(name, now)  # a run that is older than the list knows nothing of some
        if then != now:
            meaning = _NOTHING if name in unused else _CONSEQUENCE.get(name, _BITS)
            yield f"the run started with {name} {then}, now it is {now}: {meaning}"
    then, now = manifest.get("machine", {}).get("processor"), platform.machine()
    if then is not None and then != now:
        yield f"the run started on a processor of kind {then}, this one is {now}: {_BITS}"


def changed_device(manifest: dict[str, Any], setup: Setup) -> Iterable[str]:
    """A line if candidates are now evaluated on another kind of device."""
    then, now = manifest.get("machine", {}).get("device"), device_kind(setup)
    if then is not None and then != now:
        yield f"candidates were evaluated on {then}, now on {now}: {_BITS}; --device {then} goes on as before"


def device_kind(setup: Setup) -> str:
    """`cpu`, `cuda`, ...: where workers evaluate, as far as this machine can tell."""
    if setup.device != "auto":
        return setup.device.partition(":")[0]
    return "cuda" if setup.config.cluster.gpus_per_worker or has_gpu() else "cpu"


def versions() -> dict[str, str]:
    """What a run depends on, as it is here."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
