"""Ray in this process: start one of our own on this machine, join another, stop it.

What is decided here, and why:

* Our own Ray listens on loopback only, asks for a token, has no dashboard, sends no usage statistics
  (unless `RAY_USAGE_STATS_ENABLED` says otherwise) and keeps its files in a folder of its own. Whoever wants Ray
  on the network starts it with `ray start` and names its address.
* Ray prints death reports of workers on stdout, from a thread of the driver. Results are what belongs
  on stdout, so while Ray runs, what Ray's threads print goes to a log file instead.
* Ray replaces the handlers of SIGTERM and SIGINT when it starts; they are put back.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import ipaddress
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from cluster.access import asks_for_token, ensure_token, on_loopback, only_on_loopback, refusal, require_head
from search.cluster_config import is_head_address
from search.errors import UserError, WorkerError
from search.run_log import emit

OBJECT_STORE_BYTES = 100_000_000
"""Messages are small, models never travel. Ray refuses less than 75 MB."""
ANSWER_SECONDS = 2.0
"""Longest wait for the head of a cluster that this process has joined."""
_PREFIX = "meiosis-"
_LONGEST_BASE = 22
"""Longest folder for Ray's files: below it come 68 characters of Ray's own and a name of 17, and a
socket's path ends at 107 bytes."""


@dataclass
class Session:
    """Ray as this process has it. `own`: it is on this machine, started by us. `asks_for_token`: of who connects."""

    address: str
    own: bool
    added_path: tuple[str, ...]
    folder: Path | None = None
    asks_for_token: bool = True
    _lock: IO[str] | None = None
    _stdout: _SplitStdout | None = None
    _users: int = field(default=1)
    at_close: Callable[[], None] = lambda: None

    def log_to(self, log: Path | None) -> None:
        """Write what Ray prints into another file from now on; None: drop it."""
        if self._stdout is not None:
            self._stdout.log_to(log)

    def head_answers(self) -> bool:
        """Whether somebody listens at the head. Ray itself would be asked in vain for a minute, deaf to signals."""
        return refusal(self.address, ANSWER_SECONDS) is None

    def close(self) -> None:
        """Disconnect, if no other user of the session is left; a Ray of our own ends with all its processes.

        Each call of `open_session` is answered by one of `close`.
        """
        global _session  # noqa: PLW0603 - Ray is one per process as well
        if _session is not self:
            return
        self._users -= 1
        if self._users > 0:
            return
        _session = None
        import ray

        if self._stdout is not None:
            self._stdout.everything = True  # what Ray held back, it prints now and from this thread
        ray.shutdown()
        if self._stdout is not None:
            self._stdout.restore()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()
        self.at_close()


_session: Session | None = None
_offered: Callable[[Path | None], Session] | None = None


def offer(take: Callable[[Path | None], Session]) -> bool:
    """Let the next `open_session` call `take` with its log instead of starting Ray; returns whether one is wanted."""
    global _offered  # noqa: PLW0603 - Ray is one per process as well
    ray = sys.modules.get("ray")
    if _session is not None or _offered is not None or (ray is not None and ray.is_initialized()):
        return False
    _offered = take
    return True


def offered(take: Callable[[Path | None], Session]) -> bool:
    """Whether an offer was not taken up yet."""
    return _offered == take


def withdraw(take: Callable[[Path | None], Session]) -> None:
    """Take back an offer that was not taken up."""
    global _offered  # noqa: PLW0603 - Ray is one per process as well
    if offered(take):
        _offered = None


def open_session(address: str | None, *, cpus: int = 1, with_gpus: bool = False, log: Path | None = None) -> Session:
    """Ray for this process: what it has already, or that at `address`, or a new one on this machine.

    Args:
        address: `host:port` of the head of a cluster; None: start our own.
        cpus: workers that Ray should keep warm, in a Ray of our own.
        with_gpus: whether our own Ray looks for GPUs.
        log: file for what Ray prints; by default it is dropped.

    Raises:
        UserError: an address that is not of that form.
        WorkerError: Ray does not start, or nobody answers at the address.
    """
    global _session, _offered  # noqa: PLW0603 - Ray is one per process as well
    if address is not None and not is_head_address(address):
        raise UserError(f"cluster.address: '{address}' is not the address of a Ray head; expected 'host:port'")
    if _session is not None:
        _refuse_another(_session.address, address)
        _session._users += 1
        return _session
    if address is None and (take := _offered) is not None:
        with _same_signal_handlers():
            _session = take(log)
        _offered = None  # only now: who is interrupted while waiting leaves it to who made the offer
        return _session
    _prepare(own=address is None)
    import ray

    if ray.is_initialized():  # by the program that uses us; it also shuts it down
        theirs = ray.get_runtime_context().gcs_address
        _refuse_another(theirs, address)
        return Session(theirs, own=False, added_path=_added_path())
    _session = _join(address, log) if address is not None else start_ray(cpus, with_gpus, log)
    return _session


