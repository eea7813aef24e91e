"""Bodies of workers for the tests of both pools: real code in real processes.

What a job does is written in its recipe: the operator of the first rule names a method here, and the
rule's parameters are the arguments. Every start of a job is noted in `prepared_folder`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from evaluators.errors import UserError
from search.outcome_check import MESSAGE_BYTES
from search.pool import Failure, Job, Outcome, WorkerPlan
from search.recipe import ModelRef, Recipe, Rule


def plan(folder: Path, threads: int = 1) -> WorkerPlan:
    """A plan whose workers take notes in `folder`."""
    return WorkerPlan({}, base="base", evaluators=(), threads=threads, prepared_folder=str(folder))


def job(candidate: int, what: str = "square", **arguments: int | float | str) -> Job:
    """A job that calls the method `what` of `Scripted`."""
    rule = Rule(operator=what, sources={"a": {}}, parameters=dict(arguments))
    return Job(candidate, Recipe(models={"a": ModelRef(path="a")}, rules=(rule,)), "search")


def starts(folder: Path) -> list[int]:
    """Candidates in the order in which workers started them."""
    log = folder / "starts"
    return [int(line) for line in log.read_text().split()] if log.exists() else []


class Scripted:
    """Does what the recipe says and returns the square of the candidate's number."""

    def __init__(self, plan: WorkerPlan) -> None:
        assert plan.prepared_folder is not None
        self.folder = Path(plan.prepared_folder)

    def run(self, job: Job) -> Outcome:
        with (self.folder / "starts").open("a") as log:
            log.write(f"{job.candidate}\n")
        written = self.folder / f"writing-{job.candidate}"
        written.write_text(str(os.getpid()))
        written.rename(self.folder / f"pid-{job.candidate}")  # whoever sees it reads it whole
        rule = job.recipe.rules[0]
        outcome = Outcome(job.candidate, job.items, metrics={"test.square": float(job.candidate**2)})
        changed: Any = getattr(self, rule.operator)(outcome, **rule.parameters)
        return changed if changed is not None else outcome

    def square(self, outcome: Outcome) -> None:
        pass

    def sleep(self, outcome: Outcome, seconds: float) -> None:
        time.sleep(seconds)

    def exit(self, outcome: Outcome) -> None:
        os._exit(1)

    def exit_once(self, outcome: Outcome) -> None:
        mark = self.folder / f"exited-{outcome.candidate}"
        if not mark.exists():
            mark.touch()
            os._exit(1)

    def hang_once(self, outcome: Outcome) -> None:
        mark = self.folder / f"hung-{outcome.candidate}"
        if not mark.exists():
            mark.touch()
            time.sleep(600)

    def throw(self, outcome: Outcome, message: str) -> None:
        raise KeyError(message)

    def leave(self, outcome: Outcome) -> None:
        sys.exit(3)

    def large(self, outcome: Outcome, seconds: float) -> Outcome:
        """More than Ray sends with its answer: the outcome stays on the worker's node until it is fetched."""
        time.sleep(seconds)
        return replace(outcome, metrics={f"test.{i}": float(i) for i in range(20_000)})

    def other_candidate(self, outcome: Outcome) -> Outcome:
        return replace(outcome, candidate=outcome.candidate + 1000)

    def other_type(self, outcome: Outcome) -> object:
        return {"square": 4}

    def text_as_metric(self, outcome: Outcome) -> Outcome:
        return replace(outcome, metrics={"test.square": "four"})  # type: ignore[dict-item]

    def unpicklable(self, outcome: Outcome) -> Outcome:
        return replace(outcome, worker=lambda: None)  # type: ignore[arg-type]

    def environment(self, outcome: Outcome, variable: str) -> Outcome:
        return replace(outcome, metrics={variable: float(os.environ[variable])})

    def not_a_number(self, outcome: Outcome) -> Outcome:
        return replace(outcome, metrics={"test.square": float("nan"), "test.one": 1.0})

    def too_large(self, outcome: Outcome) -> Outcome:
        return replace(outcome, failure=Failure("error", "much", "x" * (MESSAGE_BYTES + 1)), metrics={})

    def sick(self, outcome: Outcome, seconds: float) -> None:
        """Every job fails in the process that runs the first of them, and in no other."""
        time.sleep(seconds)
        with contextlib.suppress(FileExistsError), (self.folder / "sick").open("x") as mark:
            mark.write(str(os.getpid()))
        if (self.folder / "sick").read_text() == str(os.getpid()):
            raise RuntimeError("this process is sick")

    def gpus(self, outcome: Outcome) -> Outcome:
        """Which GPUs Ray gave to the worker, and how many, with the node as text in `node-<candidate>`."""
        self.where(outcome)
        numbers = [int(number) for number in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if number]
        return replace(outcome, metrics={"gpus": float(len(numbers)), "first": float(numbers[0])})

    def where(self, outcome: Outcome, seconds: float = 0.0) -> None:
        import ray

        (self.folder / f"node-{outcome.candidate}").write_text(ray.get_runtime_context().get_node_id())
        time.sleep(seconds)

    def where_it_is_safe(self, outcome: Outcome, seconds: float) -> None:
        """Kills the process on the node whose id is in `bad`."""
        self.where(outcome, seconds)
        if (self.folder / f"node-{outcome.candidate}").read_text() == (self.folder / "bad").read_text():
            os._exit(1)

    def interrupt_once(self, outcome: Outcome) -> None:
        mark = self.folder / "interrupted"
        if not mark.exists():
            mark.touch()
            raise KeyboardInterrupt


class OwnError(UserError):
    """A mistake with an exit status of its own."""

    exit_status = 7


class Refuses:
    def __init__(self, plan: WorkerPlan) -> None:
        raise OwnError("evaluators.code: there is no file 'items.jsonl'")


class RefusesLater(Scripted):
    """Cannot be made while there is a file `refuse`, from which it takes a line each time."""

    def __init__(self, plan: WorkerPlan) -> None:
        super().__init__(plan)
        mark = self.folder / "refuse"
        if mark.exists() and (lines := mark.read_text().splitlines()):
            mark.write_text("\n".join(lines[1:]))
            raise OwnError(f"evaluators.code: {lines[0]}")


class Waits(Scripted):
    """A body that takes until there is a file `go`."""

    def __init__(self, plan: WorkerPlan) -> None:
        super().__init__(plan)
        (self.folder / f"building-{os.getpid()}").touch()
        while not (self.folder / "go").exists():
            time.sleep(0.05)


class Broken:
    def __init__(self, plan: WorkerPlan) -> None:
        raise RuntimeError("the model does not load\nsecond line")


class Dies:
    def __init__(self, plan: WorkerPlan) -> None:
        os._exit(1)


class LaidOut(Scripted):
    """Says that its model is laid over two GPUs."""

    layout: ClassVar[dict[str, Any]] = {
        "device_map": {"model.embed_tokens": "cuda:0", "lm_head": "cuda:1"},
        "bytes": {"cuda:0": 7, "cuda:1": 8},
    }
