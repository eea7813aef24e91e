"""What the pool of a run says about its nodes, for `meiosis status`: a small JSON file in the folder of the pool."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from search.store.atomic import make_folder, write_atomic

NODES = "nodes.json"
"""Name in the folder of the pool, see `RunFolder.workers`. Nothing is read from it but for people: the run
does not depend on it."""


@dataclass(frozen=True)
class NodeState:
    """A node of the cluster, as the pool sees it.

    Attributes:
        host: host name, for people.
        id: first characters of Ray's id; several nodes may be on one host.
        state: `in use`, `draining` (about to go), `set aside` (workers keep dying there) or `gone`.
        workers: names of the workers there that are up.
        deaths: workers that died there or were replaced for their failures.
        why: why the node gets no jobs, empty where it does.
        until: local time at which that ends, or at which the node goes, if that is known.
    """

    host: str
    id: str
    state: str
    workers: tuple[str, ...] = ()
    deaths: int = 0
    why: str = ""
    until: str = ""


@dataclass(frozen=True)
class WorkersState:
    """Workers and nodes of a run.

    Attributes:
        written_at: local time.
        wanted: the most workers there may be.
        up: those that are up.
        share: how many of the cluster's the run may have beside the others; None where there are no others.
        others: the other runs on the cluster, as `run of user@host`.
    """

    written_at: str
    wanted: int
    up: int
    nodes: tuple[NodeState, ...]
    share: int | None = None
    others: tuple[str, ...] = ()


def write_nodes(folder: Path, state: WorkersState) -> None:
    """Replace the file in the folder of the pool. Raises OSError."""
    path = folder / NODES
    make_folder(path.parent)
    write_atomic(path, (json.dumps(asdict(state), indent=1) + "\n").encode())


def read_nodes(folder: Path) -> WorkersState | None:
    """What the file says; None where it is not there, or damaged: the run does not need it."""
    try:
        data = json.loads((folder / NODES).read_text(encoding="utf-8"))
        nodes = tuple(NodeState(**{**node, "workers": tuple(node["workers"])}) for node in data.pop("nodes"))
        others = tuple(str(other) for other in data.pop("others", ()))  # not in files of older versions
        return WorkersState(**data, nodes=nodes, others=others)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
