"""nevergrad on a flat unit box: our decoder gives the numbers their meaning, names and bounds."""

from __future__ import annotations

import re
import warnings
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from search.errors import UserError, nearest
from search.optimizer import MakeOptimizer, Problem, Vector

_SELECTORS = re.compile(
    r"^(NGO|Ng|NGDS|Meta|SuperNg|HyperOpt|Wiz|CSEC|SplitCSEC|Carola|[Pp]Carola|FCarola)|MetaModel|Neural|SVM|RF"
)
"""Families that choose their method by dimension, budget and workers, and can reach a surrogate model."""

_TPA_DIMENSION = 300
_REHEARSAL = 40


class NevergradBox:
    """An optimiser of nevergrad behind `search.optimizer.Optimizer`.

    BLAS runs on one thread inside, since CMA's asks depend on the number of threads.

    Choices and bools are coordinates like others. nevergrad's own parameters for them serve its discrete methods no
    better (with `DiscreteOnePlusOne` on 49 genes a loss of 0.009 by integers and 0.1 to 0.5 by its choices, against
    0.008 on the box), and cost 3 to 8 times the time for each candidate.

    Args:
        make: called with (parametrization, budget, num_workers).
    """

    def __init__(self, make: Any, problem: Problem) -> None:
        ng, _ = import_nevergrad()
        # With one dimension nevergrad's CMA asks for a package of its own choice: a second one that means nothing.
        self._genes = len(problem.start)
        start = problem.start if self._genes > 1 else np.append(problem.start, 0.5)
        # Bounds by clipping of the coordinate keep the box flat; nevergrad's own RandomState, never global.
        array = ng.p.Array(init=start.copy(), lower=0.0, upper=1.0)
        array.random_state = np.random.RandomState(problem.seed)
        with one_blas_thread():
            self._optimizer = make(array, budget=problem.budget, num_workers=problem.window)
        self._suggested: deque[Vector] = deque()
        self._asked: dict[bytes, deque[Any]] = {}

    def suggest(self, point: Vector) -> None:
        self._suggested.append(point)

    def ask(self) -> Vector:
        with one_blas_thread():
            if self._suggested:
                # nevergrad's queue of suggestions is last in, first out: hand them over one by one.
                suggested = self._suggested.popleft()
                self._optimizer.suggest(suggested if self._genes > 1 else np.append(suggested, 0.5))
            candidate = self._optimizer.ask()
        point = np.asarray(candidate.value, dtype=np.float64)[: self._genes]
        self._asked.setdefault(point.tobytes(), deque()).append(candidate)
        return point

    def tell(self, point: Vector, loss: float) -> None:
        waiting = self._asked[point.tobytes()]
        candidate = waiting.popleft()
        if not waiting:
            del self._asked[point.tobytes()]
        with one_blas_thread():
            self._optimizer.tell(candidate, loss)

    def parts(self) -> set[str]:
        """Names of all optimisers inside this one; of their base classes only the foreign minimisers'."""
        from nevergrad.optimization.base import ConfiguredOptimizer, Optimizer
        from nevergrad.optimization.recaster import RecastOptimizer

        names: set[str] = set()
        pending: list[Any] = [self._optimizer]
        seen: set[int] = set()
        while pending:
            part = pending.pop()
            if id(part) in seen:
                continue
            seen.add(id(part))
            if isinstance(part, (list, tuple)):
                pending += part
            elif isinstance(part, ConfiguredOptimizer):
                names.add(part.name)
                pending += [part._OptimizerClass, *part.__dict__.values()]
            elif isinstance(part, (type, Optimizer)):
                kind = part if isinstance(part, type) else type(part)
                if issubclass(kind, Optimizer):
                    names.add(kind.__name__.lstrip("_"))
                if issubclass(kind, RecastOptimizer):
                    names.add(RecastOptimizer.__name__)
                if isinstance(part, Optimizer):
                    pending += part.__dict__.values()
        return names


