"""What workers did with their time, from the trials of a history."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from search.store.events import Trial


@dataclass(frozen=True)
class WorkerUse:
    """One worker, or all of them together.

    Attributes:
        worker, node: its name, and the host name of its machine; empty where that was not recorded.
        trials, failures: those that it returned, and how many of them failed.
        merge_seconds, evaluate_seconds: spent on trials.
        span_seconds: from the start of its first trial to the end of its last, by the driver's clock; 0 in
            histories of older versions. Of all workers: the sum.
        bytes_read: bytes of the models that its merges read.
        bytes_moved: bytes of messages between it and the driver.
        layers_run, layers_reused: layers that ran, and those whose result was known from an earlier candidate.
        last_end: Unix time in seconds at which its last trial ended.
        busy: share of its time, 0 to 1, in which it merged or evaluated; None where that was not recorded.
    """

    worker: str
    node: str = ""
    trials: int = 0
    failures: int = 0
    merge_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    span_seconds: float = 0.0
    bytes_read: int = 0
    bytes_moved: int = 0
    layers_run: int = 0
    layers_reused: int = 0
    last_end: float = 0.0
    busy: float | None = None

    @property
    def reused(self) -> float | None:
        """Share of the layers, 0 to 1, that did not have to run; None where none were counted."""
        layers = self.layers_run + self.layers_reused
        return self.layers_reused / layers if layers else None

    def with_busy(self) -> WorkerUse:
        """The same with `busy` from the rest."""
        if self.span_seconds <= 0:
            return self
        return replace(self, busy=min(1.0, (self.merge_seconds + self.evaluate_seconds) / self.span_seconds))


def worker_uses(trials: Iterable[Trial], since: float = 0.0) -> list[WorkerUse]:
    """A `WorkerUse` for every worker, in the order of names; results that were copied belong to none.

    Args:
        since: trials that began before this Unix time are left out.
    """
    by_worker: dict[tuple[str, str], list[Trial]] = defaultdict(list)
    for trial in trials:
        if trial.worker and trial.started_at >= since:
            by_worker[trial.node, trial.worker].append(trial)
    return [_use(worker, node, found) for (node, worker), found in sorted(by_worker.items(), key=_natural)]


def together(uses: Iterable[WorkerUse]) -> WorkerUse:
    """All workers as one."""
    found = list(uses)
    return WorkerUse(
        f"{len(found)} workers",
        node=f"{len({use.node for use in found})} nodes",
        trials=sum(use.trials for use in found),
        failures=sum(use.failures for use in found),
        merge_seconds=sum(use.merge_seconds for use in found),
        evaluate_seconds=sum(use.evaluate_seconds for use in found),
        span_seconds=sum(use.span_seconds for use in found),
        bytes_read=sum(use.bytes_read for use in found),
        bytes_moved=sum(use.bytes_moved for use in found),
        layers_run=sum(use.layers_run for use in found),
        layers_reused=sum(use.layers_reused for use in found),
        last_end=max((use.last_end for use in found), default=0.0),
    ).with_busy()


def _use(worker: str, node: str, trials: list[Trial]) -> WorkerUse:
    ends = [trial.started_at + trial.merge_seconds + trial.evaluate_seconds for trial in trials]
    starts = [trial.started_at for trial in trials]
    return WorkerUse(
        worker,
        node,
        trials=len(trials),
        failures=sum(trial.failure_kind is not None for trial in trials),
        merge_seconds=sum(trial.merge_seconds for trial in trials),
        evaluate_seconds=sum(trial.evaluate_seconds for trial in trials),
        span_seconds=max(ends) - min(starts) if min(starts) > 0 else 0.0,
        bytes_read=sum(trial.bytes_read for trial in trials),
        bytes_moved=sum(trial.bytes_moved for trial in trials),
        layers_run=sum(trial.layers_run for trial in trials),
        layers_reused=sum(trial.layers_reused for trial in trials),
        last_end=max(ends) if min(starts) > 0 else 0.0,
    ).with_busy()


def _natural(item: tuple[tuple[str, str], list[Trial]]) -> tuple[str, int, str]:
    """worker-10 comes after worker-9."""
    node, worker = item[0]
    digits = "".join(letter for letter in worker.partition("/")[0] if letter.isdigit())
    return node, int(digits or 0), worker
