"""TensorBoard: event files, for `tensorboard --logdir`."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from search.tracker import OutputFolder, TrackedRun, TrackedTrial, Tracker, TrackerOptions


class Options(TrackerOptions):
    """Options of tensorboard."""

    folder: OutputFolder | None = Field(
        None, description="where event files go, a folder per run in it; by default tracking/tensorboard of the run"
    )


class TensorBoard(Tracker):
    """Scalars `search/loss`, `search/best_loss`, `select/<evaluator>.<metric>` ...; the step is the candidate."""

    help = "event files for TensorBoard"
    needs = "tensorboard"
    install = "pip install tensorboard"
    Options = Options
    _writer: Any

    def begin(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = self.options.folder / run.name if self.options.folder else run.folder
        self._writer = SummaryWriter(str(folder), flush_secs=10)

    def trial(self, trial: TrackedTrial) -> None:
        for name, value in trial.figures.items():
            self._writer.add_scalar(f"{trial.items}/{name}", value, trial.candidate, trial.recorded_at)
        failed = float(trial.failure is not None)
        self._writer.add_scalar(f"{trial.items}/failed", failed, trial.candidate, trial.recorded_at)

    def close(self, how: str) -> None:
        self._writer.close()


PLUGIN = TensorBoard
