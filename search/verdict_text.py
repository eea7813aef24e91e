"""What a verdict says beside its table, in sentences for people: how much of the win is luck, and what it cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from search.selection_bias import Optimism
    from search.verdict import Verdict

_WHAT = {
    "standard": "standard merges that generation 0 did not have",
    "random_search": "random search",
    "placebo": "placebo (the same search over random changes as large as those of the sources)",
}


def notes(verdict: Verdict) -> list[str]:
    """The sentences, one a paragraph; none of a verdict of an older version."""
    found = [] if verdict.optimism is None else list(_optimism(verdict.optimism))
    if verdict.arms:
        parts = [f"{_WHAT.get(arm.name, arm.name)}, {arm.item_evaluations:,} item-evaluations" for arm in verdict.arms]
        found.append(
            f"Compared beside generation 0: {'; '.join(parts)}. What they share with the search, such as "
            "the base, is counted in each, and evaluated once."
        )
    if any(row.effect is not None for row in verdict.rows):
        found.append(
            "d: the difference in standard deviations of documents (Cohen's d of paired differences, corrected for few "
            "documents); 0.2 is called small, 0.5 medium, 0.8 large."
        )
    return found


def _optimism(seen: Optimism) -> Iterator[str]:
    rough = "" if seen.on_part is None else f" (estimated from the {seen.on_part} of them that it was scored on)"
    shrunken = "without what it owes to that choice (bootstrap)"
    if seen.pooled:
        shrunken = "as expected from the scores of all of them together"
    yield (
        f"Winner's curse: the objective was {seen.search:.4f} on the search items{rough}, on which the found merge was "
        f"chosen among {seen.candidates} candidates, {seen.shrunken:.4f} {shrunken}, {seen.select:.4f} on the select "
        f"items and {seen.certify:.4f} on the certify items, where nothing was chosen."
    )
    if seen.seen_lead is not None and seen.shrunken_lead is not None and seen.certified_lead is not None:
        yield (
            f"Its lead over the best baseline, {seen.reference}, which does not depend on how hard the items are: "
            f"{seen.seen_lead:.4f} as the search saw it, {seen.shrunken_lead:.4f} shrunken, {seen.certified_lead:.4f} "
            f"certified. The search flattered it by {-seen.flattery:.4f}."
        )
