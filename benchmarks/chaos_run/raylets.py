"""A Ray cluster on this machine whose nodes can be killed: a head without workers, and raylets.

Run as a script it is the process that the raylets belong to: it starts and kills them as told, line by line, and
goes with all of them when nobody tells it anything any more.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from chaos_run.notes import descendants, marked, send

STORE_BYTES = 80_000_000
START_SECONDS = 180.0


class Raylets:
    """A cluster, from outside.

    Args:
        folder: of the chaos run, with which all processes are marked.
        environment: of all processes.
        cpus: of a node.

    Attributes:
        address: of the head.
        nodes: numbers of the nodes that are alive.
    """

    def __init__(self, folder: Path, environment: dict[str, str], cpus: int) -> None:
        self._folder = folder
        # Sockets have short paths.
        base = tempfile.gettempdir() if len(tempfile.gettempdir()) < 16 else "/tmp"
        self._files = Path(tempfile.mkdtemp(prefix="c-", dir=base))
        with (folder / "ray.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve()), str(self._files), str(cpus)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,
            )
        self.address = str(self._answer()["address"])
        self.nodes: list[int] = []

    def add(self) -> int:
        """Start a node and return its number, once it has joined."""
        number = int(self._ask({"add": 1})["node"])
        self.nodes.append(number)
        return number

    def kill(self, number: int, *, at_once: bool) -> int:
        """kill -9 a raylet, and `at_once` all processes of its node, which otherwise find out and end themselves.

        Returns how many processes were killed.
        """
        self.nodes.remove(number)
        return int(self._ask({"kill": number, "at_once": at_once})["killed"])

    def kill_all(self) -> int:
        """kill -9 all that has the mark of the run, drivers included; returns how many processes that were."""
        pids: set[int] = set()
        end = time.monotonic() + 60
        while left := marked(self._folder):
            assert time.monotonic() < end, f"these processes cannot be killed: {left}"
            pids.update(left)
            send(left, signal.SIGKILL)
            self._process.poll()
            time.sleep(0.02)
        self._process.wait(30)
        self._gone()
        return len(pids)

    def close(self) -> None:
        """End the cluster in order, and then whatever is left of it."""
        if self._process.poll() is None and self._process.stdin is not None:
            self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(60)
        self.kill_all()

    def _gone(self) -> None:
        self.nodes.clear()
        shutil.rmtree(self._files, ignore_errors=True)

    def _ask(self, what: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:  # Ray may print there as well
            if line.startswith('{"chaos": '):
                found: dict[str, Any] = json.loads(line)["chaos"]
                return found
        raise RuntimeError(f"the cluster did not start; see {self._folder / 'ray.log'}")


def serve(files: str, cpus: int) -> None:
    """Start a head, then start and kill nodes as told on stdin."""
    from ray._common.utils import get_default_ray_temp_dir
    from ray._private.ray_constants import PROCESS_TYPE_RAYLET
    from ray.cluster_utils import Cluster

    def say(what: dict[str, Any]) -> None:
        print(json.dumps({"chaos": what}), flush=True)

    # Ray notes the address there too, and fails on a machine where no Ray has run yet.
    Path(get_default_ray_temp_dir()).mkdir(parents=True, exist_ok=True)
    small: dict[str, Any] = {"object_store_memory": STORE_BYTES}
    cluster = Cluster(True, head_node_args={"num_cpus": 0, "include_dashboard": False, "temp_dir": files, **small})
    nodes: dict[int, Any] = {}
    say({"address": cluster.address})
    for line in sys.stdin:
        what = json.loads(line)
        if "add" in what:
            number = len(nodes)
            nodes[number] = cluster.add_node(num_cpus=cpus, **small)
            say({"node": number})
            continue
        node = nodes[what["kill"]]
        raylet = node.all_processes[PROCESS_TYPE_RAYLET][0].process.pid
        pids = [raylet, *(descendants(raylet) if what["at_once"] else [])]
        killed = send(pids, signal.SIGKILL)
        cluster.remove_node(node, allow_graceful=False)  # it waits for the raylet: no zombie is left
        say({"killed": killed})
    cluster.shutdown()


if __name__ == "__main__":
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    serve(sys.argv[1], int(sys.argv[2]))
