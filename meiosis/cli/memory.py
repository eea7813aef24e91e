"""Memory of a search: planned for the nodes that it would run on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meiosis.cli.common import say

if TYPE_CHECKING:
    from search.memory import MemoryPlan
    from search.setup import Setup


def memory_plan(setup: Setup) -> MemoryPlan:
    """Workers on this machine, or on the cluster that the config names, which is joined and left again."""
    from cluster.need import Need
    from search.machine import has_gpu, make_probe, visible_gpus
    from search.memory import Node, needs_of, plan_memory

    cluster = setup.config.cluster
    gpus = cluster.gpus_per_worker
    if cluster.address is None:
        found = make_probe()(())
        # Without workers of their own, candidates are evaluated one after the other.
        workers = 1 if cluster.pool == "local" else cluster.workers
        seen = visible_gpus(found["gpus"])
        slots = Need(gpus=gpus if seen else 0.0).fits({"GPU": len(seen)}, 1 << 30)
        nodes: tuple[Node, ...] = (Node(found["name"], found["memory"], seen, slots),)
        return plan_memory(needs_of(setup, has_gpu=has_gpu()), nodes, workers, gpus)
    from cluster.local_ray import open_session
    from cluster.node_memory import cluster_nodes

    session = open_session(cluster.address)
    try:
        files = [(str(file), file.stat().st_size) for one in setup.checkpoints.values() for file in one.files]
        nodes = cluster_nodes(session, cpus=cluster.threads, gpus=gpus, files=files)
    finally:
        session.close()
    return plan_memory(needs_of(setup, has_gpu=gpus > 0), nodes, cluster.workers, gpus)


@contextmanager
def planned(setup: Setup, log: Path | None = None) -> Iterator[MemoryPlan]:
    """What is done inside is done if the workers of a search fit; Ray that was joined to see it stays until its end.

    Args:
        log: file for what Ray prints.

    Raises:
        UserError: they do not fit, and the config does not want it tried all the same.
    """
    from evaluators.errors import UserError

    cluster = setup.config.cluster
    session = None
    if cluster.address is not None:
        from cluster.local_ray import open_session

        session = open_session(cluster.address, log=log)
    try:
        plan = memory_plan(setup)
        try:
            plan.require()
        except UserError as error:
            if cluster.check_memory:
                raise
            say(f"going on all the same: {error}")
        yield plan
    finally:
        if session is not None:
            session.close()


def refuse_at_once(setup: Setup) -> None:
    """Refuse what cannot run before there is a folder of the run.

    The memory of a cluster is looked at when it is joined, see `planned`.

    Raises:
        UserError: the workers do not fit on this machine.
        WorkerError: nobody answers at the address of the cluster.
    """
    cluster = setup.config.cluster
    if cluster.address is not None:
        from cluster.access import require_head

        require_head(cluster.address)
    elif cluster.check_memory:
        memory_plan(setup).require()


def as_data(plan: MemoryPlan) -> dict[str, Any]:
    """The plan for programs."""
    needs = plan.needs
    return {
        "sources shared by all workers": needs.sources,
        "live model of one worker": needs.live,
        "activations of one worker": needs.activations,
        "buffers of one worker": needs.merging,
        "hidden states kept by one worker": plan.reuse,
        "learned soup of one worker": needs.learning,
        "main memory of one worker": needs.host,
        "GPU memory of one worker": needs.gpu * needs.gpus,
        "GPUs of one worker": needs.gpus if needs.on_gpu else 0,
        "memory on each GPU of one worker": needs.gpu,
        "all workers": needs.live * plan.workers,
        "largest number of workers": plan.largest,
        "nodes": [
            {
                "name": share.node.name,
                "workers": share.workers,
                "workers that fit": share.most,
                "free": share.node.memory,
                "free on GPUs": list(share.node.gpus),
                "to be copied": share.node.lacks,
            }
            for share in plan.shares
        ],
    }


def lines(plan: MemoryPlan, shards: str) -> list[str]:
    """The plan for people."""
    from search.memory_sizes import gib

    needs = plan.needs
    parts = [f"{gib(needs.live)} of live model", f"at most {gib(needs.activations)} of activations"]
    if needs.learning:
        parts.append(f"or {gib(needs.learning)} while it learns a soup")
    parts.append(f"{gib(needs.merging)} of buffers")
    kept = ""
    own = f"{gib(needs.host)} of memory" + (f" and {gib(needs.gpu)} of {_its_gpus(needs.gpus)}" if needs.on_gpu else "")
    if needs.reuse:
        parts.append(f"{gib(needs.reuse)} of hidden states that are kept")
    elif plan.reuse:
        kept = f"; {gib(plan.reuse)} of what is left are for hidden states"
    found = [
        f"Memory: {gib(needs.sources)} of sources, mapped once and shared by all workers of a node. Each worker: "
        f"{', '.join(parts)}; with libraries {own}{kept}."
    ]
    for share in plan.shares:
        node, used = share.node, needs.host * share.workers
        text = f"Node {node.name}: {share.workers} worker{'s' * (share.workers != 1)} need {gib(used)} of "
        text += f"{gib(node.memory)} that are free"
        if needs.on_gpu:
            free = ", ".join(map(gib, node.gpus)) or "unknown"
            text += f", and of its GPUs {gib(needs.gpu)} each (free: {free})"
            if needs.gpus > 1:
                text += f", over {needs.gpus} of which every worker lays its model"
        left = node.memory - used
        if 0 <= left < needs.sources:
            text += f"; only {gib(left)} are left for the sources, which are read from disk again and again"
        if node.lacks and shards != "shared":
            text += f"; does not see {gib(node.lacks)} of the models, which will be copied to it once"
        found.append(text + ".")
    missing = plan.workers - sum(share.workers for share in plan.shares)
    if missing > 0 and plan.workers > 1:
        found.append(f"There is no room for {missing} of {plan.workers} workers until nodes join.")
    return found


def _its_gpus(count: int) -> str:
    return "its GPU" if count == 1 else f"each of its {count} GPUs"
