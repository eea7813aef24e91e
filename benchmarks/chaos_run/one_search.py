"""The search of a chaos run as processes of the `meiosis` command, on a small family of models."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from chaos_run import slow_score
from chaos_run.notes import MARK

DOMAINS = ("python", "english", "cpp")
POOLS = ("search", "select", "certify")
ITEMS = 6
"""Texts per domain and pool: a trial shall take the time that it sleeps, and little more."""
MEIOSIS = str(Path(sys.executable).with_name("meiosis"))
RUN = "chaos"


def environment(folder: Path, seconds: float) -> dict[str, str]:
    """Variables for all processes of a run in `folder` whose trials take `seconds` on average."""
    token = random.SystemRandom().randbytes(16).hex()
    return {
        **os.environ,
        MARK: str(folder),
        slow_score.NOTES: str(folder / "notes"),
        slow_score.SECONDS: f"{seconds:g}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "OMP_NUM_THREADS": "1",
    }


def write_config(family: Path, folder: Path, *, budget: int, window: int, workers: int, seed: int) -> Path:
    """The config of the search, and a few of the family's texts, in `folder`.

    Args:
        family: folder with checkpoints `base`, `python`, `english`, `cpp`, and `data/<domain>/<pool>.jsonl`.
    """
    (folder / "notes").mkdir(parents=True)
    evaluators: dict[str, Any] = {"slow": {"use": "python", "function": f"{Path(slow_score.__file__).resolve()}:score"}}
    for domain in DOMAINS:
        files = {}
        for pool in POOLS:
            few = (family / "data" / domain / f"{pool}.jsonl").read_text(encoding="utf-8").splitlines()[:ITEMS]
            file = folder / "data" / domain / f"{pool}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join(few) + "\n", encoding="utf-8")
            files[pool] = str(file)
        evaluators[domain] = {"use": "perplexity", "data": files}
    config = {
        "name": RUN,
        "seed": seed,
        "models": {
            "base": str(family / "base"),
            "sources": {domain: str(family / domain) for domain in DOMAINS},
        },
        "space": {
            "operator": "task_arithmetic",
            "split": ["embedding"],
            "parameters": {"weight": {"low": -0.2, "high": 1.4, "initial": 0.4}},
        },
        "evaluators": evaluators,
        "objectives": {"terms": [f"{domain}.nll" for domain in DOMAINS], "normalize": "none"},
        "search": {"budget": budget, "window": window, "finalists": 5},
        "cluster": {"pool": "ray", "workers": workers, "threads": 1},
        "results": str(folder / "results"),
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


class Search:
    """The one search of a folder, carried by one process after the other.

    Attributes:
        run: the run folder.
        drivers: how many processes carried it.
        ended_themselves: of drivers that nobody killed and that did not succeed, the last line that they wrote.
    """

    def __init__(self, folder: Path, config: Path, variables: dict[str, str]) -> None:
        self._folder, self._config, self._variables = folder, config, variables
        self.run = folder / "results" / RUN
        self.drivers = 0
        self.ended_themselves: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None

    def go_on(self, address: str, workers: int) -> None:
        """Start a driver: the first one, or one that resumes where the last one was."""
        first = ["search", str(self._config), "--run", RUN]
        command = [MEIOSIS, *(["resume", str(self.run)] if (self.run / "run.yaml").exists() else first)]
        self.drivers += 1
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, "--address", address, "--workers", str(workers)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                env=self._variables,
                start_new_session=True,
            )

    @property
    def _log(self) -> Path:
        return self._folder / f"driver-{self.drivers:03d}.log"

    def status(self) -> int | None:
        """Exit status of the driver, None while it is at work."""
        assert self._process is not None
        return self._process.poll()

    def kill(self) -> int:
        """kill -9 the driver; returns how many processes that were."""
        assert self._process is not None
        if self._process.poll() is not None:
            return 0
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        return 1

    def note_end(self) -> str:
        """Remember that the driver ended by itself and did not succeed; returns why."""
        lines = self.log().splitlines()
        why = f"{self._log.name}: status {self.status()}, {lines[-1] if lines else 'no word'}"
        self.ended_themselves.append(why)
        return why

    def log(self) -> str:
        """What the last driver wrote."""
        return self._log.read_text(errors="replace").strip()
