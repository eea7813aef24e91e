"""How many items the fitness of a candidate takes, as a config has it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Estimate = Literal["none", "auto", "control_variate", "p_irt", "gp_irt"]


class FitnessConfig(BaseModel):
    """On how many of the search items a candidate is scored, and what is made of the scores."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    racing: bool = Field(
        False,
        description="score candidates on subsets of the search items that grow as the search converges, and stop those "
        "that are worse than the best so far beyond chance; parents and base are always scored on all items. Where a "
        "front is searched, whoever is not stopped is scored on all items, so that the front is exact, and only those "
        "are stopped that a member of the front beats in every term beyond chance",
    )
    rotate: bool | None = Field(
        None,
        description="score every candidate on one part of the search items, each on another part, and now and then the "
        "best on all of them; by default true with an optimiser that puts parts together (gaussian_process), where "
        "every metric of the objective has values per item and none has both a lowest and a highest value (right and "
        "wrong answers tell too little on a part), there are no constraints and estimate is not p_irt or gp_irt, with "
        "which it cannot be used",
    )
    estimate: Estimate = Field(
        "auto",
        description="how scores of a subset, or of a part, become metrics of all items. none: the mean of the subset; "
        "control_variate: regression on what candidates did that have all items, as the base has; p_irt, gp_irt: "
        "item-response models of 0/1 scores, not with rotate; auto: control_variate, which was the best of them in "
        "simulations",
    )
    first: float = Field(
        0.05,
        gt=0,
        le=1,
        description="share of an evaluator's search items on which racing scores the first candidates, or of a part",
    )
    smallest: int = Field(
        8,
        ge=2,
        description="fewest items per evaluator in racing; evaluators with at most so many are always scored whole. "
        "A part of rotate has fewer, at least 3",
    )
    parents: float = Field(
        0.25,
        gt=0,
        le=1,
        description="rotate scores each parent on the fewest parts that are more than this share of the search items, "
        "the base on all; always 1 where objectives.normalize measures everything by the parents, and in order of "
        "arrival",
    )
    growth: float = Field(
        1.5, gt=1, le=100, allow_inf_nan=False, description="factor between one number of items and the next one"
    )
    confidence: float = Field(
        0.95,
        gt=0.5,
        lt=1,
        description="a candidate is stopped when it is worse with this confidence, however often that is looked at",
    )
    precision: float = Field(
        0.5,
        gt=0,
        allow_inf_nan=False,
        description="the subset grows when the standard error of a comparison exceeds this share of the spread of the "
        "latest candidates; a search for a front always goes on to all items",
    )
