"""What a search tells its workers."""

from __future__ import annotations

from evaluators.base import EvaluatorSpec
from search.memory import needs_of
from search.pool import WorkerPlan
from search.setup import BASE, Setup


def worker_plan(setup: Setup) -> WorkerPlan:
    """The same for every worker."""
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
    )
