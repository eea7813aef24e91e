"""`meiosis samples vision`: a family of small image models to merge, trained once and cached."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from evaluators.errors import UserError
from meiosis.samples.card import file_hashes
from meiosis.samples.pictures import FILES
from meiosis.samples.place import order, refuse_foreign, replace, workshop_beside
from meiosis.samples.vision_card import CARD, KIND, VERSION, VisionCard, VisionPlan, read_vision_card

__all__ = ["VisionCard", "VisionPlan", "make_vision_family"]


def make_vision_family(
    folder: Path,
    *,
    data: Path | None = None,
    seed: int = 0,
    report: Callable[[str], None] = print,
    plan: VisionPlan | None = None,
) -> VisionCard:
    """Train a backbone and a fine-tune of it for each of eight tasks, or return the card of those that are there.

    The folder gets `base/` and a checkpoint for every task, `heads/<task>.safetensors`, the pictures
    `data/<task>/{search,select,certify}.npz` (`x`, `y`) and `card.json`. It appears complete or not at all.

    Args:
        folder: new, empty, or holding a family; a family of another seed, plan or data is replaced.
        data: folder with `mnist/` and `cifar10_jpeg/`; None for tasks from the digits of scikit-learn alone.
        seed: of pictures, initial weights and order of training.
        report: gets progress, a line at a time.
        plan: sizes and lengths of training; the default is the recipe that the card names.

    Raises:
        UserError: the folder holds something else or cannot be written, or the data is not there.
        MeiosisError: training failed.
    """
    folder = Path(folder).absolute()
    data = None if data is None else Path(data).absolute()
    plan = plan or VisionPlan()
    digest = "" if data is None else _digest(data)
    card = _cached(folder, seed, plan, digest)
    if card is not None:
        report(f"{folder}: up to date")
        return card
    refuse_foreign(folder, CARD, KIND)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with workshop_beside(folder, report) as workshop:
            card = _cached(folder, seed, plan, digest)  # somebody else may have finished while we waited
            if card is not None:
                report(f"{folder}: up to date")
                return card
            given = {
                "seed": seed,
                "plan": plan.model_dump(mode="json"),
                "data": None if data is None else str(data),
                "digest": digest,
            }
            order(workshop, "meiosis.samples.vision_build", given, report)
            replace(folder, workshop / "family", workshop / "replaced")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}; name another folder") from error
    card = read_vision_card(folder)
    assert card is not None, "a family that was just built has a card"
    report(f"{folder}: {card.parameters:,} parameters per model, trained in {card.seconds['total']:.0f} s")
    return card


def _cached(folder: Path, seed: int, plan: VisionPlan, digest: str) -> VisionCard | None:
    """The card of a complete, undamaged family of this recipe."""
    card = read_vision_card(folder)
    if card is None or (card.version, card.seed, card.plan, card.data) != (VERSION, seed, plan, digest):
        return None
    return card if card.files.items() <= file_hashes(folder).items() else None


def _digest(data: Path) -> str:
    """Hash of the files that a family is made of.

    Raises:
        UserError: one is missing.
    """
    found = hashlib.sha256()
    for name in FILES:
        path = data / name
        if not path.is_file():
            raise UserError(f"{path}: no such file; the data folder holds {', '.join(FILES)}")
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()
