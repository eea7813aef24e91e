"""Weights & Biases: one run of a project, gone on with after a resume."""

from __future__ import annotations

from typing import Any, Literal
from uuid import uuid4

from pydantic import Field

from search.tracker import TrackedRun, TrackedTrial, Tracker, TrackerOptions


class Options(TrackerOptions):
    """Options of wandb."""

    project: str = Field("meiosis", min_length=1, description="project of the run")
    entity: str | None = Field(None, description="user or team; by default that of the login")
    mode: Literal["online", "offline"] | None = Field(None, description="by default what WANDB_MODE says")


class WandbTracker(Tracker):
    """A row per result: `candidate`, `search/loss`, `search/best_loss`, `select/<evaluator>.<metric>` ..."""

    help = "a run in a project of Weights & Biases"
    needs = "wandb"
    install = "pip install wandb"
    Options = Options
    _run: Any

    def begin(self, run: TrackedRun) -> None:
        import wandb

        self._run = wandb.init(
            project=self.options.project,
            entity=self.options.entity,
            mode=self.options.mode,
            id=run.remembered(lambda: uuid4().hex[:12]),
            resume="allow",
            name=run.name,
            dir=str(run.folder),
            config={"meiosis": dict(run.config)},
            settings=wandb.Settings(console="off", silent=True),
        )

    def trial(self, trial: TrackedTrial) -> None:
        row = {f"{trial.items}/{name}": value for name, value in trial.figures.items()}
        failed = int(trial.failure is not None)
        self._run.log({"candidate": trial.candidate, f"{trial.items}/failed": failed, **row})

    def close(self, how: str) -> None:
        self._run.finish(exit_code=0 if how == "finished" else 1)


PLUGIN = WandbTracker
