"""`meiosis samples text`: a family of small text models to merge, trained once and cached."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from evaluators.errors import MeiosisError, UserError
from meiosis.samples.card import CARD, KIND, VERSION, FamilyCard, FamilyPlan, file_hashes, read_card

__all__ = ["FamilyCard", "FamilyPlan", "make_text_family"]

THREADS = 2
"""The build cuts its work for two cores."""


def make_text_family(
    folder: Path,
    *,
    seed: int = 0,
    threads: int | None = None,
    report: Callable[[str], None] = print,
    plan: FamilyPlan | None = None,
) -> FamilyCard:
    """Train base and three specialists into `folder`, or return the card of those that are there.

    The folder gets `base/`, `python/`, `english/`, `cpp/` (ordinary checkpoints with tokenizer), the
    items `data/<domain>/{search,select,certify}.jsonl` (`id`, `document`, `text`), and `card.json`. It
    appears complete or not at all: the work is done in a hidden folder beside it.

    Args:
        folder: new, empty, or holding a family; a family of another seed or version is replaced.
        seed: of split, initial weights and order of training. On machines with the same texts, library
            versions and instruction set the same seed gives the same bits.
        threads: how many pieces of work run at once, 2 by default. The bits do not depend on it.
        report: gets progress, a line at a time.
        plan: sizes and lengths of training, for tests; the default is the recipe that the card names.

    Raises:
        UserError: the folder holds something else, or cannot be written.
        MeiosisError: the texts are not there, or training failed.
    """
    folder = Path(folder).absolute()
    plan = plan or FamilyPlan()
    if seed < 0 or (threads is not None and threads < 1):
        raise UserError(f"seed {seed}, threads {threads}: expected a seed of 0 or more and at least one thread")
    card = _cached(folder, seed, plan)
    if card is not None:
        report(f"{folder}: up to date")
        return card
    _refuse_foreign(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _workshop(folder, report) as workshop:
            card = _cached(folder, seed, plan)  # somebody else may have finished while we waited
            if card is not None:
                report(f"{folder}: up to date")
                return card
            _order(workshop, seed=seed, threads=threads or THREADS, plan=plan, report=report)
            _replace(folder, workshop / "family", workshop / "replaced")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}; name another folder") from error
    card = read_card(folder)
    assert card is not None, "a family that was just built has a card"
    seconds = card.seconds["total"]
    report(f"{folder}: {card.parameters:,} parameters per model, trained in {seconds:.0f} s")
    if not card.specialised():
        report("a specialist is not better than the base on its own domain and worse on the others: see card.json")
    return card


def _cached(folder: Path, seed: int, plan: FamilyPlan) -> FamilyCard | None:
    """The card of a complete, undamaged family of this recipe."""
    card = read_card(folder)
    if card is None or (card.version, card.seed, card.plan) != (VERSION, seed, plan):
        return None
    # Files that were put beside the family, such as a config, are nobody's damage.
    return card if card.files.items() <= file_hashes(folder).items() else None


def _refuse_foreign(folder: Path) -> None:
    """Raise `UserError` unless the folder is new, empty, or a family that may be replaced."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; the sample models need a new or empty folder")
    if not any(folder.iterdir()):
        return
    try:
        kind = json.loads((folder / CARD).read_bytes())["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        kind = None
    if kind != KIND:
        found = min(entry.name for entry in folder.iterdir())
        raise UserError(
            f"{folder} is not empty and holds no sample models ('{found}' is there, no readable {CARD}); "
            "name a new folder, or empty this one"
        )


@contextlib.contextmanager
def _workshop(folder: Path, report: Callable[[str], None]) -> Iterator[Path]:
    """A hidden folder beside `folder`, held by one process at a time and emptied before use.

    What a killed build has left there is removed by the next one. The lock is on the folder itself, and
    the training process inherits it, so a new build cannot meet an orphan of the old one.
    """
    workshop = folder.parent / f".{folder.name}.building"
    while True:
        workshop.mkdir(exist_ok=True)
        handle = os.open(workshop, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"{folder}: another process is building it; waiting")
            fcntl.flock(handle, fcntl.LOCK_EX)
        if workshop.exists() and os.path.samestat(os.fstat(handle), workshop.stat()):
            break
        os.close(handle)  # the one we waited for has removed it
    os.set_inheritable(handle, True)
    try:
        for entry in workshop.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        yield workshop
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
        os.close(handle)


def _order(workshop: Path, *, seed: int, threads: int, plan: FamilyPlan, report: Callable[[str], None]) -> None:
    """Run `build.main` in a fresh interpreter that imports the same packages as this one."""
    target = workshop / "family"
    target.mkdir()
    order = {"folder": str(target), "seed": seed, "threads": threads, "plan": plan.model_dump(mode="json")}
    here = str(Path(__file__).parents[2])
    command = f"import sys; sys.path.insert(0, {here!r}); from meiosis.samples.build import main; main()"
    environment = {
        **os.environ,
        # One thread per kernel: see `training`. AVX2 kernels everywhere, so that machines with AVX-512
        # give the same bits as machines without.
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "MKL_CBWR": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            close_fds=False,  # it inherits the lock on the workshop
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.close()
            for line in process.stdout:
                report(line.rstrip("\n"))
            status = process.wait()
        finally:
            process.kill()
            process.wait()
        if status != 0:
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines() or ["no message"]
            raise MeiosisError(f"training the sample models failed (exit status {status}): {said[-1]}")


def _replace(folder: Path, finished: Path, aside: Path) -> None:
    """Put the finished folder in place of whatever family is there."""
    if folder.exists():
        folder.rename(aside)
    finished.rename(folder)
