"""Which optimiser a search has whose config leaves it open, and the keys of those that it names."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, Field, create_model

from search.config import Config, OptimizerConfig
from search.genome import Gene
from search.optimizer import options_class
from search.space import Space

AUTO = "auto"

_SOME_GENES = 64


def chosen_optimizer(config: Config, space: Space | None) -> OptimizerConfig:
    """The `search.optimizer` section with `auto` replaced by a name; without a space, which is at fault, as it is."""
    section = config.search.optimizer
    if section.name != AUTO:
        return section
    name, _ = best_for(() if space is None else space.genes, front=config.objectives.search == "pareto")
    return section.model_copy(update={"name": name})


def best_for(genes: Sequence[Gene], *, front: bool = False) -> tuple[str, str]:
    """The optimiser for a genome, and why in a few words; as `benchmarks/optimizers.py` and
    `benchmarks/search_quality.py` measured it.

    Args:
        front: whether a front is searched and not one best candidate.

    Some dozens of numbers are best modelled, from scores on parts of the items; an evolution strategy is best at more
    of them. Where genes have no order (operators, sources that take part) members that mate get much further.
    """
    if front:
        return "nsga2", "a front is searched"
    unordered = sum(not gene.ordered for gene in genes)
    if unordered:
        return "natural_niches", f"{unordered} of {len(genes)} genes are choices without an order"
    if len(genes) <= _SOME_GENES:
        return "gaussian_process", f"{len(genes)} genes, all of them numbers"
    return "diagonal_cma", f"{len(genes)} genes, all of them numbers"


def optimizer_keys(name: str) -> type[BaseModel]:
    """All keys of an optimiser's section, those of its options included."""
    return create_model("Keys", __base__=options_class(name), name=(str, Field("")), step=(float, Field(0.1)))
