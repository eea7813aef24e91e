"""What is compared: settings of a search, as a config has them.

A method that this version of the program does not know is left out with a line that says so.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """One way to search.

    Attributes:
        search: what is changed below `search` in the config.
        from_zero: whether what generation 0 costs counts; not for methods that have none.
    """

    name: str
    search: dict[str, Any] = field(default_factory=dict)
    from_zero: bool = True


PEER = "cma_mergekit_evolve"

METHODS = (
    Method(PEER, {"optimizer": "quality.peer_cma:PLUGIN", "baselines": [], "window": 1}, from_zero=False),
    Method("random_search", {"optimizer": "random_search", "baselines": [], "window": 1}, from_zero=False),
    Method("default", {"optimizer": "auto"}),
    Method("default_on_parts", {"optimizer": "auto", "fitness": {"rotate": True}}),
    Method("default_all_items", {"optimizer": "auto", "fitness": {"rotate": False}}),
    Method("diagonal_cma", {"optimizer": "diagonal_cma"}),
    Method("diagonal_cma_no_generation_0", {"optimizer": "diagonal_cma", "baselines": []}),
    Method("racing", {"optimizer": "diagonal_cma", "fitness": {"racing": True, "estimate": "none"}}),
    Method(
        "racing_control_variate",
        {"optimizer": "diagonal_cma", "fitness": {"racing": True, "estimate": "control_variate"}},
    ),
    Method("racing_p_irt", {"optimizer": "diagonal_cma", "fitness": {"racing": True, "estimate": "p_irt"}}),
    Method("racing_gp_irt", {"optimizer": "diagonal_cma", "fitness": {"racing": True, "estimate": "gp_irt"}}),
    Method("full_cma", {"optimizer": "full_cma"}),
    Method("natural_niches", {"optimizer": "natural_niches"}),
    Method("map_elites", {"optimizer": "map_elites"}),
)


def with_method(config: dict[str, Any], method: Method) -> dict[str, Any]:
    """A config with the settings of a method."""
    changed = copy.deepcopy(config)
    changed["search"] = {**changed.get("search", {}), **copy.deepcopy(method.search)}
    return changed


def chosen(names: list[str] | None) -> list[Method]:
    """The methods of these names, the peer always first; all of them without names."""
    known = {method.name: method for method in METHODS}
    if unknown := sorted(set(names or ()) - set(known)):
        raise SystemExit(f"unknown method '{unknown[0]}'; there is {', '.join(known)}")
    return [known[name] for name in dict.fromkeys((PEER, *(names or known)))]
