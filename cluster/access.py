"""Who reaches Ray: the addresses that our own listens on, and the token."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from search.errors import WorkerError

CONNECT_SECONDS = 5.0
"""Longest wait for the head of a cluster to answer."""


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """Let the Ray that is started meanwhile have a loopback address, on which alone its processes then listen.

    Ray takes an address of loopback for a mistake and puts the machine's own in its place, where nodes of a cluster
    would look for each other; then all its ports are open to the network. It does not on macOS and Windows, where
    `RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER` is off by default. Ray reads that once, when it is imported, which a program
    that uses us may have done long ago.
    """
    from ray._private import ray_constants

    before = getattr(ray_constants, "ENABLE_RAY_CLUSTER", None)
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def ensure_token() -> None:
    """A token in Ray's usual place that only this user can read, so that `ray status` works as well."""
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    token = secrets.token_hex(32)
    try:
        path = Path.home() / ".ray" / "auth_token"
        if path.exists():
            if path.stat().st_mode & 0o077:
                path.chmod(0o600)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        # Linked into place whole: another process must not read half a token.
        with tempfile.NamedTemporaryFile("w", dir=path.parent) as file:  # its mode is 600
            file.write(token)
            file.flush()
            with contextlib.suppress(FileExistsError):
                os.link(file.name, path)
    except (OSError, RuntimeError):  # no home, or not writable: hand it down by environment
        os.environ["RAY_AUTH_TOKEN"] = token


def refusal(address: str, seconds: float = CONNECT_SECONDS) -> Exception | None:
    """Why nobody answers at `host:port` within so many seconds; None if somebody does."""
    host, _, port = address.partition(":")
    try:
        socket.create_connection((host, int(port)), timeout=seconds).close()
    except (OSError, OverflowError) as error:
        return error
    return None


def require_head(address: str) -> None:
    """Raise `WorkerError` if nobody answers at `host:port`. Ray itself would try for more than five minutes."""
    if (why := refusal(address)) is not None:
        raise WorkerError(
            f"no Ray head answers at '{address}' ({why}); start one with 'ray start --head', "
            "or run on this machine with --address none"
        ) from why


def only_on_loopback(address: str) -> bool:
    """Whether the head at `host:port` is that of a Ray like our own, which the machine's own address does not reach."""
    from ray._private.services import get_node_ip_address

    host, _, port = address.partition(":")
    local = host == "localhost" or host.startswith("127.")
    return local and refusal(f"{get_node_ip_address()}:{port}") is not None


def asks_for_token(address: str) -> bool:
    """Whether the cluster refuses who has no token.

    Without a token here, who can join has the answer: then this says that it does not ask, and otherwise the join
    fails. With one it is tried out, since a cluster that asks for none takes any, and then its workers are refused by
    this process.

    Raises:
        WorkerError: this process has a token, and the cluster does not ask for it.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "disabled")
    if mode == "disabled":
        return False
    import ray
    from ray._raylet import Config, GcsClient  # type: ignore[attr-defined]  # compiled

    try:
        os.environ["RAY_AUTH_MODE"] = "disabled"
        Config.initialize("")  # reads it again, as Ray itself does where it turns tokens on
        with _quiet_stderr():
            GcsClient(address=address).internal_kv_keys(b"meiosis", None, timeout=CONNECT_SECONDS)
    except ray.exceptions.RayError:  # refused; what else is wrong, the join itself says better
        return True
    finally:
        os.environ["RAY_AUTH_MODE"] = mode
        Config.initialize("")
    raise WorkerError(
        f"the Ray cluster at '{address}' asks for no token, but RAY_AUTH_MODE={mode} is set here, so its workers could "
        "not answer; start its nodes with RAY_AUTH_MODE=token and the same token, or set RAY_AUTH_MODE=disabled here"
    )


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Drop what is written to stderr, by C++ as well: Ray warns there that it was refused."""
    sys.stderr.flush()
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)
