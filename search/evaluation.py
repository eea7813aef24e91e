"""The body of a worker: one candidate, from recipe to scores. No Ray in it.

A worker owns one live model. A candidate is merged straight into its parameters, the evaluators score
it, and what went wrong with a candidate is its outcome, not the end of the worker.
"""

from __future__ import annotations

import gc
import math
import os
import platform
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from evaluators.base import Context, Evaluator, Scores
from evaluators.registry import make_evaluator
from search.checkpoints.fingerprint import hash_tensors
from search.device_map import Layout, lay_out, plan_layout, room_on
from search.devices import worker_devices
from search.errors import DeviceLostError, MeiosisError
from search.merge.apply import Merger
from search.merge.live import Instead, LiveModel, build_live_model, model_class_of
from search.merge.random_deltas import Kept, with_random_deltas
from search.merge.sources import TensorSource
from search.merge.statistics import identities
from search.model_state import model_state
from search.paths.worker import Merged, Paths
from search.pool import Failure, FailureKind, Job, Outcome, WorkerPlan
from search.prefix.reuse import PrefixReuse, Watch
from search.racing.ladder import item_order
from search.racing.race import Race
from search.recipe import Recipe
from search.seeds import derive_seed, seeded
from search.soups.plan import LearnSoup
from search.sources import open_models, open_sources


