"""The space: named genes, and the way from a genome to a recipe."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from search.config import SpaceConfig
from search.genome import Gene, Genome
from search.grouping import Group
from search.operator_ranges import SpaceError
from search.parameter_genes import ParameterGenes, make_parameter_genes
from search.recipe import ModelRef, Recipe, Rule, Value

__all__ = ["Space", "SpaceError", "make_space"]


@dataclass(frozen=True)
class Space:
    """All recipes that a search can make.

    Attributes:
        parameters: the genes that say how tensors are merged.
        models: what the recipes call their models.
        seed: seed that recipes carry, for operators that draw masks.
        dtype: dtype that recipes carry.
    """

    parameters: ParameterGenes
    models: Mapping[str, ModelRef]
    seed: int
    dtype: str | None

    @property
    def genes(self) -> tuple[Gene, ...]:
        """The searched numbers, in the order of a genome."""
        return self.parameters.genes

    @property
    def groups(self) -> tuple[Group, ...]:
        """The tensors that share genes."""
        return self.parameters.groups

    @property
    def operators(self) -> tuple[str, ...]:
        """The operators that a group can use."""
        return self.parameters.operators

    @property
    def sources(self) -> tuple[str, ...]:
        """Source names, in the order of the config."""
        return self.parameters.sources

    def decode(self, genome: Genome) -> Recipe:
        """The recipe of a genome.

        Raises:
            ValueError: a genome of another length.
        """
        return self._recipe_with(self._values(genome))

    def recipe_hash(self, genome: Genome) -> str:
        """`decode(genome).hash`, in a fraction of the time: the driver needs it for every candidate.

        Raises:
            ValueError: a genome of another length.
        """
        if not self.parameters.fixed_structure:
            return self.decode(genome).hash
        values, (first, *rest) = self._values(genome), self._text_between_values
        text = [first]
        for gene, piece in rest:
            value = values[gene]
            text += repr(value) if type(value) is float else json.dumps(value), piece
        return hashlib.sha256("".join(text).encode()).hexdigest()

    @cached_property
    def _text_between_values(self) -> tuple[Any, ...]:
        """What `Recipe.hash` covers, cut at the searched values: the text before the first of them, then for each the
        number of its gene and the text that follows."""
        marks = [f"\0{number}\0" for number in range(len(self.genes))]
        first, *rest = re.split(r'"\\u0000(\d+)\\u0000"', self._recipe_with(marks).hashed_text)
        return first, *((int(gene), piece) for gene, piece in zip(rest[::2], rest[1::2], strict=True))

    def _values(self, genome: Genome) -> list[Value]:
        if len(genome.coordinates) != len(self.genes):
            raise ValueError(f"genome has {len(genome.coordinates)} genes, this space has {len(self.genes)}")
        return [gene.value(x) for gene, x in zip(self.genes, genome.coordinates, strict=True)]

    def _recipe_with(self, searched: Iterable[Value]) -> Recipe:
        """The recipe in which the searched parameters have these values, in the order of the genes."""
        return self.recipe(self.parameters.rules(iter(searched)))

    def recipe(self, rules: tuple[Rule, ...]) -> Recipe:
        """A recipe of this space's models with other rules, as the baselines make them."""
        return Recipe(base="base", models=dict(self.models), rules=rules, dtype=self.dtype, seed=self.seed)

    def initial(self) -> Genome:
        """Where the search starts when nothing better is known."""
        return Genome(tuple(gene.coordinate(gene.initial) for gene in self.genes))

    def suggest(self, weights: Mapping[str, float], operator: str | None = None) -> Genome | None:
        """The genome that gives every source this weight everywhere, all else at its initial value.

        None where the space does not search weights by source. Weights beyond the bounds are clipped.

        Args:
            operator: what to merge with, where the space has it among several; else the first that has weights.
        """
        coordinates = self.parameters.suggest(weights, operator)
        return None if coordinates is None else Genome(coordinates)


def make_space(
    config: SpaceConfig,
    *,
    tensors: Iterable[str],
    models: Mapping[str, ModelRef],
    sources: Iterable[str],
    seed: int = 0,
    dtype: str | None = None,
) -> Space:
    """Build the space of a config.

    Args:
        config: the `space` section.
        tensors: tensor names of the base.
        models: `base` and the sources.
        sources: names of the sources, in order.

    Raises:
        SpaceError: unknown operator or parameter, bounds beyond those of the operator, the wrong number
            of sources, or nothing left to search.
    """
    return Space(make_parameter_genes(config, tensors, sources), dict(models), seed, dtype)
