"""Learned soup (Wortsman 2022, https://arxiv.org/abs/2203.05482, appendix I): weights by gradient.

A worker learns the weights on the search items, starting from the mean, as a step of generation 0: they come
back among the metrics of that trial and stand in the history, so that a resumed run learns nothing again.
It costs about `3 * steps` evaluations, in one worker.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from search.baseline import BaselineOptions, Facts, Generation0, Proposal, parents_by_loss
from search.errors import UserError
from search.grouping import group_tensors
from search.soups.plan import LearnSoup, LossTerm, mixture, weight_key

START = "learned_soup+start"


class LearnedSoup:
    """Weighted mean of all sources, by layer or for the whole model, with weights that gradient descent found."""

    class Options(BaselineOptions):
        """Options of `learned_soup`."""

        weights: Literal["layer", "group", "model"] = Field(
            "layer", description="what has weights of its own: every layer, every group of the space, the model"
        )
        steps: int = Field(20, ge=1, le=10_000, description="steps of AdamW, each over all search items")
        rate: float = Field(0.1, gt=0, allow_inf_nan=False, description="learning rate; 0.1 in the paper")
        temperature: bool = Field(
            False,
            description="learn a factor on the logits along, as in the paper; the merged model does not have it, so it "
            "suits objectives such as accuracy that it does not change",
        )

    def check(self, options: Options, facts: Facts) -> None:
        for metric in facts.metrics:
            name = metric.partition(".")[0]
            evaluator = facts.evaluators.get(name)
            if evaluator is not None and not evaluator.loss_metric:
                raise UserError(
                    f"needs a loss with a gradient, and evaluator '{name}' of the objective has none; take "
                    "learned_soup out, or take an evaluator such as perplexity"
                )

    def __call__(self, known: Generation0) -> Iterator[Proposal | None]:
        yield from parents_by_loss(known)  # the terms are normalised by them
        options = known.options
        share = 1 / len(known.sources)
        groups = _groups(known, options.weights)
        start = tuple(mixture(tensors, dict.fromkeys(known.sources, share)) for tensors in groups)
        terms = tuple(LossTerm(term.metric, term.weight, term.scale) for term in known.terms())
        learn = LearnSoup(terms, options.steps, options.rate, options.temperature)
        yield Proposal(START, start, dict.fromkeys(known.sources, share), step=True, learn=learn)
        while (metrics := known.metrics(START)) is None:
            yield None
        if not metrics:  # it failed, which is recorded
            return
        found = [
            {source: metrics[weight_key(index, source)] for source in known.sources} for index in range(len(groups))
        ]
        mean = {source: sum(weights[source] for weights in found) / len(found) for source in known.sources}
        rules = tuple(mixture(tensors, weights) for tensors, weights in zip(groups, found, strict=True))
        yield Proposal("learned_soup", rules, mean)


def _groups(known: Generation0, weights: str) -> list[tuple[str, ...]]:
    match weights:
        case "model":
            return [("*",)]
        case "group":
            return [group.tensors for group in known.groups]
        case _:
            return [group.tensors for group in group_tensors(known.tensors, 1, (), {})]


PLUGIN = LearnedSoup()
