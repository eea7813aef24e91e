"""What pools do for each other: real entries in the head of Ray, time and workers simulated."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cluster import register
from cluster.need import Need, Room
from cluster.register import GONE_SECONDS, PREFIX, PoolEntry, Register
from cluster.scarcity import SCARCE_SECONDS
from cluster.sharing import CALM_SECONDS, Shared, Sharing

if TYPE_CHECKING:
    from cluster.local_ray import Session

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

ENTRY = PoolEntry("", "first", "ann@one", "01000000", Need(1), 4, 4, 2)


@pytest.fixture(autouse=True)
def _nobody_else(ray_session: Session) -> Iterator[None]:
    yield
    for key in register._keys():
        register._delete(key)


def entry_of(pool: Register) -> PoolEntry:
    return replace(ENTRY, id=pool.id)


def test_pools_see_each_other_and_not_themselves_until_they_leave() -> None:
    one, two = Register(), Register()
    assert one.exchange(entry_of(one), 0.0) == ()
    assert two.exchange(entry_of(two), 0.0) == (replace(ENTRY, id=one.id, beat=1),)
    assert one.exchange(entry_of(one), 1.0) == (replace(ENTRY, id=two.id, beat=1),)
    two.leave()
    assert one.exchange(entry_of(one), 2.0) == ()


def test_a_pool_that_does_not_renew_its_entry_is_gone_by_the_clock_of_who_looks() -> None:
    dead, alive, other = Register(), Register(), Register()
    dead.exchange(entry_of(dead), 1e6)
    for second in range(int(GONE_SECONDS) + 1):
        other.exchange(entry_of(other), -50.0 + second)
        assert len(alive.exchange(entry_of(alive), float(second)) or ()) == 2, second
    other.exchange(entry_of(other), 0.0)
    found = alive.exchange(entry_of(alive), GONE_SECONDS + 1)
    assert [entry.id for entry in found or ()] == [other.id]
    assert PREFIX + dead.id.encode() not in register._keys()
    dead.exchange(entry_of(dead), 2e6)  # it was only slow
    assert len(alive.exchange(entry_of(alive), GONE_SECONDS + 2) or ()) == 2


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b'{"id": 1}',
        b"\xff",
        b"[" * 10_000,
        replace(ENTRY, id="x", wanted=-1).to_json(),
        replace(ENTRY, id="x", need=Need(float("nan"))).to_json(),
        replace(ENTRY, id="x", need=Need(0, 0)).to_json(),
        replace(ENTRY, id="x", demand=10**9).to_json(),
        replace(ENTRY, id="other").to_json(),
    ],
)
def test_what_is_no_entry_of_a_pool_is_left_alone(text: bytes) -> None:
    register._put(PREFIX + b"x", text)
    pool = Register()
    assert pool.exchange(entry_of(pool), 0.0) == ()
    assert pool.exchange(entry_of(pool), 2 * GONE_SECONDS) == ()
    assert register._get(PREFIX + b"x") == text


def test_names_of_other_runs_bring_no_control_characters_to_the_terminal() -> None:
    found = PoolEntry.from_json(replace(ENTRY, run="a\x1b[2Jb\n").to_json())
    assert str(found) == "a[2Jb of ann@one"


class Simulated:
    """A pool whose trials take `seconds`: what the supervisor does, without processes."""

    def __init__(self, need: Need, workers: int, seconds: int, jobs: int = 10**6) -> None:
        self.said: list[str] = []
        self.need, self.workers, self.seconds, self.jobs = need, workers, seconds, jobs
        self.sharing = Sharing(Register(), need, workers, "run", self.said.append)
        self.slots: list[tuple[str, int, frozenset[str]]] = []  # node or "", when its trial ends, avoided
        self.went = 0

    @property
    def held(self) -> Counter[str]:
        return Counter(node for node, _, _ in self.slots if node)

    def look(self, now: int, nodes: dict[str, dict[str, float]]) -> None:
        self.sharing.look(float(now), self.jobs, nodes, (), self.held)
        allowed = self.sharing.allowed
        for slot in [slot for slot in self.slots if not slot[0]][::-1]:
            if len(self.slots) > allowed or slot[2] - self.sharing.full:
                self.slots.remove(slot)
        for slot in list(self.slots):
            node, end, _ = slot
            if node and end <= now:
                self.slots.remove(slot)
                if self.sharing.must_go(node, len(self.slots) + 1):
                    self.sharing.went(node, float(now))
                    self.went += 1
                else:
                    self.slots.append((node, now + self.seconds, frozenset()))
        while len(self.slots) < allowed:
            self.slots.append(("", 0, self.sharing.full))


class SimulatedCluster:
    """Gives room to workers that wait, in any order, where most is free."""

    def __init__(self, nodes: dict[str, dict[str, float]], seed: int = 0) -> None:
        self.nodes, self.chance, self.now = nodes, random.Random(seed), 1000
        self.strangers: list[str] = []  # nodes of workers that are not ours
        self.pools: list[Simulated] = []

    def run(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1
            for pool in self.pools:
                pool.look(self.now, self.nodes)
            waiting = [(pool, slot) for pool in self.pools for slot in pool.slots if not slot[0]]
            self.chance.shuffle(waiting)
            for pool, slot in waiting:
                rooms = self.rooms()
                fitting = [n for n, room in rooms.items() if room.holds(pool.need) and n not in slot[2]]
                if fitting:
                    node = max(fitting, key=lambda node: rooms[node].free)
                    pool.slots.remove(slot)
                    pool.slots.append((node, self.now + pool.seconds, frozenset()))

    def rooms(self) -> dict[str, Room]:
        rooms = {node: Room(resources) for node, resources in self.nodes.items()}
        for node in self.strangers:
            rooms[node].take(Need(1))
        for pool in sorted(self.pools, key=lambda pool: -pool.need.gpus):
            for node, _, _ in pool.slots:
                if node:
                    rooms[node].take(pool.need)
        return rooms

    def counts(self) -> list[int]:
        return [sum(pool.held.values()) for pool in self.pools]

    def join(self, *arguments: object, **options: object) -> Simulated:
        self.pools.append(Simulated(*arguments, **options))  # type: ignore[arg-type]
        return self.pools[-1]

    def leave(self, pool: Simulated) -> None:
        self.pools.remove(pool)
        pool.sharing.close()


def nodes_of(count: int, cpus: int, gpus: int = 0) -> dict[str, dict[str, float]]:
    return {f"n{i}": {"CPU": float(cpus), "GPU": float(gpus)} for i in range(count)}


def test_a_second_run_gets_half_when_trials_end_and_the_first_all_again_when_it_is_over() -> None:
    cluster = SimulatedCluster(nodes_of(4, 2))
    first = cluster.join(Need(1), 12, seconds=10)
    cluster.run(20)
    assert cluster.counts() == [8]
    assert first.said == []
    second = cluster.join(Need(1), 12, seconds=10)
    cluster.run(15)
    assert cluster.counts() == [4, 4]
    assert (first.went, second.went) == (4, 0)
    assert first.said == ["shares the cluster with 1 other run: 4 of 12 workers"]
    assert first.sharing.fair == 4
    cluster.run(100)
    assert cluster.counts() == [4, 4]
    assert first.went + second.went == 4, "nothing moves without need"
    cluster.leave(second)
    cluster.run(4)
    assert cluster.counts() == [8]
    assert first.said[1:] == ["has the cluster to itself again"]


def test_a_run_with_little_to_do_leaves_the_rest_to_others_and_gets_it_back() -> None:
    cluster = SimulatedCluster(nodes_of(4, 2))
    first, second = cluster.join(Need(1), 8, seconds=2), cluster.join(Need(1), 8, seconds=2)
    cluster.run(40)
    assert cluster.counts() == [4, 4]
    first.jobs = 1
    cluster.run(40)
    assert cluster.counts() == [1, 7]
    first.jobs = 100
    cluster.run(40)
    assert cluster.counts() == [4, 4]
    assert second.said[-1].endswith("4 of 8 workers")


def test_more_runs_than_room_wait_in_the_order_in_which_they_came() -> None:
    cluster = SimulatedCluster(nodes_of(2, 1))
    first = cluster.join(Need(1), 4, seconds=3)
    cluster.run(5)
    _second, third = cluster.join(Need(1), 4, seconds=3), cluster.join(Need(1), 4, seconds=3)
    cluster.run(40)
    assert cluster.counts() == [1, 1, 0]
    assert third.said[-1].startswith("waits: 2 other runs share all room on the cluster")
    cluster.leave(first)
    cluster.run(20)
    assert cluster.counts() == [1, 1]
    assert third.said[-1] == "shares the cluster with 1 other run: 1 of 4 workers"


def test_workers_wait_for_an_autoscaler_only_when_every_run_has_its_share() -> None:
    cluster = SimulatedCluster(nodes_of(2, 2))
    first, second = cluster.join(Need(1), 8, seconds=2), cluster.join(Need(1), 8, seconds=2)
    cluster.run(8)
    assert [pool.sharing.allowed for pool in (first, second)] == [2, 2]
    cluster.run(int(CALM_SECONDS) + 5)
    assert [pool.sharing.allowed for pool in (first, second)] == [8, 8]
    cluster.nodes = nodes_of(4, 2)
    cluster.run(40)
    assert cluster.counts() == [4, 4]


@pytest.mark.parametrize("seed", range(4))
def test_small_workers_make_way_for_large_ones_and_then_stay(seed: int) -> None:
    cluster = SimulatedCluster(nodes_of(4, 8, 2), seed)
    small = cluster.join(Need(1, 1), 8, seconds=3)
    cluster.run(10)
    assert cluster.counts() == [8]
    large = cluster.join(Need(1, 2), 4, seconds=3)
    cluster.run(120)
    assert cluster.counts() == [4, 2]
    went = small.went
    cluster.run(200)
    assert cluster.counts() == [4, 2]
    assert (small.went, large.went) == (went, 0), "no endless moving"


@pytest.mark.parametrize("seed", range(4))
def test_workers_that_lie_scattered_move_together_for_a_run_that_needs_a_whole_node(seed: int) -> None:
    cluster = SimulatedCluster(nodes_of(3, 8, 2), seed)
    cluster.join(Need(1, 1), 3, seconds=3)  # one on each node, and it has no more than its share
    cluster.run(10)
    large = cluster.join(Need(1, 2), 1, seconds=3)
    cluster.run(90)
    assert cluster.counts() == [3, 1]
    assert large.went == 0
    assert cluster.pools[0].went <= 2


@pytest.mark.parametrize("seconds", [3, 40])
def test_runs_share_what_strangers_leave_and_take_it_when_they_go(seconds: int) -> None:
    cluster = SimulatedCluster(nodes_of(4, 2))
    cluster.strangers = ["n0", "n1", "n2", "n2"]
    first = cluster.join(Need(1), 8, seconds=seconds)
    cluster.run(10)
    second = cluster.join(Need(1), 8, seconds=seconds)
    cluster.run(int(SCARCE_SECONDS))
    assert cluster.counts() == [4, 0], "for all that is known they may still come"
    cluster.run(20 + 3 * seconds)
    assert cluster.counts() == [2, 2]
    cluster.run(200)
    assert cluster.counts() == [2, 2]
    assert first.went + second.went <= 4
    cluster.strangers = []
    cluster.run(60 + 3 * seconds)
    assert cluster.counts() == [4, 4]


def test_what_is_told_of_other_runs_counts_them() -> None:
    one, two = ("a of ann@one",), ("a of ann@one", "b of bob@two")
    assert Shared(0, one).line(4).startswith("waits: 1 other run has all room on the cluster; it goes on when")
    assert Shared(0, two).line(4).startswith("waits: 2 other runs share all room on the cluster; it goes on when")
    assert Shared(2, one).line(4) == "shares the cluster with 1 other run: 2 of 4 workers"


def test_pools_without_others_meet_nobody_and_say_nothing() -> None:
    said: list[str] = []
    alone = Sharing(None, Need(), 5, "run", said.append)
    alone.look(0.0, 0, {}, (), {})
    assert (alone.allowed, alone.fair, alone.now, alone.must_go("n0", 5), said) == (5, 5, Shared(), False, [])
    alone.close()
