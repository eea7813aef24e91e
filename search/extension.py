"""More, or less, of a budget for a run that exists: checked and said."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from search.budget import Budget, Used, budget_in_force, end_in_force, limit_in_force, refuse_useless
from search.errors import UserError
from search.optimizer import OPTIMIZERS
from search.setup import Setup, first_problem
from search.store.events import Event, Extended
from search.store.sessions import Sessions


def items_per_candidate(setup: Setup) -> int:
    """Item-evaluations that a candidate of the search costs."""
    return sum(len(evaluator.items("search")) for evaluator in setup.evaluators.values())


def extend(
    setup: Setup, events: Sequence[Event], sessions: Sessions, changes: Mapping[str, Any], report: Callable[[str], None]
) -> tuple[Budget, Extended | None]:
    """The budget of a run after the user's changes, and the event to record; without changes the one it has.

    The optimiser stays the one that was made for the budget at the start, so what it proposes does not depend
    on how often a run was extended. In ordered commit an extended run asks for the same candidates as one that
    had the larger budget from its start, unless the optimiser paces itself by its budget; that is said.

    Args:
        changes: see `Budget.changed`.

    Raises:
        UserError: a value that is none, or that allows nothing more than was used.
    """
    start = Budget.of(setup.config.search)
    before = budget_in_force(start, events)
    if not changes:
        return before, None
    if setup.config.search.baselines_only and "budget" in changes:
        raise UserError("--budget: this run is of baselines only, it has no budget; start one with `meiosis search`")
    after = before.changed(changes)
    if after == before:
        return before, None
    ended = end_in_force(events) is not None or limit_in_force(events) is not None
    items = items_per_candidate(setup)
    refuse_useless(after, Used.of(events, sessions, items), ended, items)
    if end_in_force(events) is not None:
        report(
            "the run goes on from its end; its verdict stays in the history, the model is replaced when a new one is"
        )
    if paced(setup, after):
        report(
            f"optimizer {setup.config.search.optimizer.name} paces itself by its budget and was made for "
            f"{setup.config.search.budget} candidates: a run with the larger budget from its start would propose others"
        )
    return after, Extended(after.to_json())


def paced(setup: Setup, budget: Budget) -> bool:
    """Whether the optimiser proposes other candidates under another budget, as far as a short rehearsal shows it."""
    search = setup.config.search
    if budget.candidates is None or search.optimizer.name in OPTIMIZERS.names() or ":" in search.optimizer.name:
        return False
    from search.nevergrad_box import paced_by_budget

    return paced_by_budget(search.optimizer.name, first_problem(setup.config, setup.space), budget.candidates)
