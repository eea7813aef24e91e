"""How a cluster is shared between runs: a pure function, the same for every driver."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.need import Need, Room
from cluster.shares import Claim, Placement, dominant_share, share_out

Nodes = dict[str, dict[str, float]]

NEEDS = st.one_of(
    st.builds(Need, cpus=st.integers(1, 4), gpus=st.just(0)),
    st.builds(Need, cpus=st.integers(1, 2), gpus=st.sampled_from([0.25, 1 / 3, 0.5, 0.6, 1, 2, 4])),
)


def nodes_of(sizes: list[tuple[int, int]]) -> Nodes:
    return {f"n{i}": {"CPU": float(cpus), "GPU": float(gpus)} for i, (cpus, gpus) in enumerate(sizes)}


WHOLE = st.builds(Need, cpus=st.integers(1, 4), gpus=st.sampled_from([0, 1, 2, 4]))
CLUSTERS = st.lists(st.tuples(st.integers(1, 16), st.integers(0, 8)), min_size=1, max_size=5).map(nodes_of)


@st.composite
def claims(draw: st.DrawFn, needs: st.SearchStrategy[Need] = NEEDS) -> list[Claim]:
    count = draw(st.integers(1, 5))
    names = st.frozensets(st.sampled_from(["n0", "n1", "n2"]), max_size=1)
    return [Claim(f"r{i}", draw(needs), draw(st.integers(0, 40)), draw(names)) for i in range(count)]


def totals(nodes: Nodes) -> tuple[float, float]:
    return sum(n["CPU"] for n in nodes.values()), sum(n["GPU"] for n in nodes.values())


def counts(found: dict[str, Placement]) -> dict[str, int]:
    return {run: sum(placement.values()) for run, placement in found.items()}


@settings(max_examples=300, deadline=None)
@given(CLUSTERS, claims())
def test_no_node_gives_more_than_it_has_and_no_run_gets_more_than_it_wants(nodes: Nodes, asked: list[Claim]) -> None:
    found = share_out(nodes, asked)
    assert set(found) == {claim.id for claim in asked}
    for claim in asked:
        assert sum(found[claim.id].values()) <= claim.wanted
        assert not set(found[claim.id]) & claim.avoids
    for node, resources in nodes.items():
        held = [(claim.need, found[claim.id].get(node, 0)) for claim in asked]
        assert sum(need.cpus * count for need, count in held) <= resources["CPU"] + 1e-4
        assert sum(need.gpus * count for need, count in held) <= resources["GPU"] + 1e-4
        whole = sum(int(need.gpus) * count for need, count in held if need.gpus >= 1)
        for need in {need for need, _ in held if 0 < need.gpus < 1}:
            of_it = sum(count for other, count in held if other == need)
            assert of_it <= need.fits({"CPU": 1e9, "GPU": resources["GPU"] - whole}, 10**9)


@settings(max_examples=300, deadline=None)
@given(CLUSTERS, claims(WHOLE))
def test_no_room_is_left_that_a_run_could_use(nodes: Nodes, asked: list[Claim]) -> None:
    found = share_out(nodes, asked)
    rooms = {node: Room(resources) for node, resources in nodes.items()}
    for claim in asked:
        for node, count in found[claim.id].items():
            for _ in range(count):
                assert rooms[node].holds(claim.need)
                rooms[node].take(claim.need)
    for claim in asked:
        if sum(found[claim.id].values()) < claim.wanted:
            assert not any(room.holds(claim.need) for node, room in rooms.items() if node not in claim.avoids)


@settings(max_examples=300, deadline=None)
@given(CLUSTERS, NEEDS, st.integers(1, 60))
def test_a_run_that_is_alone_gets_all_that_it_wants_and_that_fits(nodes: Nodes, need: Need, wanted: int) -> None:
    found = share_out(nodes, [Claim("a", need, wanted)])
    assert counts(found)["a"] == min(wanted, sum(need.fits(resources, 10**6) for resources in nodes.values()))


@settings(max_examples=200, deadline=None)
@given(CLUSTERS, claims(), st.randoms(use_true_random=False))
def test_the_order_of_claims_and_nodes_does_not_matter(nodes: Nodes, asked: list[Claim], chance: random.Random) -> None:
    found = share_out(nodes, asked)
    mixed_nodes = list(nodes.items())
    chance.shuffle(mixed_nodes)
    mixed = list(asked)
    chance.shuffle(mixed)
    assert share_out(dict(mixed_nodes), mixed) == found


@settings(max_examples=300, deadline=None)
@given(CLUSTERS, NEEDS, st.lists(st.integers(0, 30), min_size=1, max_size=6))
def test_runs_of_equal_needs_differ_by_one_worker_at_most_unless_they_want_fewer(
    nodes: Nodes, need: Need, wanted: list[int]
) -> None:
    asked = [Claim(f"r{i}", need, most) for i, most in enumerate(wanted)]
    found = counts(share_out(nodes, asked))
    for claim in asked:
        if found[claim.id] < claim.wanted:
            assert max(found.values()) <= found[claim.id] + 1
    room = sum(need.fits(resources, 10**6) for resources in nodes.values())
    if room >= len(asked):
        assert all(found[claim.id] >= 1 for claim in asked if claim.wanted)
    assert sum(found.values()) == min(room, sum(wanted)), "the whole capacity is used"


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 64), st.integers(0, 16), claims(WHOLE))
def test_no_run_would_rather_have_what_another_one_got(cpus: int, gpus: int, asked: list[Claim]) -> None:
    """On one node. Workers are whole, so one of either run is granted, and what is left beside one of them."""
    asked = [replace(claim, avoids=frozenset()) for claim in asked]
    found = counts(share_out({"n0": {"CPU": float(cpus), "GPU": float(gpus)}}, asked))
    for ours in asked:
        if found[ours.id] == ours.wanted or not Room({"CPU": cpus, "GPU": gpus}).holds(ours.need):
            continue
        step = dominant_share(ours.need, 1, cpus, gpus)
        for other in asked:
            bundle = {"CPU": found[other.id] * other.need.cpus, "GPU": found[other.id] * other.need.gpus}
            could = ours.need.fits(bundle, 10**6)
            granted = dominant_share(other.need, 1, cpus, gpus) / step + 1
            assert could <= found[ours.id] + granted + 1e-6


def test_the_example_of_the_paper_gives_what_the_paper_says() -> None:
    """9 cores and 18 GB: (1, 4) and (3, 1) get three and two; our second resource is counted in GPUs."""
    asked = [Claim("a", Need(1, 4), 100), Claim("b", Need(3, 1), 100)]
    assert counts(share_out({"n": {"CPU": 9.0, "GPU": 18.0}}, asked)) == {"a": 3, "b": 2}


def test_small_workers_leave_a_node_free_for_a_large_one() -> None:
    nodes = nodes_of([(4, 2), (4, 2)])
    found = share_out(nodes, [Claim("small", Need(1, 1), 2), Claim("large", Need(1, 2), 1)])
    assert counts(found) == {"small": 2, "large": 1}


def test_where_there_is_less_room_than_runs_those_that_came_first_have_it() -> None:
    asked = [Claim(f"{i}", Need(1), 4) for i in (3, 1, 2)]
    assert counts(share_out(nodes_of([(2, 0)]), asked)) == {"1": 1, "2": 1, "3": 0}


def test_two_gpus_hold_two_workers_with_six_tenths_of_one() -> None:
    assert Need(0, 0.6).fits({"GPU": 2.0}, 99) == 2
    assert Need(0, 1 / 3).fits({"GPU": 2.0}, 99) == 6
    assert Need(0, 2).fits({"GPU": 5.0}, 99) == 2
    assert Need(2, 0).fits({"CPU": 5.0}, 99) == 2
    assert Need(0, 0).fits({}, 99) == 99
    assert Need(1, 0).fits({}, 99) == 0
    assert str(Need(1, 0.5)) == "1 CPU and 0.5 GPU"
