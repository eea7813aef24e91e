"""What a certificate compares the winner with beside generation 0, as a config says it, and what it lacks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from search.errors import UserError, nearest

ArmName = Literal["standard", "random_search", "placebo"]

ARMS: tuple[ArmName, ...] = ("standard", "random_search", "placebo")
"""In the order in which they run: the cheapest first."""

STANDARD = ("uniform_soup", "blend", "greedy_soup", "task_arithmetic", "slerp", "ties", "dare_ties")
"""Standard merges that a full certificate has a row of, whether they were in generation 0 or not."""
PAIRS = ("blend", "slerp")
"""Those of them that take two sources."""


class CertifyConfig(BaseModel):
    """What the winner is compared with on the certify items, beside the parents and the baselines of generation 0."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    standard: bool = Field(
        False,
        description="the standard merges that generation 0 did not have, out of 0.5 blend, uniform and greedy soup, "
        "task arithmetic, SLERP, TIES and DARE-TIES; costs their evaluations, and those of parents that the search "
        "scored on some of the items",
    )
    random_search: bool = Field(
        False,
        description="random search with as many item-evaluations as the search used, of which it shares generation 0, "
        "or only parents and base where candidates were scored on parts of the items; costs about as much as the "
        "search",
    )
    placebo: bool = Field(
        False,
        description="the same search once more with placebos for sources: the base plus random changes that are as "
        "large, tensor by tensor, as those of the sources; costs as much as the search",
    )

    @property
    def arms(self) -> tuple[ArmName, ...]:
        """The comparisons that are wanted, in the order in which they run."""
        return tuple(name for name in ARMS if getattr(self, name))


def arms_named(names: Sequence[str]) -> tuple[ArmName, ...]:
    """Arms as the user names them, each once, in the order in which they run.

    Raises:
        UserError: no such arm.
    """
    for name in names:
        if name not in ARMS:
            raise UserError(f"--arms: unknown comparison '{name}'{nearest(name, ARMS)}; there are {', '.join(ARMS)}")
    return tuple(name for name in ARMS if name in names)


def missing_comparisons(families: Collection[str], sources: int) -> tuple[str, ...]:
    """What a full certificate would compare the winner with as well.

    Args:
        families: what stands before the first blank in the labels that were compared, or tried in vain.
        sources: number of sources; of one there is no pair, and of two the uniform soup is the 0.5 blend.
    """
    wanted = [name for name in STANDARD if sources > 1 or name not in PAIRS]
    if sources == 2 and "uniform_soup" in families:
        wanted.remove("blend")
    return tuple(name for name in (*wanted, "random_search", "placebo") if name not in families)
