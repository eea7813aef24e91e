"""What a certificate compares the winner with: the same comparisons however the run was stopped and resumed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from command_line import Ended, end, meiosis, spawn, wait_until, write_config
from family import config_of

from search.budget import Used
from search.certificate import ARMS
from search.store.events import Event, Extended, Trial
from search.store.history import History, digest
from search.store.sessions import Sessions

BUDGET = 12
ARM_NAMES = ("random_search", "placebo")


def config(family: Path, folder: Path, **certify: bool) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    made = config_of(family, folder / "results")
    made["search"] |= {"budget": BUDGET, "window": 3, "baselines": ["uniform_soup"]}
    return write_config({**made, "certify": certify}, folder)


def events(history: Path) -> list[Event]:
    with History.open(history, writable=False) as opened:
        return opened.events()


def digests(run: Path) -> dict[str, str]:
    return {path.parent.relative_to(run).as_posix(): digest(events(path)) for path in sorted(run.rglob("history"))}


class Certified(NamedTuple):
    run: Path
    ended: Ended

    @property
    def verdict(self) -> dict[str, Any]:
        return dict(json.loads(self.ended.out)["verdict"])


@pytest.fixture(scope="module")
def reference(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Certified:
    """A search with both other searches, which nothing disturbed."""
    folder = tmp_path_factory.mktemp("reference")
    ended = meiosis("search", config(family, folder, random_search=True, placebo=True), "--run", "one", "--json")
    assert ended.status == 0, ended.err
    return Certified(folder / "results" / "one", ended)


def test_random_search_and_placebo_use_as_many_item_evaluations_as_the_search(reference: Certified) -> None:
    main = Used.of(events(reference.run / "history"), Sessions(reference.run / "none"))
    for name in ARM_NAMES:
        used = Used.of(events(reference.run / "arms" / name / "history"), Sessions(reference.run / "none"))
        assert used.item_evaluations == main.item_evaluations
    arms = {arm["name"]: arm["item_evaluations"] for arm in reference.verdict["arms"]}
    assert arms == dict.fromkeys(ARM_NAMES, main.item_evaluations)


def test_random_search_takes_generation_0_over_and_placebos_are_evaluated_themselves(reference: Certified) -> None:
    def searched(history: Path) -> dict[int, Trial]:
        return {e.candidate: e for e in events(history) if isinstance(e, Trial) and e.items == "search"}

    ours = searched(reference.run / "history")
    random, placebo = (searched(reference.run / "arms" / name / "history") for name in ARM_NAMES)
    for candidate in range(5):  # parents, base, soup
        assert random[candidate].metrics == ours[candidate].metrics
        assert (random[candidate].attempts, placebo[candidate].attempts) == (0, 1)
        is_base = candidate == 3
        assert (placebo[candidate].metrics == ours[candidate].metrics) == is_base


def test_every_comparison_has_its_row_and_certify_items_are_touched_once(reference: Certified) -> None:
    rows = {row["label"]: row for row in reference.verdict["rows"]}
    assert {"random_search", "placebo", "uniform_soup", "base", "parent:cpp"} <= rows.keys()
    assert (rows["placebo"]["arm"], rows["base"]["arm"]) == ("placebo", "")
    # Merges of placebos gain nothing where sources know something.
    assert rows["placebo"]["value"] > rows["parent:cpp"]["value"]
    assert reference.verdict["missing"] == ["blend", "greedy_soup", "task_arithmetic", "slerp", "ties", "dare_ties"]
    for history in reference.run.rglob("history"):
        seen = [e.candidate for e in events(history) if isinstance(e, Trial) and e.items == "certify"]
        assert len(seen) == len(set(seen)) == (1 if "arms" in history.parts else len(rows) - 2)
    report = (reference.run / "report.md").read_text()
    card = (reference.run / "best" / "README.md").read_text()
    for text in (report, card):
        assert "| placebo |" in text
        assert "Not compared with: blend, greedy_soup" in text
        assert "Winner's curse: the objective was" in text or "No searched merge beat" in text


def test_a_driver_killed_in_the_middle_of_another_search_resumes_to_the_same_histories(
    reference: Certified, family: Path, tmp_path: Path
) -> None:
    where = "arms/placebo"
    path, run = config(family, tmp_path, random_search=True, placebo=True), tmp_path / "results" / "one"
    whole = sum(file.stat().st_size for file in (reference.run / where / "history").glob("*.arrows"))
    process = spawn("search", path, "--run", "one")
    wait_until(lambda: sum(f.stat().st_size for f in (run / where / "history").glob("*.arrows")) > whole // 2, process)
    os.kill(process.pid, signal.SIGKILL)
    end(process)
    assert not (run / "best").exists()
    shown = json.loads(meiosis("status", run, "--json").out)
    assert shown["state"] == "stopped"
    assert 0 < shown["arms"]["placebo"] < BUDGET
    resumed = meiosis("resume", run, "--json")
    assert resumed.status == 0, resumed.err
    assert digests(run) == digests(reference.run)
    assert json.loads(resumed.out)["verdict"] == reference.verdict


def test_a_finished_run_is_certified_later_to_the_same_and_keeps_its_winner(
    reference: Certified, family: Path, tmp_path: Path
) -> None:
    path, run = config(family, tmp_path), tmp_path / "results" / "one"
    first = meiosis("search", path, "--run", "one")
    assert first.status == 0, first.err
    assert f"meiosis certify {run}" in first.out
    assert not (run / "arms").exists()
    later = meiosis("certify", run, "--arms", "placebo, random_search", "--json")
    assert later.status == 0, later.err
    assert json.loads(later.out)["verdict"] == reference.verdict
    arms = {name: value for name, value in digests(reference.run).items() if name != "."}
    assert {name: value for name, value in digests(run).items() if name != "."} == arms
    assert "| placebo |" in (run / "best" / "README.md").read_text()
    before = digests(run)
    again = meiosis("certify", run, "--arms", "placebo,random_search", "--json")
    assert json.loads(again.out) == json.loads(later.out)
    assert digests(run) == before  # nothing is left to do
    # The standard merges that it lacked, and a larger budget: the other searches get as much more.
    extended = meiosis("resume", run, "--budget", BUDGET + 2, "--json")
    assert extended.status == 0, extended.err
    verdict = json.loads(extended.out)["verdict"]
    assert verdict["earlier"] == 1
    used = {arm["name"]: arm["item_evaluations"] for arm in verdict["arms"]}
    assert len({*used.values()}) == 1 < len({*used.values(), reference.verdict["arms"][0]["item_evaluations"]})
    assert sum(isinstance(event, Extended) for event in events(run / "arms" / "placebo" / "history")) == 2


def test_standard_merges_that_generation_0_lacked_get_rows(family: Path, tmp_path: Path) -> None:
    ended = meiosis("search", config(family, tmp_path, standard=True), "--run", "one", "--json")
    assert ended.status == 0, ended.err
    verdict = json.loads(ended.out)["verdict"]
    families = [row["label"].split(" ")[0] for row in verdict["rows"] if row["arm"] == "standard"]
    assert sorted(families) == ["blend", "dare_ties", "greedy_soup", "slerp", "task_arithmetic", "ties"]
    assert verdict["missing"] == ["random_search", "placebo"]


def test_an_unknown_comparison_is_named_with_those_that_there_are(reference: Certified) -> None:
    ended = meiosis("certify", reference.run, "--arms", "random")
    assert ended.status == 2
    (line,) = ended.err.splitlines()
    assert "unknown comparison 'random'" in line
    assert all(name in line for name in ARMS)
