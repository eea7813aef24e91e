"""Who kills: at moments and in an order that follow from a seed, among what is there at that moment."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from chaos_run.notes import Notes, freeze, is_marked, send, workers
from chaos_run.one_search import Search
from chaos_run.raylets import Raylets

SHARES = {
    "worker": 0.38,
    "two workers": 0.12,
    "node": 0.20,
    "driver": 0.20,
    "driver and node": 0.05,
    "everything": 0.05,
}
"""What is killed, and how often."""
STALL_SECONDS = 400.0
"""Nothing that is killed here may hold up the search for so long."""
VICTIM_SECONDS = 30.0
"""Two workers at once must be in trials; where that does not come about for so long, it becomes one."""
ORPHAN_SECONDS = 60.0
"""Workers of drivers that were killed, and of one that is done, are gone after so long."""


@dataclass
class Kill:
    """One strike.

    Attributes:
        second: since the first driver was started.
        trials: how many were carried to their end by then.
        processes: how many of them were killed by us; of a node its workers may follow by themselves.
        torn_bytes: garbage that was put behind what the driver had written, as a crash may leave it.
        next_result: seconds until the next trial ended; None when none did before the next strike.
    """

    number: int
    kind: str
    second: float
    trials: int
    processes: int = 0
    torn_bytes: int = 0
    next_result: float | None = None


def deal(kills: int, chance: random.Random) -> list[str]:
    """What is killed in which order: every kind at least once if there are enough, and in its share."""
    counts = {kind: max(1, int(share * kills)) for kind, share in SHARES.items()}
    counts["worker"] = max(1, counts["worker"] + kills - sum(counts.values()))
    deck = [kind for kind, count in counts.items() for _ in range(count)]
    chance.shuffle(deck)
    return deck[:kills]


def moments(kills: int, searched: int, trials: int, chance: random.Random) -> list[int]:
    """After how many trials each strike comes: some in the finals, the others anywhere in the search.

    Args:
        searched: trials on search items.
        trials: trials in all.
    """
    late = 1 + kills // 40
    early = [chance.randrange(1, searched) for _ in range(kills - late)]
    # The last one must not come when the search is over.
    end = searched + max(1, (trials - searched) // 2)
    return sorted(early) + sorted(chance.randrange(searched, end) for _ in range(late))


class Monkey:
    """Disturbs one search until it is done.

    A candidate that took two workers down is given up by design, so two workers are never killed under the same
    candidate while one driver is at work. Nodes are killed without regard for that.

    Args:
        make: starts a cluster.
        size: nodes that there shall be.
        workers: of a driver, one more or one less.

    Attributes:
        kills: what was done.
        clusters, nodes: how many were started.
        orphans: workers that were left after the search.
    """

    def __init__(
        self,
        search: Search,
        folder: Path,
        make: Callable[[], Raylets],
        *,
        size: int,
        workers: int,
        chance: random.Random,
        note: Callable[[str], None],
    ) -> None:
        self._search, self._folder, self._make, self._size, self._workers = search, folder, make, size, workers
        self._chance, self._note = chance, note
        self.notes = Notes(folder / "notes")
        self.kills: list[Kill] = []
        self.clusters = self.nodes = 0
        self.orphans: list[int] = []
        self._charged: set[str] = set()
        self._joins: list[float] = []
        self._began = self._progress_at = time.monotonic()
        self._ended = 0
        self._waiting: list[tuple[Kill, float]] = []
        self._cluster: Raylets | None = None

    def run(self, plan: list[tuple[int, str]]) -> float:
        """Search with these strikes, (after so many trials, what); returns the seconds that it took.

        Raises:
            RuntimeError: the search does not get on.
        """
        try:
            self._new_cluster()
            self._began = time.monotonic()
            self._go_on()
            for moment, kind in plan:
                if not self._until(lambda least=moment: len(self.notes.ended) >= least):  # type: ignore[misc]
                    break
                pause = time.monotonic() + min(3.0, self._chance.expovariate(1.0))
                if not self._until(lambda end=pause: time.monotonic() >= end):  # type: ignore[misc]
                    break
                self._strike(kind)
            self._until(lambda: False)
            seconds = time.monotonic() - self._began
            while (orphans := workers(self._folder)) and time.monotonic() < self._began + seconds + ORPHAN_SECONDS:
                time.sleep(0.2)
            self.orphans = orphans
            return seconds
        finally:
            if self._cluster is not None:
                self._search.kill()
                self._cluster.close()

    @property
    def cluster(self) -> Raylets:
        """The cluster of now."""
        assert self._cluster is not None
        return self._cluster

    def _until(self, true: Callable[[], bool], seconds: float = float("inf")) -> bool:
        """Wait, and look after what was killed; returns whether it came true before the search was done."""
        end = time.monotonic() + seconds
        while True:
            self.notes.look()
            now = time.monotonic()
            if len(self.notes.ended) > self._ended:
                self._ended, self._progress_at = len(self.notes.ended), now
                for kill, at in self._waiting:
                    kill.next_result = now - at
                self._waiting.clear()
            while self._joins and self._joins[0] <= now:
                self._joins.pop(0)
                self._add_node()
            if (status := self._search.status()) == 0:
                return False
            if status is not None:
                self._note(f"the driver ended by itself: {self._search.note_end()}")
                if len(self._search.ended_themselves) > 20:
                    raise RuntimeError(f"the driver ends by itself again and again:\n{self._search.log()}")
                self._go_on()
            if true() or now >= end:
                return True
            if now - self._progress_at > STALL_SECONDS:
                raise RuntimeError(f"no trial ended for {STALL_SECONDS:g} s; the driver said:\n{self._search.log()}")
            time.sleep(0.05)

    def _strike(self, kind: str) -> None:
        kill = Kill(len(self.kills) + 1, kind, 0.0, len(self.notes.ended))
        if "worker" in kind:
            if (count := self._strike_workers(2 if kind == "two workers" else 1)) == 0:
                return
            kill.processes, kill.kind = count, "two workers" if count == 2 else "worker"
        elif kind == "everything":
            kill.processes = self.cluster.kill_all()
        else:
            kill.processes += self._kill_node() if "node" in kind else 0
            kill.processes += self._search.kill() if "driver" in kind else 0
        now = time.monotonic()
        kill.second = now - self._began
        self.kills.append(kill)
        self._waiting.append((kill, now))
        if "driver" in kind or kind == "everything":
            self._search.kill()
            kill.torn_bytes = self._tear()
            if kind == "everything":
                self._new_cluster()
            time.sleep(self._chance.choice((0.0, 0.0, 1.0, 3.0)))
            self._go_on()
        torn = f", {kill.torn_bytes} bytes of garbage" if kill.torn_bytes else ""
        self._note(f"{kill.number}: {kill.kind} ({kill.processes} processes{torn}) after {kill.trials} trials")

    def _strike_workers(self, wanted: int) -> int:
        """Kill workers once they are in trials; returns how many: none when the search was done before."""
        end = time.monotonic() + VICTIM_SECONDS
        while True:
            least = wanted if time.monotonic() < end else 1
            if not self._until(lambda: len(self._victims()) >= least, VICTIM_SECONDS):  # noqa: B023 - called at once
                return 0
            if count := self._kill_workers(least, wanted):
                return count

    def _victims(self) -> dict[int, str]:
        """Workers in a trial under which none was killed yet."""
        trials = self.notes.inside.items()
        return {pid: trial for pid, trial in trials if trial not in self._charged and is_marked(pid, self._folder)}

    def _kill_workers(self, least: int, most: int) -> int:
        """kill -9 workers in the middle of different trials; returns how many, none where there are too few."""
        seen = self._victims()
        frozen = [pid for pid in self._chance.sample(sorted(seen), min(most, len(seen))) if freeze(pid)]
        self.notes.look()  # between the last look and now, a trial may have ended, and another one begun
        now = self._victims()
        chosen = {pid: now[pid] for pid in frozen if pid in now}
        if len(set(chosen.values())) < len(chosen):  # one and the same merge
            chosen = dict(list(chosen.items())[:1])
        if len(chosen) < least:
            chosen = {}
        self._charged.update(chosen.values())
        send(list(chosen), signal.SIGKILL)
        send([pid for pid in frozen if pid not in chosen], signal.SIGCONT)
        return len(chosen)

    def _kill_node(self) -> int:
        if len(self.cluster.nodes) == 1:  # a search cannot start where there is no node
            self._joins.clear()
            self._add_node()
        at_once = self._chance.random() < 0.5
        killed = self.cluster.kill(self._chance.choice(self.cluster.nodes), at_once=at_once)
        self._joins.append(time.monotonic() + self._chance.uniform(0.0, 10.0))
        self._joins.sort()
        return killed

    def _add_node(self) -> None:
        if len(self.cluster.nodes) < self._size:
            self.cluster.add()
            self.nodes += 1

    def _new_cluster(self) -> None:
        self._joins.clear()
        self._cluster = self._make()
        self.clusters += 1
        for _ in range(self._size):
            self._add_node()

    def _go_on(self) -> None:
        self._charged.clear()  # a new driver knows nothing of deaths under the last one
        workers = self._chance.randint(max(2, self._workers - 1), self._workers + 1) if self.kills else self._workers
        self._search.go_on(self.cluster.address, workers)

    def _tear(self) -> int:
        """Put garbage behind what a driver that is dead had written; returns how much."""
        torn = 0
        for folder in ("history", "spool"):
            files = sorted((self._search.run / folder).glob("*.arrows"))
            if not files or self._chance.random() < 0.5:
                continue
            whole = files[-1].read_bytes()
            size = self._chance.randint(1, 400)
            garbage = self._chance.choice(
                (self._chance.randbytes(size), bytes(size), b"\xff" * size, whole[-900 : -900 + size])
            )
            with files[-1].open("ab") as file:
                file.write(garbage)
            torn += len(garbage)
        return torn
