"""Values per tensor as mergekit writes them: one value, or a list of values with filters on tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from search.recipe import Value


def as_setting(values: Mapping[str, Value]) -> Any:
    """A setting that gives every tensor its value: mergekit takes the first entry whose filter is in the name.

    Filters are chosen one by one, each as the one that covers most of the tensors that are left without
    touching those of another value; a whole name always will, unless it is part of a longer one, which
    then comes first. Tensors of the most common value need no filter.
    """
    names = sorted(values)
    if len({_key(value) for value in values.values()}) == 1:
        return next(iter(values.values()))
    matches = _candidates(names)
    classes: dict[tuple[str, Value], int] = {}
    for index, name in enumerate(names):
        key = _key(values[name])
        classes[key] = classes.get(key, 0) | 1 << index
    left = (1 << len(names)) - 1
    entries: list[dict[str, Any]] = []
    while True:
        there = {key: mask & left for key, mask in classes.items() if mask & left}
        if len(there) == 1:
            break
        common = max(there, key=lambda key: (there[key].bit_count(), -names_first(there[key])))
        best: tuple[int, int, str] | None = None
        chosen: tuple[str, Value] | None = None
        for text, mask in matches.items():
            hit = mask & left
            if not hit:
                continue
            key = _key(values[names[names_first(hit)]])
            if key != common and hit & ~there[key] == 0:
                rank = (-hit.bit_count(), len(text), text)
                if best is None or rank < best:
                    best, chosen = rank, key
        if best is None or chosen is None:
            # Only names of the common value are left to stand before others that contain them.
            break
        entries.append({"filter": best[2], "value": chosen[1]})
        left &= ~matches[best[2]]
    if len(there) > 1:
        return _by_length(names, values)
    entries.append({"value": next(iter(there))[1]})
    return entries


def names_first(mask: int) -> int:
    """Index of the lowest bit that is set."""
    return (mask & -mask).bit_length() - 1


def _by_length(names: list[str], values: Mapping[str, Value]) -> list[dict[str, Any]]:
    """Whole names, the longest first: always right, never short."""
    ordered = sorted(names, key=lambda name: (-len(name), name))
    return [{"filter": name, "value": values[name]} for name in ordered]


def _key(value: Value) -> tuple[str, Value]:
    """Tells 1 from True, which compare equal."""
    return (type(value).__name__, value)


def _candidates(names: list[str]) -> dict[str, int]:
    """Runs of whole parts of names -> which names hold them, as bits."""
    texts: set[str] = set()
    for name in names:
        parts = name.split(".")
        for first in range(len(parts)):
            for last in range(first + 1, len(parts) + 1):
                run = ".".join(parts[first:last])
                if parts[first].isdigit():
                    continue  # 0.mlp would be in 10.mlp as well
                # A layer's number ends with a dot, or 1 would be in 10.
                texts.add(f"{run}." if parts[last - 1].isdigit() and last < len(parts) else run)
    return {text: sum(1 << index for index, name in enumerate(names) if text in name) for text in sorted(texts)}
