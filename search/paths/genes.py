"""The genes of a path: which layers of a repeated pool run, and what scales the hidden state between them.

Encoding as in Akiba 2025 (Evolutionary optimization of model merging recipes, https://doi.org/10.1038/s42256-024-00975-8):
the M layers of the pool are offered r times in a row, an indicator for each of the T = M r slots says whether the layer
runs, and their order is that of the slots. W[i, j] scales the hidden state that leaves layer i and enters layer j.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from search.baseline import soup_rule
from search.errors import CheckpointError, RecipeError, nearest
from search.genome import Gene
from search.layers import Stack, find_stack
from search.operator_ranges import SpaceError
from search.paths.config import MERGED, PathConfig
from search.paths.families import family_of
from search.paths.scales import Scales, Slot
from search.recipe import Rule

GROUP = "path"
"""What stands before the slash in the names of these genes."""


@dataclass(frozen=True)
class Path:
    """Layers in the order in which they run, and the factor on the hidden state that enters each."""

    slots: tuple[Slot, ...]
    scales: tuple[float, ...]


@dataclass(frozen=True)
class PathGenes:
    """The part of a genome that says which layers run.

    Attributes:
        config: the section `space.path`.
        stack: the layers of the models.
    """

    config: PathConfig
    stack: Stack

    @property
    def depth(self) -> int:
        """Layers of one model."""
        return len(self.stack.layers)

    @property
    def first(self) -> str:
        """The entry of the pool at which the search starts; it gives all that is outside of layers."""
        return self.config.pool[0]

    @cached_property
    def offered(self) -> tuple[Slot, ...]:
        """The slots that have an indicator, in order: all but layers that are pinned."""
        pinned = (0, self.depth - 1) if self.config.pinned else ()
        return tuple(
            Slot(entry, layer, repeat)
            for repeat in range(self.config.repeats)
            for entry in self.config.pool
            for layer in range(self.depth)
            if entry != self.first or layer not in pinned
        )

    @cached_property
    def _ends(self) -> tuple[tuple[Slot, ...], tuple[Slot, ...]]:
        """The slots that every path begins and ends with."""
        if not self.config.pinned:
            return (), ()
        last = (Slot(self.first, self.depth - 1, self.config.repeats - 1),) if self.depth > 1 else ()
        return (Slot(self.first, 0, 0),), last

    @cached_property
    def limits(self) -> tuple[int, int]:
        """Fewest and most layers of a path."""
        ends = sum(map(len, self._ends))
        every = len(self.offered) + ends
        return max(self.config.min_length or 1, ends), min(self.config.max_length or every, every)

    @cached_property
    def indicators(self) -> tuple[Gene, ...]:
        """One gene for every slot that is offered: whether it is used."""
        start = {True: 0.5 + self.config.margin, False: 0.5 - self.config.margin}
        return tuple(
            Gene(f"{GROUP}/{slot.name}.use", 0.0, 1.0, start[slot.entry == self.first and slot.repeat == 0], "bool")
            for slot in self.offered
        )

    @cached_property
    def scales(self) -> Scales:
        """The factors between layers, and their genes."""
        slots = (*self.offered, *self._ends[1])  # nothing scales what enters the first layer of a path
        return Scales(self.config.scales, self.config.pool, self.depth, self.config.repeats, slots, GROUP)

    @cached_property
    def genes(self) -> tuple[Gene, ...]:
        """All genes of a path."""
        return (*self.indicators, *self.scales.genes)

    def initial(self) -> tuple[float, ...]:
        """The coordinates of the path that is the first of the pool as it is."""
        return tuple(gene.coordinate(gene.initial) for gene in self.genes)

    def decode(self, coordinates: Sequence[float]) -> Path:
        """The path at (n_genes,) coordinates in [0, 1].

        A path that is too long loses the layers whose indicators are smallest, one that is too short gets those whose
        indicators are largest; among equals, the layer that comes first is kept and added.
        """
        count = len(self.indicators)
        strength = coordinates[:count]
        used = [bool(gene.value(x)) for gene, x in zip(self.indicators, strength, strict=True)]
        before, after = self._ends
        least, most = (limit - len(before) - len(after) for limit in self.limits)
        by_strength = sorted(range(count), key=lambda slot: (-strength[slot], slot))
        chosen = [slot for slot in by_strength if used[slot]][:most]
        chosen += [slot for slot in by_strength if not used[slot]][: max(0, least - len(chosen))]
        slots = (*before, *(self.offered[slot] for slot in sorted(chosen)), *after)
        values = [float(gene.value(x)) for gene, x in zip(self.scales.genes, coordinates[count:], strict=True)]
        return Path(slots, self.scales.of(values, slots))

    def is_plain(self, path: Path) -> bool:
        """Whether a path is the first of the pool as it is."""
        own = tuple((self.first, layer) for layer in range(self.depth))
        return tuple((s.entry, s.layer) for s in path.slots) == own and all(scale == 1.0 for scale in path.scales)

    def rules(self, path: Path, merged: Sequence[Rule]) -> tuple[Rule, ...]:
        """The rules of a recipe with the layers of a path.

        Args:
            merged: how every tensor of the models is merged, by exact names; used where `merged` is on the path.
        """
        names: dict[str, dict[str, list[str]]] = {}  # entry -> tensor of the models -> tensors of the output
        for name in (*self.stack.before, *self.stack.after):
            names.setdefault(self.first, {})[name] = [name]
        for index, slot in enumerate(path.slots):
            made = names.setdefault(slot.entry, {})
            for rest, name in self.stack.layers[slot.layer].items():
                made.setdefault(name, []).append(self.stack.name(index, rest))
        rules = []
        for entry, outputs in names.items():
            if entry != MERGED:
                tensors = tuple(output for every in outputs.values() for output in every)
                rules.append(soup_rule((entry,)).model_copy(update={"tensors": tensors}))
                continue
            for rule in merged:
                tensors = tuple(output for name in rule.tensors for output in outputs.get(name, ()))
                if tensors:
                    rules.append(rule.model_copy(update={"tensors": tensors}))
        return tuple(rules)

    def layers(self, path: Path, models: Sequence[str]) -> tuple[dict[str, int], ...]:
        """`Recipe.layers` of a path; `models` are the base and all sources."""
        # The base is always there: tensors of the output have its dtypes.
        return tuple(
            dict.fromkeys(models if slot.entry == MERGED else dict.fromkeys((models[0], slot.entry)), slot.layer)
            for slot in path.slots
        )


def make_path_genes(
    config: PathConfig, tensors: Iterable[str], sources: Sequence[str], model_config: Mapping[str, Any]
) -> PathGenes:
    """The genes of a config.

    Args:
        config: the section `space.path`.
        tensors: tensor names of the base.
        sources: names of the sources.
        model_config: `config.json` of the base.

    Raises:
        SpaceError: an entry of the pool that is no model, models whose layers cannot form a path, or a first path that
            the limits do not allow.
    """
    known = (MERGED, "base", *sources)
    if MERGED in sources and MERGED in config.pool:
        raise SpaceError((GROUP, "pool"), f"'{MERGED}' is both the merge and a source; give the source another name")
    for index, entry in enumerate(config.pool):
        if entry not in known:
            raise SpaceError((GROUP, "pool", index), f"no model is called '{entry}'{nearest(entry, known)}")
    try:
        family_of(model_config)
        found = PathGenes(config, find_stack(tensors, model_config, "the base"))
    except (RecipeError, CheckpointError) as error:
        raise SpaceError((GROUP,), str(error)) from error
    least, most = found.limits
    start = f"the search starts with the {found.depth} layers of '{found.first}'"
    if found.depth > most:
        raise SpaceError((GROUP, "max_length"), f"{start}; expected at least {found.depth}, found {most}")
    if found.depth < least:
        raise SpaceError((GROUP, "min_length"), f"{start}; expected at most {found.depth}, found {least}")
    return found
