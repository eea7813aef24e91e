"""The population: generation 0, then an optimiser, behind one ask and tell.

Everything it asks is a function of the space, the seed and the order of asks and tells, so a history
replays through a fresh one. Generation 0 comes first and ends with a wait for its last results, because
the optimiser starts at the best of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from evaluators.base import Scores
from search.baseline import Generation0, Proposal, parent_label, soup_rule, start_baseline
from search.candidate import BASE_LABEL, SEARCHED, Candidate
from search.genome import Genome
from search.objective import FAILED_LOSS, Judgement, Objective
from search.optimizer import (
    LearnsFromGeneration0,
    LearnsFromResults,
    MakeOptimizer,
    Optimizer,
    PoolsParts,
    Problem,
    Result,
)
from search.pareto.starts import front_ids
from search.racing.coverage import Coverage, judged
from search.racing.fitness import Fitness
from search.same_merge import same_merge
from search.seeds import derive_seed
from search.space import Space


class Population:
    """Asks for candidates and learns from their metrics.

    Args:
        space: where the optimiser searches.
        objective: not yet normalised; that happens when the parents are known.
        baselines: names in order, or name -> options.
        make_optimizer: from `optimizer_named`.
        budget, window, seed, step: see `Problem`.
        baselines_only: whether it ends with generation 0.
        fitness: how far candidates are scored; None: all on all items.

    Attributes:
        coverage: on which items candidates are scored.
    """

    def __init__(
        self,
        space: Space,
        objective: Objective,
        baselines: Sequence[str] | Mapping[str, Mapping[str, Any]],
        make_optimizer: MakeOptimizer,
        *,
        budget: int,
        window: int,
        seed: int,
        step: float,
        baselines_only: bool = False,
        fitness: Fitness | None = None,
    ) -> None:
        self._space, self.objective = space, objective
        self._make_optimizer = make_optimizer
        self._budget, self._window, self._seed, self._step = budget, window, seed, step
        self._candidates: list[Candidate] = []
        self._metrics: dict[int, Mapping[str, float] | None] = {}
        self._scores: dict[int, Mapping[str, Scores]] = {}
        self._stopped: set[int] = set()
        self._labels: dict[str, int] = {}
        self._weights: dict[int, Mapping[str, float]] = {}
        self._baselines_only = baselines_only
        self.coverage = Coverage(fitness)
        known = Generation0(
            space.sources,
            self._loss_of_label,
            metrics=self._metrics_of_label,
            terms=lambda: self.objective.terms,
            groups=space.groups,
            operators=space.operators,
        )
        chosen = baselines if isinstance(baselines, Mapping) else {name: {} for name in baselines}
        self._waiting = [
            iter(self._parents()),
            *(start_baseline(name, options, known) for name, options in chosen.items()),
        ]
        self._optimizer: Optimizer | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing will be asked any more, whatever is told."""
        return self._baselines_only and not self._waiting

    @property
    def has_parents(self) -> bool:
        """Whether parents and base were asked: without them nothing can be compared, so no limit cuts them off."""
        return len(self._candidates) > len(self._space.sources)

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """All that were asked so far, by id: a copy, which takes time for each of them."""
        return tuple(self._candidates)

    @property
    def asked(self) -> int:
        """How many were asked so far."""
        return len(self._candidates)

    def candidate(self, id_: int) -> Candidate:
        """The candidate of a number."""
        return self._candidates[id_]

    def ask(self) -> Candidate | None:
        """The next candidate; None when it depends on results that are still out."""
        proposal = self._next_proposal()
        if proposal is not None:
            return self._add_proposal(proposal)
        if self._optimizer is None:
            if self._waiting or len(self._metrics) < len(self._candidates):
                return None
            if self._baselines_only:
                return None
            self._optimizer = self._start_optimizer()
        genome = Genome.of(self._optimizer.ask())
        recipe, known_hash = self._space.decode(genome), self._space.recipe_hash(genome)
        return self._add(Candidate(len(self._candidates), SEARCHED, recipe, genome, known_hash=known_hash))

    def tell(
        self,
        candidate: int,
        metrics: Mapping[str, float] | None,
        scores: Mapping[str, Scores] | None = None,
        *,
        censored: bool = False,
    ) -> None:
        """What was measured of a candidate; metrics are None for a failure. Call in the order of the history."""
        self._metrics[candidate] = metrics
        if self._optimizer is None and metrics is not None and candidate in self._weights and not censored:
            self._scores[candidate] = scores or {}
        if self._optimizer is None and censored:
            self._stopped.add(candidate)
        if self.objective.needs_parents and self._parents_are_known():
            found = [metrics for id_ in self._parent_ids() if (metrics := self._metrics[id_]) is not None]
            if found:
                self.objective = self.objective.against(found)
        asked = self._candidates[candidate]
        parent = asked.origin == BASE_LABEL or asked.is_parent
        self.coverage.tell(asked, self.objective, metrics, scores or {}, censored=censored, parent=parent)
        if self._optimizer is not None and asked.genome is not None:
            result = self._result(metrics, scores or {}, asked if censored else None)
            if isinstance(self._optimizer, LearnsFromResults):
                self._optimizer.tell_result(asked.genome.vector(), result)
            else:
                self._optimizer.tell(asked.genome.vector(), result.loss)

    def _result(
        self, metrics: Mapping[str, float] | None, scores: Mapping[str, Scores], censored: Candidate | None
    ) -> Result:
        loss = judged(self.objective, metrics, censored).loss
        if metrics is None or loss >= FAILED_LOSS:
            return Result(loss)
        violation = self.objective.violation(metrics)
        parts = self.coverage.losses_of_parts(self.objective, metrics, scores)
        value = self.objective.value(metrics)
        return Result(
            loss, self.objective.losses(metrics), violation, censored is not None, scores, metrics, parts, value
        )

    def judge(self, metrics: Mapping[str, float] | None, censored: int | None = None) -> Judgement | None:
        """Loss and feasibility, or None while the parents that normalise them are not all told.

        Args:
            censored: the candidate, if it was stopped.
        """
        if self.objective.needs_parents:
            return None
        return judged(self.objective, metrics, None if censored is None else self._candidates[censored])

    def ranked(self, losses: Mapping[int, float]) -> list[int]:
        """Candidates of the optimiser, best first, as far as is known of candidates that have not all items.

        Args:
            losses: candidate -> its loss on the items that it has.
        """
        optimizer: object = self._optimizer
        cautious = {id_: self.coverage.cautious(id_, loss) for id_, loss in losses.items()}
        if losses and self.coverage.rotates and isinstance(optimizer, PoolsParts):
            genomes = [genome for id_ in losses if (genome := self._candidates[id_].genome) is not None]
            expected = optimizer.held_for_best([genome.vector() for genome in genomes])
            cautious = dict(zip(losses, expected.tolist(), strict=True))
        return sorted(cautious, key=lambda id_: (cautious[id_], id_))

    def expected(self, candidate: int) -> float | None:
        """The objective of a candidate of the optimiser on all search items, by all that was told of candidates on
        parts of them; None where every one is scored on the same items."""
        optimizer: object = self._optimizer
        genome = self._candidates[candidate].genome
        if not (self.coverage.rotates and isinstance(optimizer, PoolsParts) and genome is not None):
            return None
        # Losses of parts lack what normalises the metrics.
        level = self.objective.value({term.metric: 0.0 for term in self.objective.terms})
        return optimizer.expected_loss(genome.vector()) + level

    def parents_failed(self) -> bool:
        """Whether every parent was told and none could be evaluated."""
        return self._parents_are_known() and all(self._metrics[id_] is None for id_ in self._parent_ids())

    def _parents(self) -> Iterator[Proposal | None]:
        sources = self._space.sources
        base = Proposal(BASE_LABEL, soup_rule((BASE_LABEL,)), dict.fromkeys(sources, 0.0))
        if self.coverage.shares_parents:
            yield base  # what is known of it on all items is what parts of them are completed with
        for source in sources:
            weights = {other: float(other == source) for other in sources}
            yield Proposal(parent_label(source), soup_rule((source,)), weights)
        if not self.coverage.shares_parents:
            yield base

    def _next_proposal(self) -> Proposal | None:
        for generator in list(self._waiting):
            try:
                proposal = next(generator)
            except StopIteration:
                self._waiting.remove(generator)
                continue
            if proposal is not None:
                return proposal
        return None

    def _add_proposal(self, proposal: Proposal) -> Candidate:
        id_ = len(self._candidates)
        self._labels[proposal.label] = id_
        if proposal.weights is not None:
            self._weights[id_] = proposal.weights
        recipe = self._space.recipe(proposal.rules)
        return self._add(Candidate(id_, proposal.label, recipe, step=proposal.step, learn=proposal.learn))

    def _add(self, candidate: Candidate) -> Candidate:
        whole = candidate.learn is not None or candidate.origin == BASE_LABEL
        optimizer: object = self._optimizer
        if candidate.is_parent:
            whole = not self.coverage.shares_parents
        elif self.coverage.rotates and candidate.genome is not None:
            whole = not isinstance(optimizer, PoolsParts) or optimizer.wants_all_items()
        candidate = self.coverage.assigned(candidate, self.objective, whole=whole)
        self._candidates.append(candidate)
        return candidate

    def _start_optimizer(self) -> Optimizer:
        """The optimiser at the best recipe of generation 0 that the space can come close to."""
        ranked = sorted(self._weights, key=lambda id_: (self.coverage.cautious(id_, self._known_loss(id_)), id_))
        starts = [genome for id_ in ranked if (genome := self._suggested(id_)) is not None]
        start = starts[0] if starts else self._space.initial()
        remaining = max(self._budget - len(self._candidates), 1)
        optimizer = self._make_optimizer(
            Problem(
                start.vector(),
                remaining,
                self._window,
                derive_seed(self._seed, "optimizer"),
                self._step,
                self._space.genes,
                len(self.objective.terms),
                self.objective.terms,
                parts=self.coverage.parts,
            )
        )
        # The start itself is no recipe of generation 0 when the operators differ, or a weight was clipped.
        handed = self._hand_over(optimizer) if isinstance(optimizer, LearnsFromGeneration0) else set()
        suggested = [start]
        if self.objective.pareto:
            # The ends of a front are near the parents, far from the best mean.
            scored = {id_: self._metrics[id_] for id_ in self._weights if id_ not in self._stopped}
            front = front_ids(self.objective, scored)
            suggested += [end for id_ in front if (end := self._suggested(id_)) is not None]
        for genome in dict.fromkeys(suggested):
            if genome not in handed:
                optimizer.suggest(genome.vector())
        return optimizer

    def _hand_over(self, optimizer: LearnsFromGeneration0) -> set[Genome]:
        """Tell an optimiser what generation 0 measured of genomes of the space; returns these."""
        known: set[Genome] = set()
        for id_, scores in self._scores.items():
            genome = self._suggested(id_)
            if genome is None or genome in known:
                continue
            if same_merge(self._candidates[id_].recipe, self._space.decode(genome)):
                known.add(genome)
                optimizer.take_member(genome.vector(), self._result(self._metrics[id_], scores, None))
        self._scores.clear()
        return known

    def _suggested(self, candidate: int) -> Genome | None:
        """The genome that comes closest to a recipe of generation 0."""
        operator = self._candidates[candidate].recipe.rules[0].operator
        return self._space.suggest(self._weights[candidate], operator)

    def _parent_ids(self) -> list[int]:
        return [
            self._labels[label] for source in self._space.sources if (label := parent_label(source)) in self._labels
        ]

    def _parents_are_known(self) -> bool:
        ids = self._parent_ids()
        return len(ids) == len(self._space.sources) and all(id_ in self._metrics for id_ in ids)

    def _loss_of_label(self, label: str) -> float | None:
        id_ = self._labels.get(label)
        if id_ is None or id_ not in self._metrics or not self._parents_are_known():
            return None
        return self._known_loss(id_) if not self.objective.needs_parents else float("inf")

    def _known_loss(self, id_: int) -> float:
        """The loss of a candidate of generation 0; the estimate of one that was stopped may be better than that."""
        return judged(self.objective, self._metrics[id_], self._candidates[id_] if id_ in self._stopped else None).loss

    def _metrics_of_label(self, label: str) -> Mapping[str, float] | None:
        if self._loss_of_label(label) is None:
            return None
        return self._metrics[self._labels[label]] or {}
