"""The landscape with a loss for every item, for drivers whose candidates are scored on some of the items."""

from __future__ import annotations

import numpy as np
from landscape import Shuffled, loss_of
from unscored import Unscored

from evaluators.base import Scores
from search.pool import Failure, Job, Outcome
from search.racing.ladder import item_order

ITEMS, WINDOW, SEED = 120, 4, 3
HARD = np.random.default_rng(0).exponential(1.0, ITEMS)
# Zero for the parents, so that nothing foretells it.
NOISY = np.random.default_rng(1).normal(0, 0.3, (ITEMS, 3))
WEIGHTS = np.ones(ITEMS)
TABLE = Unscored(ITEMS)


def run(job: Job) -> Outcome:
    """What `search.evaluation` does, with a formula for a model; every eleventh candidate fails."""
    if job.candidate % 11 == 9:
        return Outcome(job.candidate, job.items, failure=Failure("error", "every eleventh fails"))
    items = tuple(TABLE.items(job.items))
    shares = [float(job.recipe.rules[0].sources.get(name, {}).get("weight", 0.0)) for name in ("a", "b", "c")]
    losses = HARD + 2 * loss_of(job.recipe) + NOISY @ (np.array(shares) * np.roll(shares, 1))
    race, chosen, censored = job.race, items, False
    scores: dict[str, Scores] = {}
    for rung, sizes in enumerate([{"e": ITEMS}] if race is None else race.rungs):
        if race is not None:
            chosen = tuple(race.chosen("e", item_order(SEED, "e", items)))[: sizes["e"]]
        places = [items.index(item) for item in chosen]
        scores = {"e": Scores(chosen, {"loss": losses[places]}, WEIGHTS[places])}
        if race is not None and race.stops(rung, scores):
            censored = True
            break
    mean = float(scores["e"].values["loss"].mean())
    sha = job.recipe.hash if job.hash_weights else None
    return Outcome(job.candidate, job.items, scores, {"e.loss": mean}, weights_sha256=sha, censored=censored)


class Racing(Shuffled):
    """Workers that do that; counts the items that they scored for the search."""

    def __init__(self, workers: int, seed: int) -> None:
        super().__init__(workers, seed, self._counted)
        self.items = 0

    def _counted(self, job: Job) -> Outcome:
        outcome = run(job)
        if job.items == "search":
            self.items += len(outcome.scores["e"].items) if outcome.scores else job.race.items if job.race else ITEMS
        return outcome
