"""How a run ended: the final table, and what follows from it in words.

The numbers come from `search.finals`; nothing here looks at a model or a history.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from search.errors import RunError
from search.selection_bias import Optimism

SIGNIFICANCE = 0.01
VERDICT_VERSION = 2
"""Of the JSON of a verdict: 1 has neither effect sizes nor what was compared beside generation 0."""
FEWEST_DOCUMENTS = 10
"""Certify documents per evaluator below which resampling them says little about others."""


@dataclass(frozen=True)
class Row:
    """One line of the final table, on the certify items.

    Attributes:
        label: origin of the candidate.
        candidate: its id.
        value: objective, smaller is better; low and high are its 95 % interval.
        metrics: the metrics of the objective and of the constraints.
        feasible: whether it keeps the constraints on these items.
        difference: objective of the winner minus this one (None for the winner itself).
        p: of that difference, corrected for the number of rows (Holm).
        effect: that difference in standard deviations of documents (Cohen's d of paired differences), with its 95 %
            interval; None where it is not defined.
        arm: the search beside the main one in which the candidate has its id; empty for the main one.
    """

    label: str
    candidate: int
    value: float
    low: float
    high: float
    metrics: Mapping[str, float]
    feasible: bool = True
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    p: float | None = None
    effect: float | None = None
    effect_low: float | None = None
    effect_high: float | None = None
    arm: str = ""


@dataclass(frozen=True)
class ArmSummary:
    """The part of an `ArmResult` that a verdict keeps."""

    name: str
    candidates: int
    item_evaluations: int


@dataclass(frozen=True)
class Verdict:
    """How a run ended.

    Attributes:
        winner: id of the chosen candidate.
        label: its origin and number.
        searched: whether the optimiser found it, or it is a baseline that nothing beat on the select items.
        candidates_searched: how many candidates came from the optimiser.
        best_baseline: label of the best baseline on the select items, None if none keeps the constraints.
        documents: the smallest number of certify documents behind a metric of the objective.
        weights_sha256: hash of the winner's tensors, as they were evaluated.
        rows: baselines by value, the winner last.
        unavailable: labels of baselines that could not be evaluated.
        earlier: verdicts of this run before it was extended; each of them looked at the certify items.
        front: of a search for a front, how the winner was chosen from it and how it compares term by term.
        arms: the searches beside the main one that were compared.
        missing: comparisons that a full certificate has and this one lacks.
        optimism: what the search saw of its winner and what it is; None where a baseline won.
    """

    winner: int
    label: str
    searched: bool
    candidates_searched: int
    best_baseline: str | None
    documents: int
    weights_sha256: str
    rows: tuple[Row, ...]
    unavailable: tuple[str, ...] = ()
    earlier: int = 0
    front: str = ""
    arms: tuple[ArmSummary, ...] = ()
    missing: tuple[str, ...] = ()
    optimism: Optimism | None = None

    @property
    def proven(self) -> bool:
        """Whether the found merge is better than every row that keeps the constraints, beyond chance."""
        return self._doubt() is None

    def sentence(self) -> str:
        """The verdict in words."""
        missing = f" Not evaluated: {', '.join(self.unavailable)}." if self.unavailable else ""
        if self.earlier:
            missing += (
                f" The run was extended after {self.earlier} earlier verdict(s) on the same certify items: whoever "
                "extends a run because of a verdict no longer has an unbiased one."
            )
        if self.front:
            missing = f" {self.front} The table compares weighted means.{missing}"
        if self.missing:
            missing += f" Not compared with: {', '.join(self.missing)}."
        doubt = self._doubt()
        if doubt is not None:
            return doubt + missing
        kept = "" if all(row.feasible for row in self.rows) else " that keeps the constraints"
        beside = "".join(f", {arm.name.replace('_', ' ')}" for arm in self.arms if arm.name != "standard")
        largest = max((row.p for row in self.rows if row.p is not None), default=0.0)
        return (
            f"The found merge beats every parent and every baseline{beside}{kept} "
            f"(paired bootstrap, Holm, p < {SIGNIFICANCE:g}; largest p {largest:.2g}).{missing}"
        )

    def _doubt(self) -> str | None:
        """Why the found merge is not proven better, or None."""
        if not self.candidates_searched:
            return f"Nothing was searched: the budget ends with generation 0. Its best, '{self.label}', is exported."
        if not self.searched and self.front:
            return f"The point of the front that was chosen is the baseline '{self.label}'; it is what is exported."
        if not self.searched:
            return f"No searched merge beat the baseline '{self.label}' on the select items; it is what is exported."
        if not self.rows[-1].feasible:
            return "The found merge does not keep the constraints on the certify items."
        rivals = [row for row in self.rows[:-1] if row.feasible and row.difference is not None and row.p is not None]
        behind = [row.label for row in rivals if (row.difference or 0.0) >= 0]
        if behind:
            return f"The found merge does not beat {', '.join(behind)} on the certify items."
        if self.documents < FEWEST_DOCUMENTS:
            return (
                f"The found merge is ahead of every parent and baseline, but {self.documents} certify document(s) "
                f"prove nothing; give at least {FEWEST_DOCUMENTS}."
            )
        unproven = [row.label for row in rivals if row.p is not None and row.p >= SIGNIFICANCE]
        if unproven:
            return (
                f"The found merge is ahead of every parent and baseline, but against {', '.join(unproven)} "
                f"that may be chance (p >= {SIGNIFICANCE:g})."
            )
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with what follows from it."""
        return {**self._data(), "proven": self.proven, "sentence": self.sentence()}

    def to_json(self) -> str:
        return json.dumps(self._data(), separators=(",", ":"))

    def _data(self) -> dict[str, Any]:
        return {"version": VERDICT_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, text: str) -> Verdict:
        """What `to_json` of this or an older version wrote. Raises RunError for that of a younger one."""
        data = json.loads(text)
        if (version := data.pop("version", 1)) > VERDICT_VERSION:
            raise RunError(
                f"the verdict of this run has version {version}, this Meiosis reads {VERDICT_VERSION}; use the "
                "Meiosis that wrote it"
            )
        data["rows"] = tuple(Row(**row) for row in data["rows"])
        data["arms"] = tuple(ArmSummary(**arm) for arm in data.get("arms", ()))
        data["optimism"] = Optimism(**data["optimism"]) if data.get("optimism") else None
        return cls(**{**data, **{key: tuple(data.get(key, ())) for key in ("unavailable", "missing")}})
