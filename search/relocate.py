"""Find the models and data of a run again, on another machine or after they moved: by content, not by name.

A run folder names absolute paths. What is gone there is looked for where it would be if run, models and
data had moved together, in the hub's cache, and in the folders that the user names. A model is taken for
the one it was when its weights have the recorded hash; data are compared by the caller, who makes the
evaluators.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from evaluators.base import paths_in
from evaluators.registry import EVALUATORS
from search.checkpoints.fingerprint import fingerprint
from search.checkpoints.model_folder import find_model_folder
from search.checkpoints.reading import ADAPTER_CONFIG, Checkpoint, open_checkpoint
from search.errors import CheckpointError, UserError

MOST_FOLDERS = 2000
"""Model folders that are looked at in one place: somebody may name the root of a disk."""


@dataclass(frozen=True)
class Places:
    """Where to look.

    Attributes:
        named: folders that the user named, now or at an earlier resume.
        results_then, results_now: folder of the runs at the start of this one, and now.
        report: is told what was found elsewhere.
    """

    named: tuple[Path, ...]
    results_then: Path
    results_now: Path
    report: Callable[[str], None] = lambda _: None

    def moved(self, path: str) -> Path:
        """Where a path would be had it moved together with the run."""
        return Path(os.path.normpath(self.results_now / os.path.relpath(path, self.results_then)))

    def __str__(self) -> str:
        return ", ".join(map(str, self.named)) or "no other place was named"


def relocated(manifest: Mapping[str, Any], where: str, places: Places) -> dict[str, Any]:
    """The config of a manifest with paths that exist here.

    Args:
        manifest: what `read_manifest` gives.
        where: file of the manifest, for messages.

    Raises:
        UserError: a model or a file of data is nowhere.
    """
    config = dict(manifest["config"])
    models = dict(config["models"])
    base = _model("base", models["base"], manifest["models"]["base"], places, f"{where}: models.base", None)
    models["base"] = base
    models["sources"] = {
        name: _model(name, path, manifest["models"][name], places, f"{where}: models.sources.{name}", base)
        for name, path in models["sources"].items()
    }
    models["statistics"] = {
        name: _data(path, places, f"{where}: models.statistics.{name}")
        for name, path in (models.get("statistics") or {}).items()
    }
    config["models"] = models
    config["evaluators"] = {
        name: _all_paths(options, places, f"{where}: evaluators.{name}", _known_paths(options))
        for name, options in config["evaluators"].items()
    }
    return config


def _model(name: str, path: str, recorded: Mapping[str, Any], places: Places, key: str, base: str | None) -> str:
    """The folder of a model: the recorded one, or another with the same weights."""
    there = Path(path).is_dir()
    if there and (not places.named or _sha256(Path(path), base) == recorded["sha256"]):
        return path  # what is wrong with it, if anything, is told by whoever opens it
    for folder in _candidates(path, places):
        size = recorded.get("bytes")
        try:
            checkpoint = _opened(folder, base)
            if size is not None and checkpoint.nbytes != size:
                continue
            found = fingerprint(checkpoint, report=places.report).sha256
        except CheckpointError:
            continue
        if found == recorded["sha256"]:
            places.report(f"model '{name}' found by its hash: {folder}")
            return str(folder)
    state = "has other weights" if there else "is gone"
    raise UserError(
        f"{key}: {path} {state}, and no folder with the weights {recorded['sha256'][:12]} was found (looked in the "
        f"hub's cache and: {places}); give the folder that has it with --models DIR"
    )


def _opened(folder: Path, base: str | None) -> Checkpoint:
    checkpoint = open_checkpoint(folder)
    if checkpoint.kind == "adapter" and base is not None:
        return replace(checkpoint, base=open_checkpoint(base))
    return checkpoint


def _sha256(folder: Path, base: str | None) -> str | None:
    try:
        return fingerprint(_opened(folder, base)).sha256
    except CheckpointError:
        return None


def _candidates(path: str, places: Places) -> Iterator[Path]:
    """Folders that may hold a model, the likely ones first, each once."""
    seen: set[Path] = set()
    likely = [places.moved(path), *_snapshot(path)]
    in_places = [folder for place in places.named for folder in _model_folders(place)]
    same_name = [folder for folder in in_places if folder.name == Path(path).name]
    for folder in (*likely, *same_name, *in_places, *_model_folders(_hub_cache())):
        if folder not in seen and folder.is_dir():
            seen.add(folder)
            yield folder


def _snapshot(path: str) -> Iterator[Path]:
    """The same commit of a hub model, where the recorded path is one: from the cache here, or from the hub."""
    parts = Path(path).parts
    cached = next((part for part in parts if part.startswith("models--")), None)
    if cached is None or "snapshots" not in parts or parts[-1] == "snapshots":
        return
    revision = parts[parts.index("snapshots") + 1]
    try:
        yield find_model_folder(f"{cached.removeprefix('models--').replace('--', '/')}@{revision}")
    except CheckpointError:
        return


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _model_folders(place: Path) -> list[Path]:
    """The model folders at a place and up to two levels below it; snapshots of a hub cache too."""
    if not place.is_dir():
        return []
    found = []
    for pattern in ("", "*/", "*/*/", "models--*/snapshots/*/"):
        for name in ("config.json", ADAPTER_CONFIG):
            found += [file.parent for file in sorted(place.glob(pattern + name))]
    return list(dict.fromkeys(found))[:MOST_FOLDERS]


def _known_paths(options: Mapping[str, Any]) -> frozenset[str] | None:
    """Which of an evaluator's options are paths by their type; None where its options do not tell."""
    rest = {name: value for name, value in options.items() if name != "use"}
    try:
        return frozenset(map(str, paths_in(EVALUATORS.get(options["use"]).Options.model_validate(rest))))
    except (UserError, ValidationError):
        return None  # what is wrong with them is told by whoever makes the evaluator


