"""Ray of our own, started beside what a command still has to do before it needs workers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster import local_ray
from cluster.local_ray import Session
from search.errors import MeiosisError


@contextmanager
def early_ray(cpus: int, with_gpus: bool) -> Iterator[Callable[[], None]]:
    """Gives a function that begins to start a Ray of our own and does not wait for it.

    The next `open_session` without an address waits for it, raises what went wrong with it, and owns it. A Ray of
    which nobody opened a session before the end of this is ended then. Where this process has Ray already, nothing is
    started.

    Args:
        cpus, with_gpus: see `open_session`.
    """
    start = _Start(cpus, with_gpus)

    def begin() -> None:
        if local_ray.offer(start.taken):
            start.begin()

    try:
        yield begin
    finally:
        if local_ray.offered(start.taken):
            with contextlib.suppress(MeiosisError, OSError):  # that it did not start, either, nobody needs to know
                local_ray.open_session(None).close()
            local_ray.withdraw(start.taken)  # one that failed must not fail the next command of this process


class _Start:
    """One start of Ray, in a thread of its own.

    The thread lives as long as Ray: the kernel ends Ray's processes when what started them ends, so that none is left
    behind when this process is killed, and on Linux it is the thread that counts.
    """

    def __init__(self, cpus: int, with_gpus: bool) -> None:
        self._cpus, self._with_gpus = cpus, with_gpus
        self._done, self._over = threading.Event(), threading.Event()
        self._session: Session | None = None
        self._error: BaseException | None = None

    def begin(self) -> None:
        """Start, and return at once."""
        # What Ray prints on the way is told from the rest by the name of the thread.
        threading.Thread(target=self._run, name="ray_early", daemon=True).start()

    def _run(self) -> None:
        try:
            self._session = local_ray.start_ray(self._cpus, self._with_gpus, None)
            self._session.at_close = self._over.set
        except BaseException as error:  # noqa: BLE001 - raised by who waits for it
            self._error = error
            self._over.set()
        self._done.set()
        self._over.wait()

    def taken(self, log: Path | None) -> Session:
        """The session, once it is there; what Ray prints from now on goes to the log."""
        self._done.wait()
        if self._session is None:
            assert self._error is not None
            raise self._error
        self._session.log_to(log)
        return self._session
