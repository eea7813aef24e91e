"""Ray that is started beside the checks of a config: never for a mistake in it, and never left behind."""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import end, spawn, wait_until, write_config
from family import config_of, copy_of
from safetensors.numpy import load_file, save_file

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

TELLS_RAY = (
    "import sys\n"
    "from meiosis.cli.main import main\n"
    "try:\n    main()\n"
    "finally:\n    print('ray' in sys.modules, file=sys.stderr)"
)


@pytest.fixture
def ray_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a Ray of our own keeps its files; the path must be short."""
    with tempfile.TemporaryDirectory(prefix="er-", dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield Path(folder)


def processes_of(folder: Path) -> list[int]:
    """Processes of Ray whose files are there."""
    found = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in command.read_bytes():
                found.append(int(command.parent.name))
        except OSError:
            continue
    return found


def nothing_left(folder: Path) -> bool:
    """Whether Ray's processes and files are gone, at the latest in a few seconds."""
    limit = time.monotonic() + 30
    while processes_of(folder) and time.monotonic() < limit:
        time.sleep(0.1)
    return not processes_of(folder) and not list(folder.iterdir())


def config_on_ray(family: Path, folder: Path, **changes: object) -> Path:
    config = config_of(family, folder / "results") | changes
    config["cluster"] |= {"pool": "ray", "workers": 1}
    return write_config(config, folder)


def with_a_nan(family: Path, folder: Path) -> Path:
    """A config one of whose sources has a NaN, which is found when Ray is on its way already."""
    config = config_of(family, folder)
    name, source = next(iter(config["models"]["sources"].items()))
    damaged = copy_of(Path(source), folder / name)
    file = damaged / "model.safetensors"
    tensors = load_file(file)
    next(value for value in tensors.values() if value.dtype.kind == "f").flat[0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    sources = {**config["models"]["sources"], name: str(damaged)}
    return config_on_ray(family, folder, models={**config["models"], "sources": sources})


def test_a_mistake_in_the_config_is_told_before_ray_is_even_imported(
    family: Path, tmp_path: Path, ray_folder: Path
) -> None:
    terms = [f"{next(iter(config_of(family, tmp_path)['evaluators']))}.nil"]
    config = config_on_ray(family, tmp_path, objectives={"terms": terms, "normalize": "none"})
    ended = end(spawn("search", config, code=TELLS_RAY))
    assert ended.status == 2
    assert len(ended.err.splitlines()) == 2, ended.err
    assert ended.err.splitlines()[-1] == "False"


def test_a_model_that_is_refused_while_ray_starts_leaves_nothing_of_ray(
    family: Path, tmp_path: Path, ray_folder: Path
) -> None:
    ended = end(spawn("search", with_a_nan(family, tmp_path), code=TELLS_RAY))
    assert ended.status == 2
    *lines, started = ended.err.splitlines()
    assert started == "True"
    assert len(lines) == 1, lines
    assert "NaN" in lines[0]
    assert nothing_left(ray_folder)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_command_that_ends_while_ray_starts_leaves_no_process(
    family: Path, tmp_path: Path, ray_folder: Path, number: signal.Signals
) -> None:
    process = spawn("search", config_on_ray(family, tmp_path), "--run", "ended")
    wait_until(lambda: bool(processes_of(ray_folder)), process)
    process.send_signal(number)
    ended = end(process)
    assert ended.status == (130 if number == signal.SIGINT else -9), ended.err
    limit = time.monotonic() + 30
    while processes_of(ray_folder) and time.monotonic() < limit:
        time.sleep(0.1)
    assert processes_of(ray_folder) == []


def test_a_search_on_a_ray_that_started_early_ends_it_and_keeps_stdout_for_results(
    family: Path, tmp_path: Path, ray_folder: Path
) -> None:
    process = spawn(
        *("search", config_on_ray(family, tmp_path), "--run", "first", "--json", "--budget", "6"),
        *("--set", "search.baselines=[]", "--set", "search.finalists=1"),
    )
    ended = end(process)
    assert ended.status == 0, ended.err
    assert set(ended.json) == {"run", "model", "verdict"}
    assert nothing_left(ray_folder)
    assert (tmp_path / "results" / "first" / "workers" / "ray.log").exists()
