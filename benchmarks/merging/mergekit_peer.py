"""mergekit in an environment of its own, for comparison."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

WANTED = "mergekit==0.1.5"


@dataclass(frozen=True)
class Peer:
    """An installed mergekit, or the reason why there is none."""

    command: tuple[str, ...]
    version: str
    missing: str = ""


def find_peer(venv: Path) -> Peer:
    """mergekit of a virtual environment, which is made when it is not there."""
    python = venv / "bin" / "python"
    if not (venv / "bin" / "mergekit-yaml").exists():
        for command in ([sys.executable, "-m", "venv", venv], [python, "-m", "pip", "install", "-q", WANTED]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                said = (done.stderr or done.stdout).strip().splitlines()
                return Peer((), "", f"mergekit could not be installed: {said[-1] if said else done.returncode}")
    code = "import torch, mergekit, importlib.metadata as m; print(m.version('mergekit'), torch.__version__)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if done.returncode:
        return Peer((), "", f"mergekit does not start: {done.stderr.strip().splitlines()[-1]}")
    ours, torch = done.stdout.split()
    return Peer((str(venv / "bin" / "mergekit-yaml"),), f"mergekit {ours} (torch {torch})")
