"""What a worker is told to learn, as plain data; torch is not needed to say it."""

from __future__ import annotations

from dataclasses import dataclass

from search.recipe import Recipe, Rule, Value


@dataclass(frozen=True)
class LossTerm:
    """One term of the loss: `<evaluator>.<metric>` of the objective, its weight, and the width it is scaled by."""

    metric: str
    weight: float
    scale: float


@dataclass(frozen=True)
class LearnSoup:
    """Learn the weights of a soup on the search items, from those of the job's recipe.

    Attributes:
        terms: the objective. Where a metric has no gradient (accuracy), the loss of its evaluator stands for
            it (cross-entropy), not scaled.
        steps: steps of AdamW, each with the gradient over all search items.
        rate: its learning rate, constant.
        temperature: whether a factor on the logits is learned along (Wortsman 2022); it is not kept.
    """

    terms: tuple[LossTerm, ...]
    steps: int
    rate: float
    temperature: bool


def mixture(tensors: tuple[str, ...], weights: dict[str, float]) -> Rule:
    """The rule of one group: sum of w_i x_i, weights as they are."""
    sources: dict[str, dict[str, Value]] = {name: {"weight": weight} for name, weight in weights.items()}
    return Rule(tensors=tensors, operator="linear", sources=sources, parameters={"normalize": False})


def weight_key(group: int, source: str) -> str:
    """Name of a learned weight among the metrics of a trial; no evaluator can have a metric of that name."""
    return f"soup/{group}/{source}"


def weights_of(recipe: Recipe) -> list[dict[str, float]]:
    """The weight of every source, rule by rule.

    Raises:
        ValueError: a rule that is no `mixture`.
    """
    found = []
    for rule in recipe.rules:
        if rule.operator != "linear" or rule.parameters.get("normalize") is not False:
            raise ValueError(f"expected rules of `mixture`, found operator '{rule.operator}'")
        found.append({source: float(values["weight"]) for source, values in rule.sources.items()})
    return found
