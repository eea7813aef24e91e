"""The space: named genes, and the way from a genome to a recipe."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from search.baseline import soup_rule
from search.config import SpaceConfig
from search.genome import Gene, Genome
from search.grouping import Group, group_tensors
from search.operator_ranges import SpaceError
from search.parameter_genes import ParameterGenes, make_parameter_genes
from search.paths.config import MERGED
from search.paths.genes import Path, PathGenes, make_path_genes
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
        path: the genes that say which layers run, if that is searched.
    """

    parameters: ParameterGenes
    models: Mapping[str, ModelRef]
    seed: int
    dtype: str | None
    path: PathGenes | None = None

    @cached_property
    def genes(self) -> tuple[Gene, ...]:
        """The searched numbers, in the order of a genome: those of parameters, then those of the path."""
        return (*self.parameters.genes, *(self.path.genes if self.path is not None else ()))

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
        values, on_path = self._values(genome), self._path_of(genome)
        if self.path is None or on_path is None:
            return self._recipe_with(values)
        if self.path.is_plain(on_path):
            return self.recipe((soup_rule((self.path.first,)),))
        merged = self.parameters.rules(iter(values)) if MERGED in self.path.config.pool else ()
        return self.recipe(
            self.path.rules(on_path, merged), self.path.layers(on_path, tuple(self.models)), on_path.scales
        )

    def _path_of(self, genome: Genome) -> Path | None:
        """The path of a genome, None where it is the merge as it is."""
        if self.path is None:
            return None
        found = self.path.decode(genome.coordinates[len(self.parameters.genes) :])
        return None if self.path.first == MERGED and self.path.is_plain(found) else found

    def recipe_hash(self, genome: Genome) -> str | None:
        """`decode(genome).hash`, in a fraction of the time: the driver needs it for every candidate. None where there
        is no faster way than that.

        Raises:
            ValueError: a genome of another length.
        """
        if not self.parameters.fixed_structure or self._path_of(genome) is not None:
            return None
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
        marks = [f"\0{number}\0" for number in range(len(self.parameters.genes))]
        first, *rest = re.split(r'"\\u0000(\d+)\\u0000"', self._recipe_with(marks).hashed_text)
        return first, *((int(gene), piece) for gene, piece in zip(rest[::2], rest[1::2], strict=True))

    def _values(self, genome: Genome) -> list[Value]:
        if len(genome.coordinates) != len(self.genes):
            raise ValueError(f"genome has {len(genome.coordinates)} genes, this space has {len(self.genes)}")
        return [gene.value(x) for gene, x in zip(self.parameters.genes, genome.coordinates, strict=False)]

    def _recipe_with(self, searched: Iterable[Value]) -> Recipe:
        """The recipe in which the searched parameters have these values, in the order of the genes."""
        return self.recipe(self.parameters.rules(iter(searched)))

    def recipe(
        self,
        rules: tuple[Rule, ...],
        layers: tuple[dict[str, int], ...] | None = None,
        scales: tuple[float, ...] | None = None,
    ) -> Recipe:
        """A recipe of this space's models with other rules, as the baselines make them."""
        return Recipe(
            base="base",
            models=dict(self.models),
            rules=rules,
            dtype=self.dtype,
            seed=self.seed,
            layers=layers,
            scales=scales,
        )

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
        if coordinates is None:
            return None
        return Genome((*coordinates, *(self.path.initial() if self.path is not None else ())))


def make_space(
    config: SpaceConfig,
    *,
    tensors: Iterable[str],
    models: Mapping[str, ModelRef],
    sources: Iterable[str],
    seed: int = 0,
    dtype: str | None = None,
    model_config: Mapping[str, Any] | None = None,
) -> Space:
    """Build the space of a config.

    Args:
        config: the `space` section.
        tensors: tensor names of the base.
        models: `base` and the sources.
        sources: names of the sources, in order.
        model_config: `config.json` of the base; needed where paths are searched.

    Raises:
        SpaceError: unknown operator or parameter, bounds beyond those of the operator, the wrong number
            of sources, nothing left to search, or models whose layers cannot form a path.
    """
    tensors, sources = tuple(tensors), tuple(sources)
    if config.path is None:
        return Space(make_parameter_genes(config, tensors, sources), dict(models), seed, dtype)
    path = make_path_genes(config.path, tensors, sources, model_config or {})
    if MERGED in config.path.pool:
        parameters = make_parameter_genes(config, tensors, sources, may_be_none=config.path.stage == "together")
    elif config.parameters:
        raise SpaceError(
            ("parameters",),
            f"are those of a merge, and '{MERGED}' is not in space.path.pool; put it there, or go without",
        )
    else:
        groups = group_tensors(tensors, config.layers_per_group, config.split, config.patterns)
        parameters = ParameterGenes((), groups, (), sources, ())
    return Space(parameters, dict(models), seed, dtype, path)
