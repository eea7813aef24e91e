"""`meiosis status RUN` shows the nodes of a run and why some of them get no work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from command_line import meiosis

from search.manifest import _KEYS, FORMAT
from search.store.history import History
from search.store.nodes_file import NodeState, WorkersState, read_nodes, write_nodes
from search.store.run_folder import RunFolder

WORKERS = WorkersState(
    "2030-01-01 12:00:00",
    4,
    3,
    (
        NodeState("one", "aaaaaaaa", "in use", ("worker-1/11", "worker-2/12"), 1),
        NodeState("two", "bbbbbbbb", "set aside", (), 3, "3 workers died or failed there", "2030-01-01 12:09:00"),
        NodeState("three", "cccccccc", "draining", ("worker-3/13",), 0, "it is about to go", "2030-01-01 12:01:00"),
    ),
)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run that began on a cluster."""
    manifest = {key: {} for key in _KEYS} | {"format": FORMAT, "config": {"search": {"budget": 9}}}
    folder = RunFolder.create(tmp_path, "one", manifest)
    with History.open(folder.history):
        pass
    write_nodes(folder.workers, WORKERS)
    return folder


def test_status_shows_nodes_workers_deaths_and_why_a_node_gets_no_work(run: RunFolder) -> None:
    with run.lock():
        shown = meiosis("status", run.path)
    assert shown.status == 0, shown.err
    assert shown.out.splitlines()[1:5] == [
        "Workers: 3 of at most 4 up",
        "  node one (aaaaaaaa): in use, 2 workers, 1 death",
        "  node two (bbbbbbbb): set aside until 2030-01-01 12:09:00, 0 workers, 3 deaths: "
        "3 workers died or failed there",
        "  node three (cccccccc): draining, goes at 2030-01-01 12:01:00, 1 worker, 0 deaths: it is about to go",
    ]


def test_status_of_a_stopped_run_says_when_its_nodes_were_seen(run: RunFolder) -> None:
    shown = meiosis("status", run.path)
    assert "Workers: 3 of at most 4 up when it stopped, 2030-01-01 12:00:00" in shown.out


def test_status_tells_with_which_runs_the_cluster_is_shared(run: RunFolder) -> None:
    write_nodes(run.workers, replace(WORKERS, share=1, others=("soups of ann@one", "one of bob@two")))
    with run.lock():
        shown = meiosis("status", run.path)
    assert "Shares the cluster with soups of ann@one, one of bob@two: its share is 1 worker" in shown.out.splitlines()
    found = meiosis("status", run.path, "--json").json["workers"]
    assert (found["share"], found["others"]) == (1, ["soups of ann@one", "one of bob@two"])
    assert read_nodes(run.workers) == replace(WORKERS, share=1, others=("soups of ann@one", "one of bob@two"))


def test_status_as_json_has_the_nodes(run: RunFolder) -> None:
    shown = meiosis("status", run.path, "--json")
    nodes = shown.json["workers"]["nodes"]
    assert [(node["host"], node["state"], node["deaths"]) for node in nodes] == [
        ("one", "in use", 1),
        ("two", "set aside", 3),
        ("three", "draining", 0),
    ]
