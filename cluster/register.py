"""The runs that are on a cluster, as they tell each other: an entry of each in the key-value store of Ray's head.

Every pool that joined the cluster renews its own entry about once a second and reads those of the others; there is no
process that does it for them. An entry that its pool no longer renews is removed by whoever notices: when Ray knows
that the driver ended, or after a while by the clock of who looks, so that the clocks of machines need not agree.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import secrets
import socket
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.need import Need

NAMESPACE = b"meiosis"
PREFIX = b"pool/"
GONE_SECONDS = 20.0
"""A pool that did not renew its entry for so long is gone: its driver hangs, or cannot reach the head."""
ASK_SECONDS = 3.0
"""After so long Ray is asked whether the driver was killed."""
LONGEST = 200
"""Characters of a name, and nodes in a list, that are read."""
MOST = 10_000
"""Largest number of workers, cores or GPUs that is believed."""


@dataclass(frozen=True)
class PoolEntry:
    """What a pool tells the others.

    Attributes:
        id: sorts by the time at which the pool began.
        run: name of the run. Runs in different folders may have the same.
        owner: `user@host` of the driver.
        job: Ray's id of the driver.
        need: of one worker.
        wanted: the most workers it may have.
        demand: how many of them it has work for.
        has: how many it has.
        avoids: Ray's ids of nodes on which it places none.
        beat: grows with every renewal.
    """

    id: str
    run: str
    owner: str
    job: str
    need: Need
    wanted: int
    demand: int
    has: int = 0
    avoids: tuple[str, ...] = ()
    beat: int = 0

    def to_json(self) -> bytes:
        """As it lies in the store."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> PoolEntry:
        """What `to_json` made.

        Raises:
            ValueError: it is something else; whoever reaches the head can write there.
        """
        try:
            found = json.loads(data)
            need = Need(_number(found["need"]["cpus"]), _number(found["need"]["gpus"]))
            if need == Need():
                raise ValueError("workers on a cluster need something")
            id_, run, owner_, job = (_text(found[name]) for name in ("id", "run", "owner", "job"))
            wanted, demand, has = (int(_number(found[name])) for name in ("wanted", "demand", "has"))
            avoids = tuple(_text(node) for node in list(found["avoids"])[:LONGEST])
            return cls(id_, run, owner_, job, need, wanted, demand, has, avoids, int(found["beat"]))
        except (KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError(f"not the entry of a pool: {error}") from error

    def __str__(self) -> str:
        return f"{self.run} of {self.owner}"


class Register:
    """This pool's entry, and what it knows of the others. Ray must be connected."""

    def __init__(self) -> None:
        import ray

        self.job = str(ray.get_runtime_context().get_job_id())
        self.id = f"{time.time_ns():020d}-{secrets.token_hex(8)}"
        self._beat = 0
        self._seen: dict[bytes, tuple[int, float]] = {}

    def exchange(self, entry: PoolEntry, now: float) -> tuple[PoolEntry, ...] | None:
        """Renew the entry of this pool; those of the others that live, by id.

        Args:
            now: monotonic seconds.

        Returns:
            None if the head of the cluster does not answer.
        """
        import ray

        self._beat += 1
        try:
            _put(self._key, replace(entry, beat=self._beat).to_json())
            return self._others(now)
        except (ray.exceptions.RayError, RuntimeError, OSError):
            return None

    def leave(self) -> None:
        """Remove the entry of this pool."""
        import ray

        if self._beat:
            with contextlib.suppress(ray.exceptions.RayError, RuntimeError, OSError, AttributeError):  # Ray may be gone
                _delete(self._key)

    @property
    def _key(self) -> bytes:
        return PREFIX + self.id.encode()

    def _others(self, now: float) -> tuple[PoolEntry, ...]:
        keys = {key for key in _keys() if key != self._key}
        self._seen = {key: seen for key, seen in self._seen.items() if key in keys}
        found, ended = [], None
        for key in sorted(keys):
            data = _get(key)
            if data is None:  # it left in between
                continue
            try:
                entry = PoolEntry.from_json(data)
            except ValueError:
                entry = None  # of another version, say; it is left to those who can read it
            if entry is None or key != PREFIX + entry.id.encode():
                continue
            beat, since = self._seen.get(key, (-1, now))
            if entry.beat != beat:
                since = now
            elif now - since > ASK_SECONDS:
                ended = _ended_jobs() if ended is None else ended
                if now - since > GONE_SECONDS or entry.job in ended:
                    _delete(key)
                    continue
            self._seen[key] = entry.beat, since
            found.append(entry)
        return tuple(found)


def owner() -> str:
    """Who runs this driver, `user@host`."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container without a user of this number
        user = "?"
    return f"{user}@{socket.gethostname()}"


def _ended_jobs() -> frozenset[str]:
    """Ray's ids of drivers that are no more."""
    import ray

    try:  # its public API asks the dashboard, which need not be there
        return frozenset(job["JobID"] for job in ray._private.state.state.job_table() if job["IsDead"])
    except (AttributeError, KeyError, TypeError):  # another Ray: such entries last a little longer
        return frozenset()


def _put(key: bytes, value: bytes) -> None:
    from ray.experimental import internal_kv

    internal_kv._internal_kv_put(key, value, overwrite=True, namespace=NAMESPACE)


def _get(key: bytes) -> bytes | None:
    from ray.experimental import internal_kv

    found: bytes | None = internal_kv._internal_kv_get(key, namespace=NAMESPACE)
    return found


def _keys() -> list[bytes]:
    from ray.experimental import internal_kv

    found: list[bytes] = internal_kv._internal_kv_list(PREFIX, namespace=NAMESPACE)
    return found


def _delete(key: bytes) -> None:
    from ray.experimental import internal_kv

    internal_kv._internal_kv_del(key, namespace=NAMESPACE)


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or not 0 <= value <= MOST:
        raise ValueError(f"{value!r} is not a number from 0 to {MOST}")
    return value


def _text(value: Any) -> str:
    """Names come from other people's drivers and go to terminals."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")
    return "".join(letter for letter in value[:LONGEST] if letter.isprintable())
