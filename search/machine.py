"""What a machine has free: memory, GPU memory, and which files it sees. Standard library alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Probe = Callable[[Sequence[tuple[str, int]]], dict[str, Any]]


def make_probe() -> Probe:
    """A function that looks at the machine it runs on.

    It is made here and not in the module so that Ray sends it by value: on another node nothing of ours is imported.
    Given (path, size) of files it returns `name`, `memory` (free bytes, as far as the control group allows),
    `gpus` (free bytes of every GPU of NVIDIA) and `lacks` (bytes of the files that are not there, or of other size).
    """

    def probe(files: Sequence[tuple[str, int]]) -> dict[str, Any]:
        import os
        import shutil
        import socket
        import subprocess

        def words(path: str) -> dict[str, int]:
            """First word of every line -> the number after it, or of a file with one number `` -> that."""
            found = {}
            try:
                with open(path) as file:
                    for line in file:
                        *name, number = line.removesuffix("kB\n").split()
                        found[" ".join(name)] = int(number)
            except (OSError, ValueError):  # not there, or `max`
                return {}
            return found

        memory = words("/proc/meminfo").get("MemAvailable:", 1 << 52) * 1024
        for folder, most, now in (
            ("/sys/fs/cgroup", "memory.max", "memory.current"),
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = words(f"{folder}/{most}").get(""), words(f"{folder}/{now}").get("")
            if limit is not None and used is not None:
                # What is used holds pages of files too, which make room.
                files_used = words(f"{folder}/memory.stat").get("inactive_file", 0)
                memory = min(memory, max(0, limit - used + files_used))
        gpus = []
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
            try:
                told = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False).stdout
                gpus = [int(line) << 20 for line in told.split("\n") if line.strip().isdigit()]
            except (OSError, subprocess.SubprocessError):
                gpus = []
        lacks = 0
        for path, size in files:
            try:
                if os.stat(path).st_size != size:
                    lacks += size
            except OSError:
                lacks += size
        return {"name": socket.gethostname(), "memory": memory, "gpus": gpus, "lacks": lacks}

    return probe


def visible_gpus(gpus: Sequence[int]) -> tuple[int, ...]:
    """Of all GPUs here those that CUDA_VISIBLE_DEVICES leaves to this process and to the Ray that it starts.

    None where it names them otherwise than by number: which they are is not known then.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return tuple(gpus)
    numbers = [text.strip() for text in named.split(",")]
    if not all(number.isdigit() and int(number) < len(gpus) for number in numbers):
        return ()
    return tuple(gpus[int(number)] for number in numbers)


def gpus_are_hidden() -> bool:
    """Whether CUDA_VISIBLE_DEVICES leaves no GPU to this process."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named is not None and named.partition(",")[0].strip() in ("", "-1")


def has_gpu() -> bool:
    """Whether a GPU driver of NVIDIA or AMD is there, also in WSL, and not hidden; torch knows better, in seconds."""
    there = any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))
    return there and not gpus_are_hidden()
