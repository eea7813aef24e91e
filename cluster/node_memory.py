"""What the nodes of a cluster have for workers, asked before any worker starts."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.local_ray import Session
from cluster.need import Need
from search.machine import make_probe
from search.memory import Node

PROBE_SECONDS = 60.0


def cluster_nodes(
    session: Session, *, cpus: float, gpus: float, files: Sequence[tuple[str, int]] = ()
) -> tuple[Node, ...]:
    """The nodes of a cluster that can hold workers. A node that does not answer is taken at Ray's word.

    Args:
        cpus, gpus: what a worker reserves; by this and by nothing else Ray decides where one fits.
        files: path and size of what workers read.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    need = Need(0 if session.own else cpus, gpus)
    probe = ray.remote(num_cpus=0, max_retries=0)(make_probe())
    asked = {
        node["NodeID"]: probe.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(list(files))
        for node in ray.nodes()
        if node["Alive"]
    }
    ready, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=PROBE_SECONDS)
    found = []
    for node in ray.nodes():
        call = asked.get(node["NodeID"])
        if call is None:
            continue
        have = node["Resources"]
        told = {"name": node["NodeManagerHostname"], "memory": 1 << 62, "gpus": [], "lacks": 0}
        if call in ready:
            try:
                told = ray.get(call)
            except ray.exceptions.RayError:  # it died meanwhile
                continue
        found.append(
            Node(
                name=f"{told['name']} ({node['NodeID'][:8]})",
                memory=int(min(told["memory"], have.get("memory", 1 << 62))),
                # A GPU that Ray was not given is not ours.
                gpus=tuple(told["gpus"][: int(have.get("GPU", 0))]),
                slots=need.fits(have, 1 << 30),
                lacks=told["lacks"],
            )
        )
    return tuple(node for node in found if node.slots > 0)
