"""The section `space.path` of a config."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MERGED = "merged"
"""What a pool calls the merge that the other genes make."""


class ScalesConfig(BaseModel):
    """Factors on the hidden state on its way from one layer of the path to the next."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    by: Literal["none", "slot", "pair", "network"] = Field(
        "slot",
        description="what has a factor of its own. none: all are 1; slot: every layer of every repeat, on entry; pair: "
        "every two layers of the pool, one after the other; network: none, a small network computes them",
    )
    low: float = Field(0.8, allow_inf_nan=False, description="smallest factor, at most 1; may be negative")
    high: float = Field(1.25, allow_inf_nan=False, description="largest factor, at least 1")
    limit: float = Field(
        8.0, ge=1, allow_inf_nan=False, description="the product of all factors so far stays in [1 / limit, limit]"
    )
    hidden: int = Field(4, ge=1, le=64, description="hidden units of the network")

    @model_validator(mode="after")
    def _start_at_one(self) -> Self:
        if not (self.low <= 1 <= self.high and self.low < self.high):
            raise ValueError(f"the search starts at 1; expected low <= 1 <= high, found {self.low:g} and {self.high:g}")
        return self


def _named(value: Any) -> Any:
    return {"by": value} if isinstance(value, str) else value


class PathConfig(BaseModel):
    """Which layers run, in which order (data-flow space, Akiba 2025)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pool: tuple[str, ...] = Field(
        (MERGED,),
        min_length=1,
        description="whose layers may be on the path: merged (what the operator makes), base, or names of sources; "
        "the search starts at the first, which also gives embedding and head",
    )
    repeats: int = Field(
        2, ge=1, le=64, description="how often the layers of the pool are offered, one after the other"
    )
    scales: Annotated[ScalesConfig, BeforeValidator(_named)] = ScalesConfig()
    pinned: bool = Field(
        True,
        description="whether every path begins with the first layer of the first of the pool and ends with its last",
    )
    min_length: int | None = Field(None, ge=1, description="fewest layers of a path")
    max_length: int | None = Field(None, ge=1, description="most layers of a path; by default all that are offered")
    margin: float = Field(
        0.15, gt=0, lt=0.5, description="how far from its threshold the choice of a layer is at the start, of 1 in all"
    )
    stage: Literal["together", "after"] = Field(
        "together",
        description="together: merge and path in one search; after: first the merge, then paths of the best merge",
    )
    share: float = Field(0.5, gt=0, lt=1, description="of the budget, for the merge; stage: after only")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        double = [name for name in self.pool if self.pool.count(name) > 1]
        if double:
            raise ValueError(f"pool: '{double[0]}' stands twice; set repeats to offer layers more than once")
        if self.min_length is not None and self.max_length is not None and self.min_length > self.max_length:
            raise ValueError(f"min_length {self.min_length} is above max_length {self.max_length}")
        if self.stage == "after" and MERGED not in self.pool:
            raise ValueError(f"stage: after searches paths of the best merge, so '{MERGED}' must be in the pool")
        return self
