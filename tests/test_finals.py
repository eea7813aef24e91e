"""Choosing on the select items and certifying: what is called better, and what is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from landscape import Landscape, Shuffled, population
from unscored import Unscored

from evaluators.base import ItemPool, Scores
from search.config import Constraint
from search.driver import Driver, Limits
from search.errors import RunError
from search.finals import finish
from search.pool import Job, Outcome
from search.store.events import End
from search.store.history import History
from search.store.spool import Spool
from search.verdict import Verdict


class Known(Unscored):
    """The evaluator of the landscape, as the driver's side sees it: it only knows documents."""

    def __init__(self, documents: int) -> None:
        super().__init__()
        self._documents = documents

    def document_of(self, item: str) -> str:
        return str(int(item.lstrip("abcdefghijklmnopqrstuvwxyz")) % self._documents)


def search(
    folder: Path,
    *,
    budget: int = 100,
    documents: int = 20,
    constraints: tuple[Constraint, ...] = (),
    harm: Mapping[ItemPool, float] | None = None,
) -> tuple[Verdict, Driver]:
    """`harm`: by how much merges of the optimiser are worse on the items of a pool than they are elsewhere."""
    with History.open(folder / "history") as history:
        made = population(budget=budget, constraints=constraints)

        def body(job: Job) -> Outcome:
            outcome = Landscape().run(job)
            more = (harm or {}).get(job.items, 0.0) if made.candidate(job.candidate).genome is not None else 0.0
            if not more or outcome.failure:
                return outcome
            block = outcome.scores["e"]
            losses = block.values["loss"] + more
            scores = {"e": Scores(block.items, {"loss": losses}, block.weights)}
            return replace(outcome, scores=scores, metrics={"e.loss": float(losses.mean())})

        driver = Driver(made, history, Spool(folder / "spool"), lambda: Shuffled(1, 0, body), Limits(budget, 4))
        driver.search()
        verdict = finish(driver, {"e": Known(documents)}, finalists=4, seed=0)
        ends = [event for event in history.events() if isinstance(event, End)]
    assert [end.winner for end in ends] == [verdict.winner]
    assert Verdict.from_json(ends[0].verdict) == verdict
    return verdict, driver


def test_a_found_merge_that_is_better_everywhere_is_proven(tmp_path: Path) -> None:
    verdict, driver = search(tmp_path)
    assert verdict.proven
    assert "beats every parent and every baseline" in verdict.sentence()
    assert verdict.rows[-1].candidate == verdict.winner
    assert all((row.difference or 0) < 0 for row in verdict.rows[:-1])
    families = {row.label.split(" ")[0] for row in verdict.rows[:-1]} | set(verdict.unavailable)
    assert {"parent:a", "parent:b", "parent:c", "base", "uniform_soup", "greedy_soup", "ties"} <= families
    certified = [candidate for candidate, items in driver.trials if items == "certify"]
    assert len(certified) == len(set(certified)) == len(verdict.rows) + len(verdict.unavailable)


def test_only_the_winner_and_the_best_of_every_baseline_see_the_certify_items(tmp_path: Path) -> None:
    _, driver = search(tmp_path)
    seen = {
        driver.population.candidates[id_].origin.split(" ")[0] for id_, items in driver.trials if items == "certify"
    }
    searched = [id_ for id_, items in driver.trials if items == "certify" and driver.population.candidates[id_].genome]
    assert len(searched) == 1
    assert "task_arithmetic" in seen
    assert not any(origin.startswith("greedy_soup+") for origin in seen)


def test_few_documents_prove_nothing(tmp_path: Path) -> None:
    verdict, _ = search(tmp_path, documents=3)
    assert not verdict.proven
    assert "3 certify document(s) prove nothing" in verdict.sentence()


def test_a_merge_that_is_behind_on_the_certify_items_is_said_not_to_beat_those_before_it(tmp_path: Path) -> None:
    verdict, _ = search(tmp_path, harm={"certify": 0.05})
    winner = verdict.rows[-1]
    ahead = [row.label for row in verdict.rows[:-1] if row.value <= winner.value]
    assert winner.candidate == verdict.winner
    assert 0 < len(ahead) < len(verdict.rows) - 1
    assert not verdict.proven
    assert verdict.sentence().startswith(f"The found merge does not beat {', '.join(ahead)} on the certify items.")


def test_a_lead_that_may_be_chance_is_called_so(tmp_path: Path) -> None:
    plain, _ = search(tmp_path / "plain")
    lead = min(-row.difference for row in plain.rows[:-1] if row.difference is not None)
    verdict, _ = search(tmp_path / "close", harm={"certify": lead - 5e-4})
    close = [row for row in verdict.rows[:-1] if row.p is not None and row.p >= 0.01]
    assert close
    assert not verdict.proven
    assert f"but against {', '.join(row.label for row in close)} that may be chance" in verdict.sentence()


def test_merges_that_no_baseline_is_worse_than_on_the_select_items_are_not_exported(tmp_path: Path) -> None:
    verdict, driver = search(tmp_path, harm={"select": 0.5})
    assert driver.population.candidate(verdict.winner).genome is None
    assert not verdict.proven
    assert verdict.sentence().startswith(f"No searched merge beat the baseline '{verdict.label}' on the select items")


def test_a_budget_without_a_search_says_that_nothing_was_searched(tmp_path: Path) -> None:
    verdict, _ = search(tmp_path, budget=12)
    assert not verdict.proven
    assert verdict.sentence().startswith("Nothing was searched")


def test_a_constraint_that_no_baseline_keeps_leaves_the_found_merge(tmp_path: Path) -> None:
    plain, _ = search(tmp_path / "plain")
    rows = {row.label: row.value for row in plain.rows}
    best_baseline = min(value for label, value in rows.items() if "found" not in label)
    bound = Constraint(metric="e.loss", relation="<=", bound=(best_baseline + plain.rows[-1].value) / 2)
    verdict, _ = search(tmp_path / "bound", constraints=(bound,))
    assert verdict.searched
    assert verdict.best_baseline is None
    assert not any(row.feasible for row in verdict.rows[:-1])
    assert verdict.rows[-1].feasible


def test_constraints_that_nothing_keeps_end_in_an_error_that_says_so(tmp_path: Path) -> None:
    impossible = Constraint(metric="e.loss", relation="<=", bound=-1.0)
    with pytest.raises(RunError, match="no candidate keeps the constraints"):
        search(tmp_path, constraints=(impossible,))
