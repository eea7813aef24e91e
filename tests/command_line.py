"""The command line from tests: in this process where that is enough, in another where the process matters."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

ROOT = Path(__file__).resolve().parents[1]
START = "from meiosis.cli.main import main; main()"


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON document on stdout; NaN and infinity, which JSON does not have, are refused."""

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        return json.loads(self.out, parse_constant=refuse)


def meiosis(*arguments: object) -> Ended:
    """Run a command in this process."""
    import torch

    from meiosis.cli.main import main

    torch.set_num_threads(1)
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["meiosis", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as ended:
            status = ended.code
    assert isinstance(status, int)
    return Ended(status, out.getvalue(), err.getvalue())


def spawn(*arguments: object, code: str = START) -> subprocess.Popen[str]:
    """Start a command in a process of its own."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )


def end(process: subprocess.Popen[str]) -> Ended:
    """Wait for a spawned command."""
    out, err = process.communicate(timeout=120)
    return Ended(process.returncode, out, err)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 60) -> None:
    """Wait for something that a spawned command does."""
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit, "it takes too long"
        time.sleep(0.02)


def write_config(config: dict[str, Any], folder: Path, name: str = "config.yaml") -> Path:
    """A config file."""
    path = folder / name
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def short(config: dict[str, Any], budget: int = 8) -> dict[str, Any]:
    """The config with the parents alone as generation 0, for a run of a second."""
    config["search"] |= {"budget": budget, "finalists": 1, "baselines": []}
    return config
