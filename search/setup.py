"""Everything that can be known before anything is spent: config, models, plug-ins and data that fit.

All faults of a config are collected and reported at once, each with the line of its key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from evaluators.base import Evaluator, EvaluatorSpec, Metric
from evaluators.registry import EVALUATORS, make_evaluator
from search.auto_optimizer import chosen_optimizer, optimizer_keys
from search.baseline import BASELINES, BaselineOptions, Facts, check_baseline
from search.baseline import options_class as baseline_options
from search.checkpoints.fingerprint import fingerprint, refuse_non_finite
from search.checkpoints.reading import Checkpoint
from search.config import Config, LoadedConfig, OptimizerConfig
from search.errors import CheckpointError, UserError, nearest
from search.faults import Faults
from search.model_checks import BASE, check_architecture, check_sources, model_key, open_models, tensor_names
from search.objective import Objective, make_objective
from search.optimizer import OPTIMIZERS, MakeOptimizer, Problem, options_class
from search.optimizers import optimizer_named
from search.paths.stages import in_two_stages, two_problems
from search.racing.choice import estimate_faults, resolved_fitness, rotate_faults
from search.racing.config import FitnessConfig
from search.recipe import ModelRef
from search.run_log import emit
from search.section_checks import check_batches, check_budget, check_gpus, check_item_limit, check_metrics, metrics_of
from search.sources import merged_dtype
from search.space import Space, SpaceError, make_space
from search.statistics.check import check_statistics, statistics_paths
from search.store.urls import is_url
from search.tracker import complete_options, tracker_faults
from search.yaml_source import Location


@dataclass(frozen=True)
class Setup:
    """A config that can run.

    Attributes:
        config: as loaded, with all paths absolute.
        checkpoints: `base` and the sources.
        models: the same as references with content hashes.
        evaluators: name -> evaluator, checked but not prepared.
        metrics: `<evaluator>.<metric>` -> what it means.
        data_sha256: evaluator name -> hash of its items.
    """

    config: Config
    checkpoints: Mapping[str, Checkpoint]
    models: Mapping[str, ModelRef]
    space: Space
    evaluators: Mapping[str, Evaluator]
    metrics: Mapping[str, Metric]
    objective: Objective
    make_optimizer: MakeOptimizer
    data_sha256: Mapping[str, str]

    @property
    def device(self) -> str:
        """Device of the workers. Ray shows all GPUs to workers that reserve none; those are not theirs."""
        cluster = self.config.cluster
        reserved = cluster.pool == "local" or cluster.gpus_per_worker > 0
        return "cpu" if cluster.device == "auto" and not reserved else cluster.device

    @property
    def dtype(self) -> str | None:
        """Dtype of the live model and of candidates; None for that of the base, where it has only one."""
        return self.config.cluster.dtype or merged_dtype(self.checkpoints[BASE])


def window(config: Config) -> int:
    """Candidates in flight at once: belongs to the run, since what is asked depends on it."""
    return config.search.window or 2 * config.cluster.workers


def first_problem(config: Config, space: Space) -> Problem:
    """What the optimiser of a config is asked to solve, as far as it is known before generation 0."""
    return Problem(
        space.initial().vector(),
        config.search.budget,
        window(config),
        config.seed,
        config.search.optimizer.step,
        space.genes,
        len(config.objectives.terms),
    )


def _staged(config: Config, space: Space, make: MakeOptimizer) -> MakeOptimizer:
    """The optimiser of the whole genome: one, or one for the merge and one for its path."""
    path = config.space.path
    after = path is not None and path.stage == "after"
    return in_two_stages(make, len(space.parameters.genes), path.share) if path is not None and after else make


def check(
    loaded: LoadedConfig,
    report: Callable[[str], None] = lambda _: None,
    sound: Callable[[], None] = lambda: None,
    *,
    begun: bool = False,
) -> Setup:
    """Check a config against its models, plug-ins and data.

    Args:
        loaded: from `load_config`.
        report: is called with a line before something that takes long.
        sound: is called when only the contents of the models are left to be looked at, which can take long.
        begun: whether it is the config of a run that exists, see `rotate_faults`.

    Raises:
        ConfigError: every fault that was found, one per line, each with file, line, key and way out.
    """
    faults = Faults(loaded)
    config = loaded.config
    evaluators = _evaluators(loaded, faults)
    metrics = metrics_of(evaluators)
    check_metrics(loaded, metrics, set(evaluators), faults)
    baselines = _baselines(loaded, evaluators, faults)
    check_budget(config, faults)
    faults.lines += tracker_faults(loaded)
    check_gpus(config, faults)
    if not begun:
        check_batches(config, evaluators, faults)
    checkpoints = open_models(loaded, faults)
    models = {name: ModelRef(path=str(checkpoint.folder), sha256=None) for name, checkpoint in checkpoints.items()}
    space: Space | None = None
    there = BASE in checkpoints
    try:
        space = make_space(
            # Without a base there are no tensors that patterns could match; all else can be checked.
            config.space if there else config.space.model_copy(update={"patterns": {}, "path": None}),
            tensors=tensor_names(checkpoints) if there else (),
            models=models,
            sources=config.models.sources,
            seed=config.seed,
            dtype=config.cluster.dtype,
            model_config=checkpoints[BASE].config if there else None,
        )
    except SpaceError as error:
        faults.add(("space", *error.key), str(error))
    if there:
        check_architecture(checkpoints[BASE], evaluators, faults)
    optimizer = chosen_optimizer(config, space)
    make_optimizer = _optimizer(loaded, optimizer, space if there else None, faults)
    for message in rotate_faults(config, optimizer.name, metrics, begun=begun):
        faults.add(("search", "fitness", "rotate"), message)
    for message in () if begun else estimate_faults(config):
        faults.add(("search", "fitness", "estimate"), message)
    if len(checkpoints) == len(config.models.sources) + 1:
        check_sources(checkpoints, faults)
    faults.raise_if_any()
    fitness = resolved_fitness(config, optimizer.name, metrics)
    check_item_limit(config, fitness, evaluators, faults)
    faults.raise_if_any()
    emit("config_checked")
    sound()
    # Reading every byte comes last, when nothing else is wrong.
    models = {}
    for name, checkpoint in checkpoints.items():
        print_ = fingerprint(checkpoint, report=report)
        try:
            refuse_non_finite(name, print_)
        except CheckpointError as error:
            faults.add(model_key(name), str(error))
        models[name] = ModelRef(path=str(checkpoint.folder), sha256=print_.sha256)
    models = check_statistics(loaded, models, faults.add)
    faults.raise_if_any()
    emit("models_hashed")
    assert space is not None
    assert make_optimizer is not None
    return Setup(
        config=_absolute(loaded, checkpoints, evaluators, baselines, optimizer, fitness),
        checkpoints=checkpoints,
        models=models,
        space=make_space(
            config.space,
            tensors=tensor_names(checkpoints),
            models=models,
            sources=config.models.sources,
            seed=config.seed,
            dtype=config.cluster.dtype or merged_dtype(checkpoints[BASE]),
            model_config=checkpoints[BASE].config,
        ),
        evaluators=evaluators,
        metrics=metrics,
        objective=make_objective(config.objectives, config.constraints, metrics),
        make_optimizer=_staged(config, space, make_optimizer),
        data_sha256={name: evaluator.data_sha256() for name, evaluator in evaluators.items()},
    )


def check_evaluators(loaded: LoadedConfig, model: Checkpoint) -> dict[str, Evaluator]:
    """Only the evaluators of a config, checked, also for whether they can score `model`."""
    faults = Faults(loaded)
    evaluators = _evaluators(loaded, faults)
    check_architecture(model, evaluators, faults)
    faults.raise_if_any()
    return evaluators


def _evaluators(loaded: LoadedConfig, faults: Faults) -> dict[str, Evaluator]:
    found: dict[str, Evaluator] = {}
    for name, section in loaded.config.evaluators.items():
        key: Location = ("evaluators", name)
        try:
            evaluator = make_evaluator(EvaluatorSpec(name, section.use, section.options), folder=loaded.folder)
        except ValidationError as error:
            options = EVALUATORS.get(section.use).Options
            faults.lines += loaded.source.faults(error, options, key)
            continue
        except UserError as error:
            faults.add((*key, "use"), str(error))
            continue
        try:
            evaluator.check()
        except UserError as error:
            faults.add(key, str(error))
            continue
        found[name] = evaluator
    return found


def _baselines(loaded: LoadedConfig, evaluators: Mapping[str, Evaluator], faults: Faults) -> dict[str, BaselineOptions]:
    """Baseline -> its options, complete."""
    config = loaded.config
    facts = Facts(tuple(config.models.sources), evaluators, tuple(term.metric for term in config.objectives.terms))
    found: dict[str, BaselineOptions] = {}
    for index, entry in enumerate(config.search.baselines):
        key: Location = ("search", "baselines", index)
        if entry.name not in BASELINES.names():
            faults.add(key, f"unknown baseline '{entry.name}'{nearest(entry.name, BASELINES.names())}")
            continue
        if entry.name in found:
            faults.add(key, f"'{entry.name}' stands twice")
        try:
            found[entry.name] = check_baseline(entry.name, entry.options, facts)
        except ValidationError as error:
            faults.lines += loaded.source.faults(error, baseline_options(entry.name), (*key, entry.name))
        except UserError as error:
            faults.add((*key, entry.name), str(error))
    return found


def _problems(config: Config, space: Space) -> tuple[Problem, ...]:
    """All that an optimiser will be asked to solve."""
    problem, path = first_problem(config, space), config.space.path
    if path is not None and path.stage == "after":
        return two_problems(problem, len(space.parameters.genes), path.share)
    return (problem,)


def _optimizer(
    loaded: LoadedConfig, section: OptimizerConfig, space: Space | None, faults: Faults
) -> MakeOptimizer | None:
    """The maker of the optimiser, with its options; with a space it was tried where it may refuse."""
    key = ("search", "optimizer")
    try:
        make = optimizer_named(section.name, section.options)
        # Those of nevergrad can refuse a problem; to ask them means to import them, which ours can be spared.
        if space is not None and section.name not in OPTIMIZERS.names():
            for problem in _problems(loaded.config, space):
                make(problem)
    except ValidationError as error:
        faults.lines += loaded.source.faults(error, optimizer_keys(section.name), key)
        return None
    except UserError as error:
        faults.add(key, str(error))
        return None
    return make


def _absolute(
    loaded: LoadedConfig,
    checkpoints: Mapping[str, Checkpoint],
    evaluators: Mapping[str, Evaluator],
    baselines: Mapping[str, BaselineOptions],
    optimizer: OptimizerConfig,
    fitness: FitnessConfig,
) -> Config:
    """The config with every path absolute and all options, so that the run folder is enough to go on from anywhere."""
    data: dict[str, Any] = loaded.config.model_dump(mode="json")
    data["models"] = {
        "base": str(checkpoints[BASE].folder),
        "sources": {name: str(checkpoints[name].folder) for name in loaded.config.models.sources},
        "statistics": statistics_paths(loaded),
    }
    data["evaluators"] = {
        name: {"use": loaded.config.evaluators[name].use, **evaluator.options.model_dump(mode="json")}
        for name, evaluator in evaluators.items()
    }
    data["search"]["baselines"] = [{name: made.model_dump(mode="json")} for name, made in baselines.items()]
    options = options_class(optimizer.name).model_validate(optimizer.options).model_dump(mode="json")
    data["search"]["optimizer"] = {"name": optimizer.name, "step": optimizer.step, **options}
    data["search"]["fitness"] = fitness.model_dump(mode="json")
    data["tracking"] = complete_options(loaded.config.tracking)
    # What a command writes goes where the user stands, what it reads is found from the config.
    if not is_url(loaded.config.results):
        data["results"] = str(Path(loaded.config.results).expanduser().resolve())
    return Config.model_validate(data)
