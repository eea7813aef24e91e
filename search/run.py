"""One search from config to exported model, in a run folder that is enough to go on from.

`start` and `resume` differ only in where the setup comes from: the loop replays whatever the history
holds, so a new run is a resumed one with an empty history.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from search.config import parse_config
from search.driver import Driver, Limits, replay
from search.errors import DeviceLostError, InterruptedRun, RunError, UserError
from search.export import export_candidate
from search.finals import Verdict, finish
from search.in_flight import Key
from search.manifest import changed_versions, make_manifest, read_manifest
from search.pool import Outcome, Pool, WorkerPlan
from search.population import Candidate, Population
from search.progress import Progress
from search.report import write_report
from search.setup import Setup, check
from search.stopping import stop_requests
from search.store.events import End, Event, Trial
from search.store.history import History
from search.store.run_folder import RunFolder
from search.store.spool import Spool
from search.yaml_source import YamlSource

MakePool = Callable[[Setup, WorkerPlan, Path], Pool]
"""Makes the workers of a run: setup, plan for the workers, and a folder that the run owns."""


@dataclass(frozen=True)
class Watcher:
    """Who is told what happens: `line` gets sentences, `progress` the state after every change."""

    line: Callable[[str], None] = lambda _: None
    progress: Callable[[Progress], None] = lambda _: None


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
    folder = RunFolder.create(Path(setup.config.results), name, make_manifest(setup))
    return _carry_on(setup, folder, make_pool, watcher)


def resume(
    folder: RunFolder, make_pool: MakePool, watcher: Watcher, changes: Mapping[str, Any] | None = None
) -> Finished:
    """Go on with a run exactly where it stopped, or show what a finished one found.

    Args:
        folder: the run.
        changes: `workers` and `address` may differ from those at the start; the trajectory does not
            depend on them.

    Raises:
        RunError: sources or evaluator data are not those of the start, or another driver is at work.
    """
    return _carry_on(load_setup(folder, watcher, changes), folder, make_pool, watcher)


def load_setup(folder: RunFolder, watcher: Watcher, changes: Mapping[str, Any] | None = None) -> Setup:
    """The setup of a run from its folder, with sources and data verified by hash."""
    manifest = read_manifest(folder)
    for line in changed_versions(manifest):
        watcher.line(line)
    config = dict(manifest["config"])
    config["cluster"] = {**config["cluster"], **(changes or {})}
    import yaml

    source = YamlSource(yaml.safe_dump(config, sort_keys=False), str(folder.path / "run.yaml"))
    setup = check(parse_config(source, folder.path), report=watcher.line)
    for name, ref in setup.models.items():
        recorded = manifest["models"][name]["sha256"]
        if ref.sha256 != recorded:
            raise RunError(
                f"model '{name}' at {ref.path} is not the one the run started with (sha256 {str(ref.sha256)[:12]}, "
                f"was {recorded[:12]}); put the old files back, or start a new run"
            )
    for name, digest in setup.data_sha256.items():
        if digest != manifest["data_sha256"][name]:
            raise RunError(
                f"the data of evaluator '{name}' changed since the run started; put it back, or start a new run"
            )
    return setup


def make_population(setup: Setup, in_flight: int) -> Population:
    """The population of a run, fresh."""
    search = setup.config.search
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
    )


def _carry_on(setup: Setup, folder: RunFolder, make_pool: MakePool, watcher: Watcher) -> Finished:
    search = setup.config.search
    in_flight = int(read_manifest(folder)["window"])
    with folder.lock(), History.open(folder.history) as history, stop_requests(watcher.line) as stop:
        if history.recovered:
            watcher.line(history.recovered)

        def pool() -> Pool:
            working = folder.path / "workers"
            working.mkdir(exist_ok=True)
            return make_pool(setup, setup.worker_plan(), working)

        limits = Limits(None if search.baselines_only else search.budget, in_flight, ordered=search.order == "ordered")
        population = make_population(setup, in_flight)

        def failed(outcome: Outcome) -> None:
            assert outcome.failure is not None
            with folder.log.open("a", encoding="utf-8") as log:
                log.write(f"candidate {outcome.candidate} on {outcome.items} items: {outcome.failure.message}\n")
                log.write(outcome.failure.detail + "\n")

        driver = Driver(
            population, history, Spool(folder.spool), pool, limits, watcher.progress, stop=stop, failed=failed
        )
        try:
            ended = _ended(history.events())
            if ended is None:
                driver.search()
                ended = finish(driver, setup.evaluators, search.finalists, setup.config.seed)
            model = folder.best
            if not model.exists():
                watcher.line("exporting the winner")
                export_candidate(setup, driver.population.candidates[ended.winner], driver.trials, model, verdict=ended)
            write_report(folder, setup, ended, len(driver.population.candidates))
        except DeviceLostError as error:  # of this process: the in-process pool has no other worker
            raise RunError(f"{error}") from error
        except KeyboardInterrupt:
            done = sum(1 for _, items in driver.trials if items == "search")
            raise InterruptedRun(
                f"stopped: {done} of {driver.total} candidates are saved in {folder.path}; "
                f"go on with: meiosis resume {folder.path}"
            ) from None
        finally:
            driver.close()
    return Finished(folder, ended, model)


def _ended(events: Iterable[Event]) -> Verdict | None:
    return next((Verdict.from_json(event.verdict) for event in events if isinstance(event, End)), None)


def export_trial(
    folder: RunFolder, out: Path, trial: int | None, watcher: Watcher, *, overwrite: bool = False
) -> Candidate:
    """Write one candidate of a run, finished or not; returns the candidate.

    Args:
        folder: the run; a driver may be at work on it.
        out: folder to write.
        trial: id of the candidate; None for the winner, or the best so far on the search items.

    Raises:
        UserError: no such candidate, nothing to export yet, or `out` is taken.
    """
    setup = load_setup(folder, watcher)
    events = folder.events()
    ended = _ended(events)
    population = make_population(setup, int(read_manifest(folder)["window"]))
    trials = replay(events, population)
    if trial is None:
        trial = ended.winner if ended is not None else _best_so_far(trials, folder)
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


def _best_so_far(trials: Mapping[Key, Trial], folder: RunFolder) -> int:
    usable = [t for t in trials.values() if t.items == "search" and t.feasible and t.loss is not None]
    if not usable:
        raise UserError(f"run {folder.name} has no feasible trial yet; name one with --trial")
    return min(usable, key=lambda t: (t.loss, t.candidate)).candidate
