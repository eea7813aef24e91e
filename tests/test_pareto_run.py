"""A search for a front, from the config to the model that is picked from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import meiosis
from family import config_of, family  # noqa: F401 - a fixture

from evaluators.base import Metric
from search.config import ObjectivesConfig
from search.objective import make_objective
from search.pareto.front import front_of
from search.pareto.pick import choose, parse_pick
from search.store.events import End, Trial
from search.store.history import History
from search.store.run_folder import RunFolder

TERMS = ["python.nll", "english.nll", "cost.layers"]


def front_config(family: Path, results: Path) -> dict[str, Any]:  # noqa: F811
    config = config_of(family, results)
    config["evaluators"].pop("cpp")
    config["evaluators"]["cost"] = {"use": "cost"}
    config["objectives"] = {"search": "pareto", "terms": TERMS}
    config["search"] = {"budget": 24, "finalists": 3, "baselines": ["uniform_soup", "task_arithmetic"]}
    return config


@pytest.fixture(scope="module")
def run(family: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:  # noqa: F811
    folder = tmp_path_factory.mktemp("pareto")
    (folder / "search.yaml").write_text(yaml.safe_dump(front_config(family, folder / "results")))
    ended = meiosis("search", folder / "search.yaml", "--run", "front")
    assert ended.status == 0, ended.err
    return RunFolder(folder / "results" / "front")


def trials(run: RunFolder, items: str) -> dict[int, Trial]:
    return {e.candidate: e for e in run.events() if isinstance(e, Trial) and e.items == items and not e.failure_kind}


def beats(one: Trial, other: Trial) -> bool:
    a, b = ([trial.metrics[name] for name in TERMS] for trial in (one, other))
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


def by_hand(found: dict[int, Trial]) -> set[int]:
    return {id_ for id_, trial in found.items() if not any(beats(other, trial) for other in found.values())}


def test_status_shows_the_hypervolume_and_the_size_of_the_front(run: RunFolder) -> None:
    shown = meiosis("status", run.name, "--results", run.path.parent, "--json").json
    distinct = {
        tuple(t.metrics[n] for n in TERMS)
        for i, t in trials(run, "search").items()
        if i in by_hand(trials(run, "search"))
    }
    assert shown["front"] == len(distinct)
    assert shown["hypervolume"] > 0
    words = meiosis("status", run.name, "--results", run.path.parent).out
    assert f"Front: {len(distinct)} points, hypervolume {shown['hypervolume']:.4f}" in words
    line = meiosis("status", run.name, "--results", run.path.parent, "--watch").out
    assert f"front {len(distinct)}, hypervolume {shown['hypervolume']:.4f}" in line


def test_the_log_follows_a_hypervolume_that_never_shrinks(run: RunFolder) -> None:
    log = [json.loads(line) for line in run.events_log.read_text().splitlines()]
    volumes = [event["hypervolume"] for event in log if event["event"] == "trial" and "hypervolume" in event]
    assert volumes == sorted(volumes)
    assert volumes[-1] > volumes[0] > 0


def test_the_optimiser_of_a_front_is_nsga2_where_the_config_names_none(run: RunFolder) -> None:
    assert run.manifest()["config"]["search"]["optimizer"]["name"] == "nsga2"


def test_the_finalists_are_on_the_front_and_the_winner_is_the_knee_on_the_select_items(run: RunFolder) -> None:
    from search.pareto.knee import knee

    searched, selected = trials(run, "search"), trials(run, "select")
    origins = {event.candidate: event.origin for event in run.events() if not isinstance(event, Trial | End)}  # type: ignore[union-attr]
    found = {id_: trial for id_, trial in searched.items() if origins[id_] == "search"}
    finalists = {id_ for id_ in selected if origins[id_] == "search"}
    assert finalists
    assert len(finalists) <= 3
    assert finalists <= by_hand(found)
    end = next(event for event in run.events() if isinstance(event, End))
    import numpy as np

    front = sorted(by_hand(selected))
    losses = np.array([[selected[id_].metrics[name] for name in TERMS] for id_ in front])
    assert tuple(selected[end.winner or 0].metrics[n] for n in TERMS) == tuple(losses[knee(losses)])


def test_the_report_lists_the_front_and_says_how_the_chosen_point_compares_term_by_term(run: RunFolder) -> None:
    report = run.report.read_text()
    end = next(event for event in run.events() if isinstance(event, End))
    assert "## Front" in report
    assert "Hypervolume on the search items" in report
    assert f"| {end.winner} | " in report
    assert "(chosen)" in report
    assert "Chosen as the knee of the" in report
    assert "Term by term: python.nll" in report
    picture = (run.path / "front.html").read_text()
    assert "front, select items" in picture
    assert 'src="http' not in picture


def test_an_exact_metric_does_not_count_as_too_few_documents(run: RunFolder) -> None:
    end = next(event for event in run.events() if isinstance(event, End))
    assert json.loads(end.verdict)["documents"] == 14


def test_export_picks_from_the_front_what_was_asked_for(run: RunFolder, tmp_path: Path) -> None:
    from search.checkpoints.writing import written_sha256

    selected = trials(run, "select")
    front = by_hand(selected)
    best = min(front, key=lambda id_: (selected[id_].metrics["english.nll"], id_))
    bound = selected[best].metrics["python.nll"] + 1e-6
    wanted = f"python.nll <= {bound!r}, min english.nll, layers <= 2"
    done = meiosis("export", run.name, tmp_path / "out", "--results", run.path.parent, "--pick", wanted, "--json")
    assert done.status == 0, done.err
    chosen = done.json["trial"]
    assert selected[chosen].metrics["english.nll"] == selected[best].metrics["english.nll"]
    assert written_sha256(tmp_path / "out") == selected[chosen].weights_sha256
    assert f"picked trial {chosen}" in done.err
    assert f"english.nll {selected[chosen].metrics['english.nll']:.6g}" in done.err
    assert "on the select items" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pick", "min nlll"], "no evaluator gives 'nlll'; did you mean"),
        (["--pick", "min nll"], "metric 'nll' is given by 2 evaluators; write one of english.nll, python.nll"),
        (["--pick", "layers >= 3, knee"], "keeps cost.layers >= 3; the closest is trial"),
        (["--pick", "layers <= 2"], "found no goal, expected exactly one of min, max and knee"),
        (["--pick", "knee", "--trial", "3"], "--trial and --pick both say which trial"),
    ],
)
def test_what_cannot_be_picked_is_said_in_one_line(
    run: RunFolder, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = meiosis("export", run.name, tmp_path / "out", "--results", run.path.parent, *arguments)
    assert done.status != 0
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_finished_run_replays_its_front(run: RunFolder) -> None:
    """`resume` compares every ask with what NSGA-II asks now."""
    before = run.events()
    done = meiosis("resume", run.path)
    assert done.status == 0, done.err
    assert run.events() == before


def test_a_pick_of_a_config_is_checked_before_anything_is_spent(family: Path, tmp_path: Path) -> None:  # noqa: F811
    config = front_config(family, tmp_path / "results")
    config["objectives"]["pick"] = "python.nll <= 3, min layerss"
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(config))
    done = meiosis("search", tmp_path / "search.yaml")
    assert "objectives.pick: no evaluator gives 'layerss'; did you mean 'layers'" in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_random_search_beside_a_front_chooses_its_point_as_the_main_search_does(run: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "front")
    ended = meiosis("certify", "front", "--results", tmp_path, "--arms", "random_search", "--json")
    assert ended.status == 0, ended.err
    (row,) = [row for row in ended.json["verdict"]["rows"] if row["arm"] == "random_search"]
    with History.open(tmp_path / "front" / "arms" / "random_search" / "history", writable=False) as history:
        seen = {e.candidate: e for e in history.events() if isinstance(e, Trial) and e.items == "select"}
    origins = {id_: "search" for id_ in seen}
    directions = {name: Metric("minimize") for name in TERMS}
    objective = make_objective(ObjectivesConfig.model_validate({"search": "pareto", "terms": TERMS}), [], directions)
    parents = [trials(run, "search")[id_].metrics for id_ in (0, 1, 2)]
    points = front_of(seen.values(), objective.against(parents), origins, "select")
    assert row["candidate"] == choose(points, parse_pick("knee")).candidate
    assert "Term by term:" in ended.json["verdict"]["sentence"]
