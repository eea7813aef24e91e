"""The process that merges and evaluates.

Ray sees bytes going in and bytes coming out, so it never imports a module of ours to read a message
before the guard below has run, and what cannot be sent is a failure with a name instead of a
lost worker. What the driver says is pickled, and what it is told is plain data, errors too: see
`cluster.messages`.
"""

from __future__ import annotations

import contextlib
import pickle
import socket
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.handshake import compare, evaluator_sources, identity
from cluster.messages import Alive, Built, Greeting, StartError, encode
from cluster.parcels import Offer
from cluster.receiving import ActorChannel, Located, locate
from cluster.shards import node_folder, warm
from search.errors import MeiosisError, WorkerError
from search.local_pool import Body, failed, make_body, one_line, preparation, run_body
from search.pool import Failure, Job, WorkerPlan

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass(frozen=True)
class Surroundings:
    """Where and how a worker must find its code, as plain data.

    Attributes:
        packages: our packages -> folders that the driver imports them from.
        driver_path: the driver's `sys.path`, absolute.
        added_path: what Ray puts at the front of a worker's `sys.path`: the folder in which the
            driver was started and that of its script.
        folder: working directory of the driver; a worker that can see it works there, so that a
            relative path means the same in both pools.
        environment: variables to set before anything heavy is imported.
    """

    packages: Mapping[str, str]
    driver_path: tuple[str, ...]
    added_path: tuple[str, ...]
    folder: str
    environment: Mapping[str, str]


def actor_class() -> Any:
    """The class of the actor, to be given to `ray.remote`.

    It is defined inside a function so that Ray sends it by value. Sent by reference, a worker would
    import `cluster.worker` before the guard runs, possibly from a folder `cluster/` in which the user
    stands, since Ray puts that folder at the front of `sys.path`. So: only the standard library in here,
    imported inside the methods, and nothing from this module.
    """

    class MeiosisWorker:
        def hello(self, surroundings: dict[str, Any], offer: bytes, source: Any = None) -> bytes:
            """Set up imports and environment, and find the files; returns the greeting."""
            import os
            import sys
            import time
            from importlib.machinery import PathFinder

            began = time.perf_counter()

            packages = surroundings["packages"]

            class OurPackages:
                """Finds our packages where the driver has them, whatever else is on the path."""

                @staticmethod
                def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
                    if path is None and name in packages:
                        return PathFinder.find_spec(name, [os.path.dirname(packages[name])], target)
                    return None

            sys.meta_path.insert(0, OurPackages)
            added = set(surroundings["added_path"])
            sys.path[:] = [entry for entry in sys.path if entry not in added]
            known = set(sys.path)
            # What only the driver has, such as the folder of a user's own evaluator, goes to the end.
            sys.path.extend(entry for entry in surroundings["driver_path"] if entry not in known)
            if os.path.isdir(surroundings["folder"]):
                os.chdir(surroundings["folder"])
            os.environ.update(surroundings["environment"])

            from cluster.worker import Worker

            self._worker = Worker()
            return self._worker.hello(offer, source, began)

        def build(self, setup: bytes) -> bytes:
            return self._worker.build(setup)

        def check(self) -> bytes:
            return self._worker.check()

        def run(self, job: bytes) -> bytes:
            return self._worker.run(job)

    return MeiosisWorker


class Worker:
    """The inside of the actor. Every method returns a message of `cluster.messages` and raises nothing."""

    _body: Body
    _located = Located()
    _fault: bytes | None = None

    def hello(self, offer: bytes, source: Any = None, began: float | None = None) -> bytes:
        """Find the models and data of a pickled `Offer`, and get from the actor `source` what this node does not
        see. Returns a `Greeting`, which tells how long ago `began` (`time.perf_counter`) is.

        What is wrong with them is kept for `build`: a difference in code is told first. It is found
        here because every worker that there is room for has greeted before the first job is sent.
        """
        import os

        import ray

        began = time.perf_counter() if began is None else began
        ours, node_id = identity(), ray.get_runtime_context().get_node_id()
        try:
            offered = pickle.loads(offer)  # noqa: S301 - written by our own driver
            assert isinstance(offered, Offer)
            compare(offered.driver, ours, "this worker")  # before anything moves; the driver says it better
            channel = None if source is None else ActorChannel(source)
            self._located = locate(offered, channel, node_id=node_id)
        except Exception as error:  # noqa: BLE001 - raised again by the driver
            self._fault = _start_error(error)
        return encode(Greeting(ours, node_id, os.getpid(), time.perf_counter() - began))

    def build(self, setup: bytes) -> bytes:
        """Construct the body, while the models are read ahead. Returns `Built`, or the `StartError`.

        Unless the plan says otherwise, what operators prepare is shared by all workers of a node, also
        of other runs: the files there are named by the content of the models.
        """
        if self._fault is not None:
            return self._fault
        files = [file for checkpoint in self._located.checkpoints.values() for file in checkpoint.files]
        threading.Thread(target=_warm, args=(files,), daemon=True).start()
        try:
            body, plan = pickle.loads(setup)  # noqa: S301 - written by our own driver
            assert isinstance(plan, WorkerPlan)
            plan = self._located.plan(plan)
            if plan.prepared_folder is None:
                plan = replace(plan, prepared_folder=str(node_folder() / "prepared"))
            began = time.perf_counter()
            self._body = make_body(body, plan)
            took = preparation(self._body, time.perf_counter() - began)
            # Libraries that were loaded before the environment was set are limited here.
            from threadpoolctl import threadpool_limits

            threadpool_limits(plan.threads)
            # After the body loaded them: what is hashed is what runs.
            layout = getattr(self._body, "layout", None)
            built = Built(socket.gethostname(), evaluator_sources(plan.evaluators), took, layout)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - raised again by the driver
            return _start_error(error)
        return encode(built)

    def check(self) -> bytes:
        """Shows that the worker is alive."""
        return encode(Alive())

    def run(self, job: bytes) -> bytes:
        """The outcome of a pickled job."""
        request = pickle.loads(job)  # noqa: S301 - written by our own driver
        assert isinstance(request, Job)
        outcome = run_body(self._body, request)
        try:
            return encode(outcome)
        except Exception as error:  # noqa: BLE001 - of objects that the body put into it
            why = f"the outcome cannot be sent to the driver: {one_line(error)}"
            return encode(failed(request, Failure("error", why, traceback.format_exc())))


def _warm(files: Sequence[Path]) -> None:
    """Read ahead; who cannot says nothing, since the merge that needs the file says it better."""
    with contextlib.suppress(WorkerError):
        warm(files)


def _start_error(error: BaseException) -> bytes:
    explained = error if isinstance(error, MeiosisError) else None
    message = one_line(error) if explained is None else str(error)
    return encode(StartError(message, traceback.format_exc(), explained))
