"""MLflow: one run of an experiment, gone on with after a resume."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from search.tracker import TrackedRun, TrackedTrial, Tracker, TrackerOptions

_STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}


class Options(TrackerOptions):
    """Options of mlflow."""

    experiment: str = Field("meiosis", min_length=1, description="experiment; made when it is not there")
    uri: str | None = Field(None, description="tracking server or folder; by default what MLFLOW_TRACKING_URI says")


class MlflowTracker(Tracker):
    """Metrics `search/loss`, `search/best_loss`, `select/<evaluator>.<metric>` ...; the step is the candidate."""

    help = "a run in an experiment of MLflow"
    needs = "mlflow"
    install = "pip install mlflow-skinny"
    Options = Options
    _client: Any
    _run_id: str

    def begin(self, run: TrackedRun) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=self.options.uri)

        def new_run() -> str:
            name = self.options.experiment
            experiment = self._client.get_experiment_by_name(name)
            number = experiment.experiment_id if experiment else self._client.create_experiment(name)
            made = self._client.create_run(number, run_name=run.name).info.run_id
            for key in ("name", "seed"):
                self._client.log_param(made, key, run.config.get(key))
            return str(made)

        self._run_id = run.remembered(new_run)
        self._client.update_run(self._run_id, status="RUNNING")

    def trial(self, trial: TrackedTrial) -> None:
        from mlflow.entities import Metric

        milliseconds = round(trial.recorded_at * 1000)
        figures = {**trial.figures, "failed": float(trial.failure is not None)}
        metrics = [
            Metric(f"{trial.items}/{name}", value, milliseconds, trial.candidate) for name, value in figures.items()
        ]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self, how: str) -> None:
        self._client.set_terminated(self._run_id, status=_STATUS[how])


PLUGIN = MlflowTracker
