"""Spherical interpolation of two models with a t that changes over the layers, as rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from search.grouping import depths, place_of
from search.recipe import Rule
from search.scales import at_depth

Curve = Sequence[float]
"""t at evenly spaced depths, from the first layer to the last; linear in between. One number is a constant."""


def slerp_rule(
    first: str, second: str, t: float, *, task_vectors: bool = False, tensors: tuple[str, ...] = ("*",)
) -> Rule:
    """One rule: `first` at t = 0, `second` at t = 1.

    Args:
        task_vectors: interpolate the differences from the base. Those of one base are far apart where the
            models themselves are nearly parallel, so that their SLERP is hardly more than a mean.
    """
    if not task_vectors:
        return Rule(tensors=tensors, operator="slerp", sources={first: {}, second: {}}, parameters={"t": t})
    return Rule(
        tensors=tensors,
        operator="nuslerp",
        sources={first: {"weight": 1.0 - t}, second: {"weight": t}},
        parameters={"task_vectors": True},
    )


def slerp_rules(
    names: Iterable[str],
    first: str,
    second: str,
    curves: Mapping[str, Curve],
    rest: float,
    *,
    task_vectors: bool = False,
) -> tuple[Rule, ...]:
    """Rules for all tensors, one for every t.

    Args:
        names: all tensors.
        first, second, task_vectors: see `slerp_rule`.
        curves: kind of tensor (`attention`, `mlp`, `norm`, or `*` for the other kinds) -> t over the layers.
        rest: t of tensors outside of the layers and of kinds without a curve.
    """
    known = list(names)
    depth = depths(known)
    by_t: dict[float, list[str]] = {}
    for name in known:
        curve = curves.get(place_of(name).kind, curves.get("*")) if name in depth else None
        by_t.setdefault(rest if curve is None else at_depth(curve, depth[name]), []).append(name)
    return tuple(
        slerp_rule(first, second, t, task_vectors=task_vectors, tensors=("*",) if len(by_t) == 1 else tuple(tensors))
        for t, tensors in by_t.items()
    )
