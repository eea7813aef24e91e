"""The native kernels: compiled once per machine by the system's compiler, and kept in a cache folder."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).with_name("native_code")

FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    # Products are rounded before they are added, as torch does: the bits must not depend on the compiler.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",  # lets comparisons become vector instructions; changes no result
    "-shared",
    "-fPIC",
)

COMPILE_SECONDS = 120.0


class NoKernelsError(Exception):
    """Why there are no native kernels here, in one line."""


class Compiler(NamedTuple):
    """A C++ compiler: how it is called, and what it calls itself."""

    command: tuple[str, ...]
    version: str


@functools.cache
def find_compiler() -> Compiler:
    """The compiler of $CXX, or else the first of c++, g++ and clang++ that answers.

    Raises:
        NoKernelsError: there is none, or that of $CXX does not answer.
    """
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        command = shlex.split(name)
        if shutil.which(command[0]) is None:
            continue
        with suppress(OSError, subprocess.TimeoutExpired):
            said = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=20)
            if said.returncode == 0 and said.stdout:
                return Compiler(tuple(command), said.stdout.splitlines()[0].strip())
    if wanted:
        raise NoKernelsError(f"the compiler of CXX, '{wanted}', cannot be run")
    raise NoKernelsError("no C++ compiler (c++, g++ or clang++) was found; install one or name it in CXX")


def built() -> Path:
    """The compiled library, made if it is not there yet. Any number of processes may ask at once.

    Raises:
        NoKernelsError: no compiler, one that fails, or nowhere to write.
    """
    compiler = find_compiler()
    facts = "\n".join((*FLAGS, *compiler.command, compiler.version, _processor()))
    code = b"\0".join(path.read_bytes() for path in (*_sources(), *sorted(FOLDER.glob("*.h"))))
    name = hashlib.sha256(code + b"\0" + facts.encode()).hexdigest()[:32]
    folder = cache_folder()
    path = folder / f"{name}.so"
    if path.exists():
        return path
    with (folder / f"{name}.lock").open("w") as lock:
        with suppress(OSError):  # a file system without locks: then several compile, which does no harm
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _compile(compiler, path)
    return path


def _sources() -> list[Path]:
    return sorted(FOLDER.glob("*.cpp"))


def _compile(compiler: Compiler, path: Path) -> None:
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    os.close(handle)
    try:
        said = subprocess.run(
            [*compiler.command, *FLAGS, "-o", part, *map(str, _sources())],
            capture_output=True,
            text=True,
            timeout=COMPILE_SECONDS,
        )
        if said.returncode != 0:
            lines = [line.strip() for line in said.stderr.splitlines() if line.strip()]
            reason = next((line for line in lines if "error" in line), lines[0] if lines else "it says nothing")
            raise NoKernelsError(f"{compiler.version} cannot compile the kernels: {reason}")
        os.replace(part, path)
    except subprocess.TimeoutExpired:
        raise NoKernelsError(f"{compiler.version} took more than {COMPILE_SECONDS:.0f} s for the kernels") from None
    except OSError as error:
        raise NoKernelsError(f"{compiler.version} cannot be run ({error})") from error
    finally:
        with suppress(FileNotFoundError):
            os.unlink(part)


def cache_folder() -> Path:
    """A folder of this user alone, since what lies there is run."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    places = [Path(cache) / "meiosis" / "kernels", Path(tempfile.gettempdir()) / f"meiosis-kernels-{os.getuid()}"]
    for place in places:
        with suppress(OSError):
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
            facts = place.stat()
            private = facts.st_uid == os.getuid() and not facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            if private and os.access(place, os.W_OK | os.X_OK):
                return place
    raise NoKernelsError(f"neither {places[0]} nor {places[1]} is a folder that this user alone can write to")


def _processor() -> str:
    """What `-march=native` depends on: a home folder may serve machines with different processors."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        kinds = ("model name", "flags", "Features", "CPU part")
        return "\n".join(next((line for line in lines if line.startswith(kind)), "") for kind in kinds)
    return f"{platform.machine()} {platform.processor()}"
