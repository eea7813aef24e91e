"""Figures of a run for Prometheus, through Ray's metrics.

Ray serves them, with its own, at `MetricsExportPort` of every node (see `ray.nodes()`), under the names below
with `ray_` in front. It does so only where it is installed as `ray[default]`; without, recording costs a few
microseconds and leads nowhere. All carry the tags `run` and `results`, the folder of the run's results: runs in other
folders may have the same name.

| metric | kind | meaning |
|---|---|---|
| meiosis_trials_total | counter | trials that came back, by `items` and by `outcome`: `ok` or the kind of failure |
| meiosis_merge_seconds, meiosis_evaluate_seconds | histogram | time of a worker per trial |
| meiosis_read_bytes_total | counter | bytes of the models that merges read |
| meiosis_workers, meiosis_busy_workers | gauge | workers of the pool, and those at work |
| meiosis_best_loss | gauge | loss of the best feasible trial on the search items |
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from search.pool import Outcome
from search.progress import Progress

SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0]
"""Upper bounds of the histograms' buckets."""


class PoolMetrics:
    """The metrics of one pool. Ray must be connected.

    Args:
        run, results: what the metrics say about whose they are.
    """

    def __init__(self, run: str, results: str = "") -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        of_run = {"run": run, "results": results}
        tags = tuple(of_run)
        self._trials = Counter("meiosis_trials", "trials that came back", (*tags, "items", "outcome"))
        self._read = Counter("meiosis_read_bytes", "bytes of the models that merges read", tags)
        self._merge = Histogram("meiosis_merge_seconds", "time to merge a candidate", SECONDS, tags)
        self._evaluate = Histogram("meiosis_evaluate_seconds", "time to evaluate a candidate", SECONDS, tags)
        self._workers = Gauge("meiosis_workers", "workers of the pool", tags)
        self._busy = Gauge("meiosis_busy_workers", "workers at work", tags)
        self._best = Gauge("meiosis_best_loss", "loss of the best feasible trial", tags)
        for metric in (
            self._trials,
            self._read,
            self._merge,
            self._evaluate,
            self._workers,
            self._busy,
            self._best,
        ):
            metric.set_default_tags(of_run)
        self._shown: tuple[int, int, float | None] = (-1, -1, None)

    def count(self, outcomes: Iterable[Outcome]) -> None:
        """Trials that came back."""
        for outcome in outcomes:
            kind = outcome.failure.kind if outcome.failure else "ok"
            self._trials.inc(1, {"items": outcome.items, "outcome": kind})
            self._merge.observe(outcome.merge_seconds)
            self._evaluate.observe(outcome.evaluate_seconds)
            if outcome.bytes_read > 0:
                self._read.inc(outcome.bytes_read)

    def show(self, progress: Progress) -> None:
        """The state of the run; what did not change is not sent again."""
        best = progress.best.loss if progress.best is not None else None
        now = (progress.workers, progress.busy, best)
        if now == self._shown:
            return
        self._shown = now
        self._workers.set(progress.workers)
        self._busy.set(progress.busy)
        if best is not None and math.isfinite(best):
            self._best.set(best)
