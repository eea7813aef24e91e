"""Ray takes seconds to start, so the tests of this process share one."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from cluster.local_ray import Session


sys.path.append(str(Path(__file__).parent))
"""For `worker_bodies`, which tests and their workers import by name."""

# A shell starts what it puts into the background deaf to Ctrl-C, and children inherit that: tests that press it
# would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def ray_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """Ray on this machine; every `RayPool` without an address uses it and leaves it running."""
    from cluster.local_ray import open_session

    log: Path = tmp_path_factory.mktemp("ray") / "ray.log"
    session = open_session(None, cpus=2, log=log)
    yield session
    session.close()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """What torch computes in this process in a test, on one thread."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


from family import family, family_config  # noqa: E402, F401 - fixtures
