"""The statistics that a config names, against its models and its operator. Loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from search.errors import UserError, nearest
from search.merge.statistics import open_statistics
from search.registry import OPERATORS

if TYPE_CHECKING:
    from search.config import LoadedConfig
    from search.recipe import ModelRef
    from search.yaml_source import Location


def statistics_paths(loaded: LoadedConfig) -> dict[str, str]:
    """Source -> its file of statistics, absolute; relative paths start at the config's folder."""
    given = loaded.config.models.statistics
    return {name: str((loaded.folder / Path(path).expanduser()).resolve()) for name, path in given.items()}


def check_statistics(
    loaded: LoadedConfig, models: Mapping[str, ModelRef], fault: Callable[[Location, str], None]
) -> dict[str, ModelRef]:
    """The models with their statistics.

    Args:
        models: with content hashes.
        fault: called with key and message for a file that is missing, damaged or of another model or kind, and for
            a source that the operator needs statistics of and that has none.
    """
    sources, paths = loaded.config.models.sources, statistics_paths(loaded)
    needs = {name: kind for name in loaded.config.space.operators if (kind := OPERATORS.get(name).statistics)}
    kinds = tuple(dict.fromkeys(needs.values()))
    for name, path in paths.items():
        key = ("models", "statistics", name)
        if name not in sources:
            fault(key, f"no source is called '{name}'{nearest(name, sources)}")
            continue
        try:
            open_statistics(Path(path), model=name, model_sha256=models[name].sha256, kinds=kinds)
        except UserError as error:
            fault(key, str(error))
    missing = [name for name in sources if name not in paths]
    for operator, kind in needs.items() if missing else ():
        fault(
            ("space", "operator"),
            f"'{operator}' needs {kind} statistics of every source, '{missing[0]}' has none; make "
            "them with `meiosis statistics` and name the file under models.statistics",
        )
    return {name: ref.model_copy(update={"statistics": paths.get(name)}) for name, ref in models.items()}