def import_cma() -> Any:
    """pycma, without its warning that it cannot plot."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Could not import matplotlib")
        import cma
    return cma


def import_nevergrad() -> tuple[Any, Any]:
    """nevergrad and the pycma inside it."""
    cma = import_cma()
    import nevergrad
    from nevergrad.optimization.recaster import RecastOptimizer

    # One that fails while it is made is deleted without it, and Python prints a traceback.
    RecastOptimizer._messaging_thread = None

    return nevergrad, cma


@cache
def _blas() -> Any:
    """The BLAS libraries that are loaded, looked up once: looking costs more than an ask."""
    import scipy.linalg  # noqa: F401 - brings a BLAS of its own
    from threadpoolctl import ThreadpoolController

    import_cma()

    return ThreadpoolController()


def one_blas_thread() -> Any:
    """A context in which BLAS runs on one thread: CMA-ES asks otherwise with another number."""
    return _blas().limit(limits=1, user_api="blas")


def from_registry(name: str, ours: Iterable[str] = ()) -> MakeOptimizer:
    """The maker for a name of nevergrad's registry.

    The maker raises `UserError` too: what a portfolio consists of, and whether a method works with this
    many genes and candidates in flight, is seen only in an instance.

    Raises:
        UserError: unknown, or refused; the message says why and what to use.
    """
    ng, _ = import_nevergrad()
    registry = ng.optimizers.registry
    if name not in registry:
        raise UserError(f"unknown optimizer '{name}'{nearest(name, [*ours, *registry])}")

    def refuse(reason: str) -> UserError:
        return UserError(f"optimizer '{name}' is refused: {reason}; use diagonal_cma, or TwoPointsDE")

    reason = refusal(name, registry[name])
    if reason:
        raise refuse(reason)

    def make(problem: Problem) -> NevergradBox:
        if len(problem.start) >= _TPA_DIMENSION and "CMA" in name:
            raise refuse(
                f"from {_TPA_DIMENSION} genes on (here {len(problem.start)}) its step-size rule fails with "
                "candidates in flight"
            )
        try:
            box = NevergradBox(registry[name], problem)
            inside = next((reason for part in sorted(box.parts()) if (reason := refusal(part))), None)
            if inside:
                raise refuse(f"it contains another that is: {inside}")
            if rehearse(registry[name], problem) != rehearse(registry[name], problem):
                raise refuse("it does not repeat its asks from a seed, so a run with it cannot be resumed")
        except UserError:
            raise
        except Exception as error:  # 540 entries fail in as many ways
            said = str(error) or type(error).__name__
            raise refuse(f"it fails on {len(problem.start)} genes with {problem.window} in flight: {said}") from error
        return box

    return make


def rehearse(make: Any, problem: Problem, asks: int = _REHEARSAL) -> bytes:
    """The asks of a short run on a sphere with the window full, to be compared with a second one.

    As in a search the first point is suggested, which some methods cannot be told about.
    """
    box = NevergradBox(make, problem)
    box.suggest(problem.start)
    asked, open_ = [], deque[Vector]()
    for _ in range(min(asks, problem.budget)):
        open_.append(box.ask())
        asked.append(open_[-1].tobytes())
        if len(open_) >= problem.window:
            told = open_.popleft()
            box.tell(told, float(((told - 0.7) ** 2).sum()))
    return b"".join(asked)


def paced_by_budget(name: str, problem: Problem, budget: int) -> bool:
    """Whether an optimiser of the registry asks otherwise with another budget, in a short run."""
    ng, _ = import_nevergrad()
    make, asks = ng.optimizers.registry[name], min(_REHEARSAL, problem.budget, budget)
    return rehearse(make, problem, asks) != rehearse(make, replace(problem, budget=budget), asks)


def refusal(name: str, entry: Any = None) -> str | None:
    """Why an optimiser of nevergrad cannot carry a search, or None.

    Args:
        name: registered name, or name of the class of a part.
        entry: its entry in the registry, None for a part.
    """
    if _SELECTORS.search(name):
        return "it can hand over to a surrogate model that crashes in mid-run with numpy 2.3 and later"
    if getattr(entry, "recast", False) or "Recast" in name:
        return "it runs a foreign minimiser in a thread that cannot be replayed and may never end"
    if getattr(entry, "one_shot", False):
        return "it draws all its points before the first result, so it does not search"
    return None
