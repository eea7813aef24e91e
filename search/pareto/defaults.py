"""What a search for a front uses where the config does not say."""

from __future__ import annotations

OPTIMIZER = "nsga2"
"""The optimiser of `objectives.search: pareto`."""


def with_front_optimizer(data: object) -> object:
    """The parsed config with the optimiser of a front where a front is searched and no optimiser is named."""
    if not isinstance(data, dict) or not isinstance(data.get("objectives"), dict):
        return data
    search = data.get("search")
    if data["objectives"].get("search") != "pareto" or not isinstance(search, dict | None):
        return data
    return {**data, "search": {"optimizer": OPTIMIZER, **(search or {})}}
