"""One search from config to exported model, in a run folder that is enough to go on from.

`start` and `resume` differ only in where the setup comes from: the loop replays whatever the history
holds, so a new run is a resumed one with an empty history.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from search.arms import Arms, with_arms
from search.budget import Budget, Spending, Used, end_in_force, why_ended
from search.candidate import Candidate
from search.certificate import ArmName
from search.checkpoints.writing import written_sha256
from search.driver import Driver, Limits, replay
from search.errors import DeviceLostError, InterruptedRun, MeiosisError, RunError, UserError
from search.extension import extend, items_per_candidate
from search.finals import earlier_verdicts, finish
from search.in_flight import Key
from search.manifest import make_manifest, read_manifest, versions
from search.model_card import markdown_table
from search.observing import Observer
from search.pareto.recorded import pick_trial
from search.pool import Outcome, Pool, WorkerPlan
from search.population import Population
from search.prefix.affinity import Prefixes
from search.progress import Progress, Watcher
from search.racing.kinds import make_fitness
from search.recipe import Recipe
from search.reopening import load_setup
from search.replay import replay_ordered
from search.report import write_report
from search.setup import Setup
from search.stopping import stop_requests
from search.store.atomic import disk_is_full
from search.store.events import End, Event, Trial
from search.store.history import History
from search.store.remote import mirrored
from search.store.remote_run import create_remote
from search.store.run_folder import RunFolder
from search.store.sessions import Sessions
from search.store.spool import Spool
from search.store.urls import is_url
from search.trials import may_be_best
from search.verdict import Verdict
from search.worker_plan import worker_plan

__all__ = ["Finished", "Watcher", "export_trial", "load_setup", "make_population", "resume", "start"]

MakePool = Callable[[Setup, WorkerPlan, Path], Pool]
"""Makes the workers of a run: setup, plan for the workers, and a folder that the run owns."""


@dataclass(frozen=True)
class Finished:
    """A completed run.

    Attributes:
        folder: the run folder.
        verdict: the table and what follows from it.
        model: folder of the exported model.
    """

    folder: RunFolder
    verdict: Verdict
    model: Path
    seconds: Mapping[str, float] = field(default_factory=dict)


def start(setup: Setup, make_pool: MakePool, watcher: Watcher, name: str | None = None) -> Finished:
    """Run a new search.

    Args:
        setup: from `search.setup.check`.
        make_pool: called once, when the first candidate must be evaluated.
        watcher: is told what happens.
        name: name of the run; by default config name and time.

    Raises:
        UserError: a run of that name exists.
        InterruptedRun: the user stopped it; it can be resumed.
    """
    results, manifest = setup.config.results, make_manifest(setup)
    if is_url(results):
        folder = create_remote(results, name, manifest)
    else:
        folder = RunFolder.create(Path(results), name, manifest)
    return _carry_on(setup, folder, make_pool, watcher)


def resume(
    folder: RunFolder,
    make_pool: MakePool,
    watcher: Watcher,
    changes: Mapping[str, Any] | None = None,
    *,
    budget: Mapping[str, Any] | None = None,
    places: Sequence[Path] = (),
    arms: Sequence[ArmName] = (),
) -> Finished:
    """Go on with a run exactly where it stopped, extend it, or show what a finished one found.

    Args:
        folder: the run.
        changes: keys of `cluster` that may differ from those at the start; the trajectory does not depend on
            them (on another kind of device the last bits do).
        budget: new limits, see `Budget.changed`. A finished run goes on when they allow more: it is decided and
            certified again, its earlier verdict stays in the history, and the model is replaced when the new
            one is whole.
        places: folders to look in for models and data that are no longer where they were.
        arms: searches that the winner is compared with beside those that the config names. A finished run keeps its
            winner and gets a new verdict with more rows.

    Raises:
        UserError: models or data are nowhere, or the new limits allow nothing.
        RunError: sources or evaluator data are not those of the start, or another driver is at work.
    """
    setup = load_setup(folder, watcher, changes, places)
    return _carry_on(setup, folder, make_pool, watcher, budget or {}, places, arms)


def make_population(setup: Setup, in_flight: int, worker_seed: int | None = None) -> Population:
    """The population of a run, fresh.

    Args:
        worker_seed: seed of the workers, who put the items of a race in order by it; by default that of the config.
    """
    search = setup.config.search
    items_by = setup.config.seed if worker_seed is None else worker_seed
    return Population(
        setup.space,
        setup.objective,
        {baseline.name: baseline.options for baseline in search.baselines},
        setup.make_optimizer,
        budget=search.budget,
        window=in_flight,
        seed=setup.config.seed,
        step=search.optimizer.step,
        baselines_only=search.baselines_only,
        fitness=make_fitness(search.fitness, setup.evaluators, items_by, in_flight, front=setup.objective.pareto),
    )


def _carry_on(
    setup: Setup,
    folder: RunFolder,
    make_pool: MakePool,
    watcher: Watcher,
    changes: Mapping[str, Any] | None = None,
    places: Sequence[Path] = (),
    arms: Sequence[ArmName] = (),
) -> Finished:
    search, cluster = setup.config.search, setup.config.cluster
    in_flight = int(read_manifest(folder)["window"])
    seen = Observer(folder, setup, watcher)
    with (
        _full_disk_explained(folder),
        folder.lock(),
        mirrored(folder.path, folder.remote, seen.line),
        History.open(folder.history) as history,
        seen,
        stop_requests(seen.line) as stop,
    ):
        if history.recovered:
            seen.line(history.recovered)
        sessions = Sessions(folder.sessions)
        events = history.events()
        budget, extension = extend(setup, events, sessions, changes or {}, seen.line)
        if extension is not None:
            history.append(extension)
            events.append(extension)

        setup = with_arms(setup, folder.arms, arms)

        def start_pool() -> Pool:
            folder.workers.mkdir(exist_ok=True)
            return seen.pool(make_pool(setup, worker_plan(setup), folder.workers))

        workers = _Workers(start_pool)

        def progress(state: Progress) -> None:
            sessions.tick()
            seen.progress(state)

        ended = _ended(events)
        items = items_per_candidate(setup)
        if ended is None:
            sessions.begin(
                first_event=len(events),
                pool=cluster.pool,
                workers=cluster.workers,
                gpus_per_worker=cluster.gpus_per_worker,
                device=setup.device,
                versions=versions(),
                places=tuple(str(place.expanduser().resolve()) for place in places),
            )
        used = Used.of(events, sessions, items)
        population = make_population(setup, in_flight)
        driver = Driver(
            population,
            history,
            Spool(folder.spool),
            workers.get,
            Limits(budget.candidates, in_flight, ordered=search.order == "ordered"),
            progress,
            stop=stop,
            failed=seen.failed,
            spending=Spending(budget, items, cluster.gpus_per_worker, used.gpu_hours, lambda: sessions.search_seconds),
            recorded=seen.recorded,
            prefix=_prefixes(setup),
        )
        seen.know(driver.trials.values(), {candidate.id: candidate.origin for candidate in population.candidates})
        try:
            if ended is None:
                with sessions.searching():
                    driver.search()
                seen.line(why_ended(len(driver.population.candidates), driver.limit, budget))
            if ended is None or (
                ended.candidates_searched and {*setup.config.certify.arms} - {arm.name for arm in ended.arms}
            ):
                drive = partial(_drive_arm, in_flight, items, setup.config.seed, progress, stop, seen.failed)
                beside = Arms(setup, folder.arms, drive, workers.get, seen.line, driver)
                used = Used.of(history.events(), sessions, items)
                compare = partial(beside.run, used.item_evaluations)
                ended = finish(
                    driver, setup.evaluators, search.finalists, setup.config.seed, earlier_verdicts(events), compare
                )
            workers.close()  # what is left to do needs none, and other runs on the cluster may
            again = sum(isinstance(event, End) for event in history.events()) > 1
            model = _hand_over(setup, folder, driver, ended, budget, seen.line, again)
        except DeviceLostError as error:  # of this process: the in-process pool has no other worker
            raise RunError(f"{error}") from error
        except KeyboardInterrupt:
            done = sum(1 for _, items in driver.trials if items == "search")
            raise InterruptedRun(
                f"stopped: {done} of {driver.total} candidates are saved in {folder.path}; "
                f"go on with: meiosis resume {folder.address}"
            ) from None
        finally:
            workers.close()
    return Finished(folder, ended, model)


def _drive_arm(
    in_flight: int,
    items: int,
    worker_seed: int,
    progress: Callable[[Progress], None],
    stop: Callable[[], bool],
    failed: Callable[[Outcome], None],
    setup: Setup,
    history: History,
    spool: Path,
    budget: Budget,
    pool: Callable[[], Pool],
    name: ArmName,
) -> Driver:
    """The driver of a search beside the main one, which differs in nothing but setup, budget and where it writes."""

    def show(state: Progress) -> None:
        if state.phase == "search" and budget.item_evaluations is not None:
            state = replace(state, total=max(state.done, -(-budget.item_evaluations // items)))
        progress(replace(state, arm=name))

    return Driver(
        make_population(setup, in_flight, worker_seed),
        history,
        Spool(spool),
        pool,
        Limits(budget.candidates, in_flight, ordered=setup.config.search.order == "ordered"),
        show,
        stop=stop,
        failed=failed,
        spending=Spending(budget, items, setup.config.cluster.gpus_per_worker),
        prefix=_prefixes(setup),
    )


def _prefixes(setup: Setup) -> Callable[[Recipe], tuple[int, ...]]:
    """See `Job.prefix`."""
    return Prefixes(tensor for group in setup.space.groups for tensor in group.tensors).of


class _Workers:
    """The workers of a run, started when the first candidate must be evaluated, whoever asks for that."""

    def __init__(self, start: Callable[[], Pool]) -> None:
        self._start = start
        self._pool: Pool | None = None

    def get(self) -> Pool:
        """The workers."""
        if self._pool is None:
            self._pool = self._start()
        return self._pool

    def close(self) -> None:
        """Release them. May be called twice."""
        if self._pool is not None:
            self._pool.close()


def _hand_over(
    setup: Setup,
    folder: RunFolder,
    driver: Driver,
    verdict: Verdict,
    budget: Budget,
    report: Callable[[str], None],
    again: bool,
) -> Path:
    """Export the winner, unless that was done, and write the report; returns the folder of the model.

    Args:
        again: whether there was a verdict before, by which the model may have been exported.
    """
    from search.export import export_candidate  # needs torch, whose import would delay the first candidate

    model = folder.best
    if not model.exists() or (again and not _is_exported(model, verdict)):
        report("exporting the winner")
        winner = driver.population.candidates[verdict.winner]
        export_candidate(setup, winner, driver.trials, model, verdict=verdict, overwrite=again)
    asked = len(driver.population.candidates)
    why = why_ended(asked, driver.limit, budget)
    front: list[str] = []
    if setup.objective.pareto:
        from search.pareto.report import PICTURE, front_section, write_picture

        front = front_section(driver, verdict.winner)
        if write_picture(driver, verdict.winner, folder.path / PICTURE):
            front += [f"The picture of it is `{PICTURE}`.", ""]
    write_report(folder, setup, verdict, asked, why, driver.trials.values(), front)
    return model


@contextmanager
def _full_disk_explained(folder: RunFolder) -> Iterator[None]:
    """Say of a full disk, wherever it was met, what is saved and how to go on."""
    try:
        yield
    except (OSError, MeiosisError) as error:
        if not disk_is_full(error):
            raise
        try:
            done = sum(isinstance(event, Trial) and event.items == "search" for event in folder.events())
            saved = f"{done} candidates are saved"
        except MeiosisError:
            saved = "what was recorded is saved"
        raise RunError(
            f"the disk of {folder.path} is full: {saved}; make room and go on with: meiosis resume {folder.address}"
        ) from error


def _is_exported(model: Path, verdict: Verdict) -> bool:
    """Whether the exported model is that of the verdict, and not of an earlier one of an extended run."""
    try:
        card = (model / "README.md").read_text(encoding="utf-8")
        return written_sha256(model) == verdict.weights_sha256 and markdown_table(verdict) in card
    except (OSError, ValueError, KeyError):
        return False


def _ended(events: Iterable[Event]) -> Verdict | None:
    end = end_in_force(events)
    return None if end is None else Verdict.from_json(end.verdict)


def export_trial(
    folder: RunFolder,
    out: Path,
    trial: int | None,
    watcher: Watcher,
    *,
    overwrite: bool = False,
    places: Sequence[Path] = (),
    pick: str | None = None,
) -> Candidate:
    """Write one candidate of a run, finished or not; returns the candidate.

    Args:
        folder: the run; a driver may be at work on it.
        out: folder to write.
        trial: id of the candidate; None for the winner, or the best so far on the search items.
        places: see `resume`.
        pick: what to choose from the front instead, see `search.pareto.pick`; which trial that is goes to `watcher`.

    Raises:
        UserError: no such candidate, none that is as picked, nothing to export yet, or `out` is taken.
    """
    from search.export import export_candidate

    setup = load_setup(folder, watcher, places=places)
    events = folder.events()
    ended = _ended(events)
    in_flight = int(read_manifest(folder)["window"])
    population = make_population(setup, in_flight)
    if setup.config.search.order == "ordered":
        replay_ordered(events, population, in_flight)
        trials = {(event.candidate, event.items): event for event in events if isinstance(event, Trial)}
    else:
        trials = replay(events, population)
    if pick is not None:
        picked = pick_trial(pick, trials.values(), population.objective, setup.metrics, population.candidates)
        watcher.line(picked.sentence)
        trial = picked.candidate
    if trial is None:
        trial = ended.winner if ended is not None else _best_so_far(trials, population, folder)
    if not 0 <= trial < len(population.candidates):
        raise UserError(
            f"run {folder.name} has no trial {trial}; it has 0 to {len(population.candidates) - 1}"
            if population.candidates
            else f"run {folder.name} has no trials yet"
        )
    candidate = population.candidates[trial]
    verdict = ended if ended is not None and ended.winner == trial else None
    export_candidate(setup, candidate, trials, out, verdict=verdict, overwrite=overwrite)
    return candidate


def _best_so_far(trials: Mapping[Key, Trial], population: Population, folder: RunFolder) -> int:
    usable = [t for t in trials.values() if t.items == "search" and may_be_best(t)]
    if not usable:
        raise UserError(f"run {folder.name} has no feasible trial on the search items yet; name one with --trial")
    searched = {t.candidate: t.loss or 0.0 for t in usable if population.candidate(t.candidate).genome is not None}
    if searched and population.coverage.rotates:
        return population.ranked(searched)[0]
    return min(usable, key=lambda t: (population.coverage.cautious(t.candidate, t.loss or 0.0), t.candidate)).candidate