def _all_paths(value: Any, places: Places, key: str, known: frozenset[str] | None) -> Any:
    """Options of an evaluator with every absolute path that is gone replaced.

    Text that only looks like a path, such as the unit `/s`, stays as it is where nothing of that name is found.
    """
    if isinstance(value, Mapping):
        return {name: _all_paths(inner, places, f"{key}.{name}", known) for name, inner in value.items()}
    if isinstance(value, list):
        return [_all_paths(inner, places, key, known) for inner in value]
    if not isinstance(value, str) or not value.startswith("/"):
        return value
    file, colon, function = value.rpartition(":")
    if colon and file.endswith(".py"):
        return f"{_data(file, places, key)}:{function}"
    if known is None or value in known:
        return _data(value, places, key)
    found = _found(value, places) if len(Path(value).parts) > 2 else None
    return found or value


def _data(path: str, places: Places, key: str) -> str:
    """A file or folder of data, see `_found`."""
    found = _found(path, places)
    if found is None:
        raise UserError(
            f"{key}: {path} is gone, and nothing of that name was found (looked in: {places}); give the folder that "
            "has it with --data DIR"
        )
    return found


def _found(path: str, places: Places) -> str | None:
    """A file or folder: at its path, moved along with the run, or by the end of its path in a named place."""
    if Path(path).exists():
        return path
    parts = Path(path).parts[1:]
    ends: Sequence[Path] = [Path(*parts[-count:]) for count in range(len(parts), 0, -1)]
    tries = [places.moved(path), *(place / end for end in ends for place in places.named)]
    tries += [folder / end for end in ends[-2:] for place in places.named for folder in sorted(place.glob("*/"))]
    found = next((candidate for candidate in tries if candidate.exists()), None)
    if found is None:
        return None
    places.report(f"{path} is gone; taking {found}")
    return str(found)
