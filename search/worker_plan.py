"""What a search tells its workers."""

from __future__ import annotations

from dataclasses import replace

from evaluators.base import EvaluatorSpec
from search.memory import MemoryPlan, needs_of
from search.model_checks import BASE
from search.pool import WorkerPlan
from search.setup import Setup


def worker_plan(setup: Setup) -> WorkerPlan:
    """The same for every worker; where the config leaves open what they keep, see `with_room`."""
    cluster = setup.config.cluster
    needs = needs_of(setup, has_gpu=True) if cluster.gpus_per_worker > 1 else None
    return WorkerPlan(
        models=dict(setup.models),
        base=BASE,
        evaluators=tuple(
            EvaluatorSpec(name, section.use, section.options) for name, section in setup.config.evaluators.items()
        ),
        device=setup.device,
        dtype=setup.dtype,
        threads=cluster.threads,
        seed=setup.config.seed,
        gpus=max(1, int(cluster.gpus_per_worker)),
        beside_live=needs.beside_live if needs else None,
        beside_learning=needs.beside_learning if needs else None,
        reuse_bytes=int((cluster.reuse_gib or 0) * 2**30),
        candidates_per_forward=cluster.candidates_per_forward,
    )


def with_room(plan: WorkerPlan, setup: Setup, memory: MemoryPlan) -> WorkerPlan:
    """The plan for workers that keep as many hidden states as their nodes have room for, unless the config says."""
    return plan if setup.config.cluster.reuse_gib is not None else replace(plan, reuse_bytes=memory.reuse)