class Evaluation:
    """Merges and scores candidates, one after the other.

    Args:
        plan: models, evaluators, devices and threads.
        devices: what the live model is laid over, instead of the devices of the plan.

    Attributes:
        model_seconds, evaluator_seconds: what it took to make them ready, without the import of libraries for models.

    Raises:
        MeiosisError: models or evaluators cannot be made ready here.
    """

    def __init__(self, plan: WorkerPlan, devices: Sequence[str] | None = None) -> None:
        import torch

        began = time.perf_counter()
        torch.set_num_threads(plan.threads)
        self._seed = plan.seed
        self.name = f"{platform.node()}/{os.getpid()}"
        self._devices = worker_devices(plan.device, plan.gpus) if devices is None else tuple(devices)
        device = self._devices[0]
        self._reserved = {"live": plan.beside_live, "learning": plan.beside_learning}
        self._layouts: dict[str, Layout] = {}
        self._reuse = PrefixReuse(plan.reuse_bytes)
        self._targets: dict[str, torch.Tensor] = {}
        base = plan.models[plan.base]
        self._folder, self._device, self._dtype = Path(base.path), device, plan.dtype
        checkpoints = open_models(plan.models, base=plan.base)
        opened = open_sources(checkpoints, models=plan.models, donor=plan.base)
        self._sources = opened.tensors
        # Where the files of the base are not the tensors and config that are merged, the model is made of these.
        own = tuple(checkpoints[plan.base].tensors) == tuple(opened.specs[plan.base]) and not opened.config
        self._instead = None if own else Instead(opened.tensors[plan.base], opened.config)
        self._read_as: dict[str, str] = {}
        self._new_merger = partial(
            Merger,
            device=device,
            prepared_folder=Path(plan.prepared_folder) if plan.prepared_folder else None,
            names=opened.names,
            statistics=opened.statistics,
            read_as=self._read_as,
        )
        self._identity = {
            **{name: ref.sha256 or ref.path for name, ref in plan.models.items()},
            **identities(opened.statistics),
        }
        self._real, self._kept = opened.tensors, Kept()
        self._merger = self._new_merger(opened.tensors, identity=self._identity)
        self._of_models: tuple[tuple[str, int], ...] = ()
        self._mergers: dict[tuple[tuple[str, int], ...], tuple[Mapping[str, TensorSource], Merger]] = {}
        self._mergers[()] = (opened.tensors, self._merger)
        self._names = tuple(opened.tensors[plan.base].names)
        opened_at = time.perf_counter()
        model_class_of(self._folder)  # several seconds, of libraries
        imported_at = time.perf_counter()
        self._build()
        self._model.check_holds(opened.tensors[plan.base])
        built_at = time.perf_counter()
        self.model_seconds = opened_at - began + built_at - imported_at
        context = Context(model_folder=Path(base.path), device=device, seed=plan.seed)
        self._evaluators: dict[str, Evaluator] = {}
        for spec in plan.evaluators:
            evaluator = make_evaluator(spec)
            evaluator.prepare(context)
            self._evaluators[spec.name] = evaluator
        self.evaluator_seconds = time.perf_counter() - built_at

    def _build(self) -> None:
        """Make the live model, and know nothing of what is in it."""
        # There may be no room for two.
        self._changed = True
        self._merger.invalidate()
        self._targets = {}
        self._paths: Paths | None = None
        self.__dict__.pop("_model", None)
        self._reuse.clear()
        self._let_go()
        self._model = self._live_model(self._dtype)
        self._targets = self._model.targets(self._names)
        self._elsewhere = [name for name in self._names if name not in self._targets]
        self._changed = False

    def _live_model(self, dtype: str | None, purpose: str = "live") -> LiveModel:
        def lay(model: Any) -> None:
            if purpose not in self._layouts:  # made once: a model that is built again is where it was
                room = room_on(self._devices, self._reserved[purpose])
                self._layouts[purpose] = plan_layout(model, self._devices, room)
            lay_out(model, self._layouts[purpose])

        several = len(self._devices) > 1
        return build_live_model(
            self._folder,
            device="cpu" if several else self._device,
            dtype=dtype,
            instead=self._instead,
            lay_out=lay if several else None,
        )

    @property
    def layout(self) -> dict[str, Any] | None:
        """What of the live model is on which of several devices, as plain data; None where it is on one."""
        return self._layouts["live"].as_data() if "live" in self._layouts else None

    def _let_go(self) -> None:
        """Free what a model that nobody uses any more takes: hooks of accelerate hold on to their modules."""
        if len(self._devices) > 1:
            gc.collect()

    def run(self, job: Job) -> Outcome:
        """Evaluate one candidate; never raises for what the candidate or an evaluator did.

        Raises:
            DeviceLostError: the accelerator is of no use to this process any more.
        """
        outcome = self._run(job)
        if outcome.failure is not None and outcome.failure.kind == "out_of_memory" and self._reuse.shrink():
            outcome = self._run(job)  # the room was taken by what was kept of other candidates
        return outcome

    def _run(self, job: Job) -> Outcome:
        import torch

        self._use_models_of(job.recipe)
        if self._changed:
            self._build()

        outcome = Outcome(job.candidate, job.items, worker=self.name)
        started = time.perf_counter()
        merged = started
        try:
            with self._merged(job.recipe) as candidate:
                bytes_read = candidate.bytes_read
                digest = hash_tensors(candidate.tensors()) if job.hash_weights else None
                merged = time.perf_counter()
                scores, censored = self._score(job, candidate)
            metrics = self._aggregate(scores)
            if job.learn is not None:
                metrics |= self._learn(job.recipe, job.learn)
            failed = None
        except (torch.OutOfMemoryError, MemoryError) as error:
            self._merger.invalidate()
            failed = self._failed(outcome, error, started, merged)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - what a plug-in raises is the outcome of this trial
            self._merger.invalidate()
            failed = self._failed(outcome, error, started, merged)
            for device in self._devices:
                require_device(device)
        if failed is not None:
            # Only now: the traceback of the error held on to what it had allocated.
            if torch.device(self._device).type == "cuda":
                torch.cuda.empty_cache()
            return failed
        failure = not_finite(metrics)
        return Outcome(
            job.candidate,
            job.items,
            scores={} if failure else scores,
            metrics={} if failure else metrics,
            failure=failure,
            weights_sha256=digest,
            merge_seconds=merged - started,
            evaluate_seconds=time.perf_counter() - merged,
            worker=self.name,
            node=platform.node(),
            bytes_read=bytes_read,
            layers_run=self._reuse.layers_run,
            layers_reused=self._reuse.layers_reused,
            censored=censored and failure is None,
        )

    def _use_models_of(self, recipe: Recipe) -> None:
        """Merge the real models from now on, or placebos of them: what a recipe calls its models is the same."""
        placebos = tuple((n, ref.random_delta) for n, ref in recipe.models.items() if ref.random_delta is not None)
        if placebos == self._of_models:
            return
        if placebos not in self._mergers:
            tensors = with_random_deltas(self._real, recipe.models, recipe.base, self._kept)
            # What is prepared for a placebo stays here: on disk, one without a content hash could not be told apart.
            drawn = dict(placebos)
            identity = {name: known for name, known in self._identity.items() if name not in drawn}
            self._mergers[placebos] = (tensors, self._new_merger(tensors, identity=identity))
        self._of_models = placebos
        self._sources, self._merger = self._mergers[placebos]
        self._merger.invalidate()
        self._paths = None  # its layers are those of the other models
        self._reuse.clear()

    @contextmanager
    def _merged(self, recipe: Recipe) -> Iterator[Merged]:
        """Run a block with a candidate in the live model. Its checkpoint has the live tensors, and those that the
        model does not use."""
        if recipe.scales is None:
            bytes_read = self._merger.merge_into(recipe, self._targets).bytes_read
            yield Merged(
                bytes_read,
                lambda: {**self._targets, **dict(self._merger.merge_tensors(recipe, self._elsewhere))},
                self._targets,
                self._merger.fingerprints(recipe, self._targets),
            )
            return
        if self._paths is None:
            self._paths = Paths(self._model, self._merger, self._read_as, self._targets, self._names)
        with self._paths.on(recipe) as path:
            yield path

    def _score(self, job: Job, candidate: Merged) -> tuple[dict[str, Scores], bool]:
        """Scores of the items of the job, and whether it was stopped before it had those of all."""
        with self._reuse.watching(self._model.model, candidate.targets, candidate.made_by, candidate.along) as watch:
            if job.race is None:
                items = {name: evaluator.items(job.items) for name, evaluator in self._evaluators.items()}
                return self._scores_of(items, watch), False
            return self._raced(job, job.race, watch)

    def _raced(self, job: Job, race: Race, watch: Watch) -> tuple[dict[str, Scores], bool]:
        """The scores of a race, in its order of items."""
        every = self._evaluators.items()
        orders = {
            name: race.chosen(name, item_order(self._seed, name, tuple(each.items(job.items)))) for name, each in every
        }
        found: dict[str, Scores] = {}
        for rung, sizes in enumerate(race.rungs):
            begun = {name: len(found[name].items) if found else 0 for name in sizes}
            items = {name: orders[name][begun[name] : size] for name, size in sizes.items()}
            for name, scores in self._scores_of(items, watch, rung).items():
                added = _in_order(scores, orders[name][begun[name] : sizes[name]])
                found[name] = Scores.join([found[name], added]) if name in found else added
            if race.stops(rung, found):
                return found, True
        return found, False

    def _scores_of(self, items: Mapping[str, Sequence[str]], watch: Watch, rung: int = 0) -> dict[str, Scores]:
        """Evaluator -> scores of these items; `rung` counts the parts in which the items of a pool are scored."""
        import torch

        found = {}
        model = self._model.model
        state = model_state(model)
        # Until it is seen that they left it alone, the model is not to be trusted: what was moved, wrapped
        # or replaced in it is not put right by merging again.
        self._changed = True
        try:
            with torch.no_grad():
                for name in items:
                    if rung and not items[name]:
                        continue  # it has few, and all of them were scored in the first part
                    evaluator = self._evaluators[name]
                    watch.allowed = evaluator.plain_forward
                    # The same draws for every candidate: they are compared with each other.
                    purpose = ("evaluator", name, rung) if rung else ("evaluator", name)
                    with seeded(derive_seed(self._seed, *purpose), *self._devices):
                        scores = Scores.join(list(evaluator.evaluate(model, items[name])))
                    found[name] = complete(name, scores, items[name])
                    model.eval()
                    self._changed = model_state(model) != state
                    if self._changed:
                        raise MeiosisError(
                            f"evaluator '{name}' changed the weights of the model; it must work on a copy"
                        )
        except (Exception, SystemExit):
            model.eval()
            self._changed = model_state(model) != state
            raise
        return found

    def _learn(self, start: Recipe, plan: LearnSoup) -> dict[str, float]:
        """Learn in a float32 model of its own, which is gone afterwards, whatever dtype candidates have."""
        from search.soups.learned import learn_soup

        try:
            with seeded(derive_seed(self._seed, "soup"), *self._devices):
                return learn_soup(
                    start,
                    plan,
                    live=self._live_model("float32", "learning"),
                    names=self._names,
                    merger=self._merger,
                    sources=self._sources,
                    evaluators=self._evaluators,
                )
        finally:
            self._merger.invalidate()  # it knows the tensors of that model, and would keep them
            self._let_go()

    def _aggregate(self, scores: Mapping[str, Scores]) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, evaluator in self._evaluators.items():
            metrics = evaluator.aggregate(scores[name])
            missing = sorted(set(evaluator.metrics) - set(metrics))
            if missing:
                raise MeiosisError(f"evaluator '{name}' gave no '{missing[0]}', which it declares as a metric")
            found |= {f"{name}.{metric}": float(value) for metric, value in metrics.items()}
        return found

    @staticmethod
    def _failed(outcome: Outcome, error: BaseException, started: float, merged: float) -> Outcome:
        return Outcome(
            outcome.candidate,
            outcome.items,
            failure=failure_of(error),
            merge_seconds=merged - started,
            evaluate_seconds=time.perf_counter() - merged,
            worker=outcome.worker,
            node=platform.node(),
        )


