"""Score one model with the evaluators of a config, as a worker would."""

from __future__ import annotations

from collections.abc import Callable

from evaluators.base import EvaluatorSpec, ItemPool
from search.baseline import soup_rule
from search.checkpoints.fingerprint import fingerprint, refuse_non_finite
from search.checkpoints.reading import open_checkpoint
from search.checkpoints.view import require_model
from search.config import LoadedConfig
from search.errors import MeiosisError
from search.model_checks import BASE
from search.pool import Job, WorkerPlan
from search.recipe import ModelRef, Recipe
from search.setup import check_evaluators
from search.sources import merged_dtype


def evaluate_model(
    model: str, loaded: LoadedConfig, items: ItemPool, report: Callable[[str], None] = lambda _: None
) -> dict[str, float]:
    """Metrics of a checkpoint on a pool of items, `<evaluator>.<metric>` -> value.

    Raises:
        UserError: the model or the config has a fault.
        MeiosisError: the evaluation failed.
    """
    import torch

    from search.evaluation import Evaluation

    checkpoint = open_checkpoint(model)
    require_model(checkpoint, "evaluated")
    evaluators = check_evaluators(loaded, checkpoint)
    print_ = fingerprint(checkpoint, report=report)
    refuse_non_finite(model, print_)
    refs = {BASE: ModelRef(path=str(checkpoint.folder), sha256=print_.sha256)}
    specs = tuple(
        EvaluatorSpec(name, loaded.config.evaluators[name].use, evaluator.options.model_dump(mode="json"))
        for name, evaluator in evaluators.items()
    )
    cluster = loaded.config.cluster
    dtype = cluster.dtype or merged_dtype(checkpoint)
    # Over as many GPUs as a worker of the config would have, if they are here.
    gpus = max(1, min(int(cluster.gpus_per_worker), torch.cuda.device_count()))
    plan = WorkerPlan(refs, BASE, specs, cluster.device, dtype, cluster.threads, loaded.config.seed, gpus=gpus)
    recipe = Recipe(base=BASE, models=refs, rules=(soup_rule((BASE,)),), dtype=dtype)
    outcome = Evaluation(plan).run(Job(0, recipe, items))
    if outcome.failure:
        raise MeiosisError(f"{model}: {outcome.failure.message}") from RuntimeError(outcome.failure.detail)
    return dict(outcome.metrics)
