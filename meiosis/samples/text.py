"""`meiosis samples text`: a family of small text models to merge, trained once and cached."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from evaluators.errors import UserError
from meiosis.samples.card import CARD, KIND, VERSION, FamilyCard, FamilyPlan, file_hashes, read_card
from meiosis.samples.place import order, refuse_foreign, replace, workshop_beside

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
    refuse_foreign(folder, CARD, KIND)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with workshop_beside(folder, report) as workshop:
            card = _cached(folder, seed, plan)  # somebody else may have finished while we waited
            if card is not None:
                report(f"{folder}: up to date")
                return card
            given = {"seed": seed, "threads": threads or THREADS, "plan": plan.model_dump(mode="json")}
            order(workshop, "meiosis.samples.build", given, report)
            replace(folder, workshop / "family", workshop / "replaced")
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
