"""Where a search for a front starts: at the front of generation 0."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from search.objective import Objective
from search.pareto.dominance import front


def front_ids(objective: Objective, metrics: Mapping[int, Mapping[str, float] | None]) -> list[int]:
    """The candidates that no other one dominates, by number; failed and infeasible ones are left out.

    Args:
        metrics: candidate -> what was measured; None for a failure.
    """
    usable = {
        id_: objective.losses(found)
        for id_, found in sorted(metrics.items())
        if found is not None and objective.judge(found).feasible
    }
    losses = np.array(list(usable.values()), dtype=np.float64).reshape(-1, len(objective.terms))
    ids = list(usable)
    return sorted(ids[index] for index in front(losses))
