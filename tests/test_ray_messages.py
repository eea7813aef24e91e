"""A worker whose code was changed under it by what it runs: what it sends is not unpickled."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from worker_bodies import Scripted, job, plan

from cluster.pool import RayPool
from search.pool import Outcome

if TYPE_CHECKING:
    from cluster.local_ray import Session

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


class Explosive:
    def __init__(self, place: str) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.place,)


class Rewrites(Scripted):
    """Changes the module that sends outcomes, as a hostile evaluator could."""

    def rewrite(self, outcome: Outcome, place: str) -> None:
        import cluster.worker

        cluster.worker.encode = lambda message: pickle.dumps(Explosive(place))  # type: ignore[assignment]


def test_a_worker_that_sends_a_pickle_fails_its_candidate_and_is_replaced(ray_session: Session, tmp_path: Path) -> None:
    place = tmp_path / "exploded"
    with RayPool(plan(tmp_path), workers=1, body="test_ray_messages:Rewrites", working_folder=tmp_path) as pool:
        pool.submit(job(0, "rewrite", place=str(place)))
        pool.submit(job(1))
        found: dict[int, Outcome] = {}
        while len(found) < 2:
            found |= {outcome.candidate: outcome for outcome in pool.wait(5)}
    assert not place.exists()
    assert found[0].failure is not None
    assert found[0].failure.message.startswith("ValueError: the worker sent no message of this Meiosis")
    assert found[1].metrics == {"test.square": 1.0}