def failure_of(error: BaseException) -> Failure:
    """What a trial records of what was raised in it."""
    import torch

    kind: FailureKind = "out_of_memory" if isinstance(error, torch.OutOfMemoryError | MemoryError) else "error"
    message = f"{type(error).__name__}: {error}".splitlines()[0]
    return Failure(kind, message, "".join(traceback.format_exception(error)))


def not_finite(metrics: Mapping[str, float]) -> Failure | None:
    """The failure of a trial one of whose metrics is no finite number."""
    bad = min((name for name, value in metrics.items() if not math.isfinite(value)), default=None)
    return None if bad is None else Failure("not_finite", f"{bad} is {metrics[bad]}")


def require_device(device: str) -> None:
    """Compute something small on the device of the live model.

    Raises:
        DeviceLostError: not even that is possible.
    """
    import torch

    if torch.device(device).type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.ones(2, device=device).sum().item()
    except RuntimeError as error:
        raise DeviceLostError(
            f"{device} fails whatever it is asked, until this process ends: {str(error).splitlines()[0]}; "
            "the run can go on in a new one (meiosis resume)"
        ) from error


def _in_order(scores: Scores, items: Sequence[str]) -> Scores:
    """The same scores with their items in another order."""
    places = {item: place for place, item in enumerate(scores.items)}
    rows = [places[item] for item in items]
    return Scores(
        tuple(items),
        {metric: np.asarray(values, np.float64)[rows] for metric, values in scores.values.items()},
        np.asarray(scores.weights, np.float64)[rows],
    )


def complete(name: str, scores: Scores, items: Sequence[str]) -> Scores:
    """The scores, if they are those of the items asked for.

    Raises:
        MeiosisError: missing, additional or repeated items.
    """
    expected = list(items)
    if sorted(scores.items) != sorted(expected):
        raise MeiosisError(f"evaluator '{name}' scored {len(scores.items)} items, {len(expected)} were asked for")
    return scores
