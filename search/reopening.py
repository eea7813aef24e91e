"""The setup of a run from its folder: here or elsewhere, with everything verified that it depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from search.baseline import BASELINES, options_class
from search.config import parse_config
from search.errors import RunError
from search.manifest import changed_device, changed_versions, read_manifest
from search.progress import Watcher
from search.relocate import Places, relocated
from search.setup import Setup, check
from search.store.run_folder import RunFolder
from search.store.sessions import Sessions
from search.tracker import known_trackers
from search.yaml_source import YamlSource


def load_setup(
    folder: RunFolder, watcher: Watcher, changes: Mapping[str, Any] | None = None, places: Sequence[Path] = ()
) -> Setup:
    """The setup of a run from its folder, with sources and data verified by hash; see `search.run.resume`."""
    manifest = read_manifest(folder)
    for line in changed_versions(manifest):
        watcher.line(line)
    known = (*(place.expanduser().resolve() for place in places), *map(Path, Sessions(folder.sessions).places))
    now = folder.path.resolve().parent
    then = Path(manifest["config"]["results"])
    config = relocated(manifest, str(folder.config), Places(tuple(dict.fromkeys(known)), then, now, watcher.line))
    config["cluster"] = _changed_cluster(config["cluster"], changes or {})
    config["search"]["baselines"] = [_baseline_then(entry) for entry in config["search"]["baselines"]]
    config["search"].setdefault("fitness", {}).setdefault("parents", 1.0)  # they had all items
    config["tracking"] = known_trackers(config.get("tracking", []), watcher.line)
    source = YamlSource(yaml.safe_dump(config, sort_keys=False), str(folder.config))
    setup = check(parse_config(source, folder.path), report=watcher.line, begun=True)
    for line in changed_device(manifest, setup):
        watcher.line(line)
    for name, ref in setup.models.items():
        recorded = manifest["models"][name]["sha256"]
        if ref.sha256 != recorded:
            raise RunError(
                f"model '{name}' at {ref.path} is not the one the run started with (sha256 {str(ref.sha256)[:12]}, "
                f"was {recorded[:12]}); put the old files back, name a folder that has them with --models DIR, or "
                "start a new run"
            )
    for name, digest in setup.data_sha256.items():
        if digest != manifest["data_sha256"][name]:
            raise RunError(
                f"the data of evaluator '{name}' changed since the run started; put it back, or start a new run"
            )
    return setup


def _baseline_then(entry: str | Mapping[str, Any]) -> dict[str, Any]:
    """A baseline as a run has it that may be older than some of its options."""
    [(name, options)] = [(entry, {})] if isinstance(entry, str) else entry.items()
    if name in BASELINES.names() and "halvings" in options_class(name).model_fields:
        options = {"halvings": 0, **options}  # sweeps ended where their values did
    return {name: options}


def _changed_cluster(recorded: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The cluster section of a run that goes on elsewhere."""
    cluster = {**recorded, **changes}
    if cluster["pool"] == "local" and recorded["pool"] != "local":
        # Ray's workers without a reserved GPU ran on the CPU, a worker in this process would take the GPU it sees.
        on_cpu = recorded["device"] == "auto" and not recorded["gpus_per_worker"]
        elsewhere = {"address": None, "gpus_per_worker": 0, "shards": "auto", **({"device": "cpu"} if on_cpu else {})}
        cluster = {**recorded, **elsewhere, **changes}
    return cluster