def _refuse_another(used: str, address: str | None) -> None:
    if address is not None and address != used:
        raise WorkerError(f"this process uses Ray at {used} already; close it before joining {address}")


def _prepare(own: bool) -> None:
    """Set what Ray reads once, when it is imported."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if own and "ray" not in sys.modules:
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def start_ray(cpus: int, with_gpus: bool, log: Path | None) -> Session:
    """A Ray of our own, which is not yet that of this process; see `open_session`."""
    emit("ray_starting", address=None)
    _prepare(own=True)
    import ray

    ensure_token()
    folder, lock = _make_folder()
    stdout = _SplitStdout(log)
    options: dict[str, Any] = {} if with_gpus else {"num_gpus": 0}
    try:
        with _same_signal_handlers(), on_loopback():
            context = ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(folder),
                _node_ip_address="127.0.0.1",
                **options,
            )
        node = context.address_info["node_ip_address"]
        if not ipaddress.ip_address(node).is_loopback:
            raise WorkerError(
                f"Ray {ray.__version__} would listen on {node}, where others may reach it; install the version that "
                "requirements.lock names, or start it yourself with 'ray start --head' and name it in cluster.address"
            )
    except BaseException as error:
        ray.shutdown()
        stdout.restore()
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()
        if isinstance(error, Exception):
            raise WorkerError(f"Ray cannot be started on this machine: {_line(error)}") from error
        raise
    session = Session(context.address_info["address"], True, _added_path(), folder, _lock=lock, _stdout=stdout)
    atexit.register(_close_at_exit, session)
    emit("ray_up", address=session.address)
    return session


def _join(address: str, log: Path | None) -> Session:
    import ray

    emit("ray_starting", address=address)
    require_head(address)
    stdout = _SplitStdout(log)
    try:
        asked = asks_for_token(address)
        with _same_signal_handlers(), on_loopback() if only_on_loopback(address) else contextlib.nullcontext():
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except BaseException as error:
        ray.shutdown()
        stdout.restore()
        if isinstance(error, WorkerError):
            raise
        if isinstance(error, Exception):
            raise WorkerError(
                f"the Ray cluster at '{address}' cannot be joined: {_line(error).partition('[')[0]}; if it asks for a "
                "token, set RAY_AUTH_MODE=token here and give the same token (RAY_AUTH_TOKEN or ~/.ray/auth_token)"
            ) from error
        raise
    emit("ray_up", address=address)
    return Session(address, False, _added_path(), asks_for_token=asked, _stdout=stdout)


def _close_at_exit(session: Session) -> None:
    session._users = 1
    session.close()


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _added_path() -> tuple[str, ...]:
    """What Ray puts in front of the `sys.path` of this driver's workers."""
    return os.path.abspath(os.curdir), os.path.dirname(os.path.realpath(sys.argv[0]))


def _make_folder() -> tuple[Path, IO[str]]:
    """A new folder for Ray's files, locked while it is in use.

    Folders that a killed driver left behind are removed on the way: nobody holds their lock.
    """
    for base in (os.environ.get("RAY_TMPDIR", ""), tempfile.gettempdir(), "/tmp"):
        if base and len(base) <= _LONGEST_BASE and os.access(base, os.W_OK):
            break
    else:
        raise WorkerError(
            f"Ray needs a writable temporary folder whose path has at most {_LONGEST_BASE} characters; "
            "name one in RAY_TMPDIR"
        )
    for left in Path(base).glob(f"{_PREFIX}*/lock"):
        with contextlib.suppress(OSError), left.open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
    held = (folder / "unlocked").open("w")
    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    (folder / "unlocked").rename(folder / "lock")  # locked before anybody can find it by that name
    return folder, held


@contextlib.contextmanager
def _same_signal_handlers() -> Iterator[None]:
    """Put the handlers back that Ray replaces; `ray.wait` polls often enough for them to run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: installed from C, cannot be put back
                signal.signal(number, handler)


class _SplitStdout:
    """Stands in for `sys.stdout`: what Ray's threads print goes to the log, the rest where it went."""

    def __init__(self, log: Path | None) -> None:
        self._real = sys.stdout
        self.everything = False
        self.log_to(log)
        sys.stdout = self

    def log_to(self, log: Path | None) -> None:
        self._log = open(log if log is not None else os.devnull, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, text: str) -> int:
        if self.everything or threading.current_thread().name.startswith("ray_"):
            if not self._log.closed:
                self._log.write(text)
                self._log.flush()
            return len(text)
        return self._real.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def restore(self) -> None:
        """Give `sys.stdout` back, unless somebody else took it meanwhile."""
        if sys.stdout is self:
            sys.stdout = self._real
        self._log.close()
