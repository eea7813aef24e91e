"""Whether two recipes are the same weighted sum of task vectors, however they are written."""

from __future__ import annotations

import math
from collections.abc import Mapping

from search.recipe import Recipe, Rule

_TOLERANCE = 1e-9


def same_merge(first: Recipe, second: Recipe) -> bool:
    """Whether both give every tensor the same weighted sum, up to rounding, and run the same layers.

    Only what can be told from rules without reading a tensor: the first recipe has one rule for all tensors, and all
    rules are soups or task arithmetic. For others the answer is no.
    """
    if len(first.rules) != 1 or first.rules[0].tensors != ("*",):
        return False
    if (first.layers, first.scales) != (second.layers, second.scales):
        return False
    wanted = vector_weights(first.rules[0])
    return wanted is not None and all(_equal(wanted, vector_weights(rule)) for rule in second.rules)


def vector_weights(rule: Rule) -> dict[str, float] | None:
    """Source -> weight of its task vector (those with weight 0 left out), None for a rule that is no such sum."""
    shared = dict(rule.parameters)
    weights = {name: float(values.get("weight", math.nan)) for name, values in rule.sources.items()}
    total = math.fsum(weights.values())
    if rule.operator == "linear":
        factor = 1 / total if shared.get("normalize", True) and total else 1.0
        if not math.isclose(total * factor, 1.0, abs_tol=_TOLERANCE):
            return None
    elif rule.operator == "task_arithmetic" and not shared.get("normalize", False):
        factor = float(shared.get("lambda", 1.0))
    else:
        return None
    return {name: weight * factor for name, weight in weights.items() if name != "base" and weight * factor}


def _equal(first: Mapping[str, float], second: Mapping[str, float] | None) -> bool:
    if second is None:
        return False
    names = sorted({*first, *second})
    return all(math.isclose(first.get(n, 0.0), second.get(n, 0.0), abs_tol=_TOLERANCE) for n in names)
