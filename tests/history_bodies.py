"""Events for the tests of the history, and a program that writes them and dies in many ways.

The program forks its writers after it has imported everything, so that one death costs milliseconds.
It prints one line of JSON per writer and, in `kill`, waits for a line before the next.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from evaluators.base import Scores
from search.errors import HistoryError
from search.store.events import Ask, Event, Trial
from search.store.history import History

SEGMENT = 5
INLINE = 12
"""Small, so that sealing and side files happen all the time."""


def event(number: int) -> Event:
    """Event `number` of a run that never ends: ask, trial, ask, trial, of all shapes there are."""
    candidate, is_trial = divmod(number, 2)
    chance = np.random.default_rng([7, number])
    if not is_trial:
        genome = None if candidate % 5 == 0 else tuple(chance.random(candidate % 4))
        return Ask(candidate, "baseline:soup" if genome is None else "optimizer", genome, f"{candidate:064x}")
    if candidate % 6 == 5:
        return Trial(candidate, "search", feasible=False, failure_kind="error", failure_message="boom")
    n = 3 + 2 * (candidate % 4)
    items = tuple(f"doc/{i}" for i in range(n))
    values = chance.normal(size=n)
    values[0] = (np.nan, np.inf, -0.0)[candidate % 3]
    return Trial(
        candidate,
        "search",
        metrics={"text.nll": float(values[0]), "text.bits": 0.1},
        loss=float(chance.random()),
        scores={"text": Scores(items, {"nll": values}, np.ones(n))},
        recorded_at=float(number),
        worker="w0",
    )


def events(count: int, start: int = 0) -> list[Event]:
    """Events `start` to `count` - 1."""
    return [event(number) for number in range(start, count)]


def open_small(folder: Path, *, writable: bool = True) -> History:
    """A history that seals every few events and keeps few scores in its records."""
    return History.open(folder, writable=writable, events_per_segment=SEGMENT, inline_values=INLINE)


def _write(folder: Path, stop: int, acknowledge: int) -> None:
    """Append from where the history is; every number is acknowledged when `append` has returned."""
    with open_small(folder) as history:
        for number in range(len(history), stop):
            history.append(event(number))
            os.write(acknowledge, number.to_bytes(8, "little"))


def _fork(body: Callable[[int], None]) -> tuple[int, int]:
    """A child that runs `body` with the writing end of a pipe; its id and the reading end."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            body(writing)
        finally:
            os._exit(0)
    os.close(writing)
    return child, reading


def _reap(child: int, reading: int) -> dict[str, object]:
    acknowledged = -1
    while data := os.read(reading, 8):
        acknowledged = int.from_bytes(data, "little")
    os.close(reading)
    _, status = os.waitpid(child, 0)
    return {"acknowledged": acknowledged, "killed": os.WIFSIGNALED(status)}


def kill(folder: Path, rounds: int, seed: int) -> None:
    """Writers that are killed at random moments, one after the other, on one history."""
    chance = random.Random(seed)
    for _ in range(rounds):
        child, reading = _fork(lambda pipe: _write(folder, 1_000_000, pipe))
        if chance.random() < 0.7:  # the others die while they open the history
            select.select([reading], [], [], 10)
        time.sleep(chance.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        print(json.dumps(_reap(child, reading)), flush=True)
        sys.stdin.readline()


def crash(folder: Path, count: int) -> None:
    """Writers of `count` events that kill themselves at their 1st, 2nd ... change of a file name."""
    point = 0
    while True:
        target = folder / f"{point:04d}"

        def body(pipe: int, target: Path = target, fuse: int = point) -> None:
            left = fuse

            def die(name: str, arguments: tuple[object, ...]) -> None:
                nonlocal left
                changes = {"open", "os.rename", "os.remove", "os.mkdir", "os.truncate"}
                if name in changes and str(target) in str(arguments[0]):
                    left -= 1
                    if left < 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(die)
            _write(target, count, pipe)

        child, reading = _fork(body)
        result = _reap(child, reading)
        print(json.dumps(result), flush=True)
        if not result["killed"]:
            return
        point += 1


def fill(folder: Path, count: int) -> None:
    """A writer on a file system that fills up: prints the error, then what a second writer finds."""
    ballast = folder / "ballast"
    shutil.rmtree(folder / "history", ignore_errors=True)
    ballast.write_bytes(bytes(250_000))
    message = ""
    with open_small(folder / "history") as history:
        for number in range(count):
            try:
                history.append(event(number))
            except HistoryError as error:
                message = str(error)
                break
        written = number
    ballast.unlink()
    with open_small(folder / "history") as history:
        found, recovered = len(history), history.recovered
        for number in range(found, count):
            history.append(event(number))
        result = {"message": message, "written": written, "found": found, "digest": history.digest()}
    print(json.dumps({**result, "recovered": recovered}), flush=True)


def write(folder: Path, count: int) -> None:
    """A writer that ends by itself."""
    child, reading = _fork(lambda pipe: _write(folder, count, pipe))
    print(json.dumps(_reap(child, reading)), flush=True)


if __name__ == "__main__":
    mode, path, *numbers = sys.argv[1:]
    {"kill": kill, "crash": crash, "fill": fill, "write": write}[mode](Path(path), *map(int, numbers))
