"""Several candidates in one forward pass: the scores of each are its own, whoever came with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recipes import models_of, recipe_of
from test_prefix_reuse import MAKE
from test_reuse_in_search import children, decided, own, plan_with, questions, setup_of
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from evaluators.base import EvaluatorSpec, Scores
from search.batched import BatchedModel
from search.errors import ConfigError, UserError
from search.evaluation import Evaluation
from search.local_pool import LocalPool
from search.pool import Job, Outcome, WorkerPlan

COUNT = 3
pytestmark = pytest.mark.usefixtures("one_thread")


class _Logits:
    """An evaluator that yields the sum of the logits of each of its inputs."""

    plain_forward = True

    def __init__(self, lengths: tuple[int, ...] = (5, 9)) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = [torch.randint(0, 40, (2, length), generator=generator) for length in lengths]

    def evaluate(self, model: Any, items: Any) -> Iterator[Scores]:
        for number, ids in enumerate(self.inputs):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            yield Scores((str(number),), {"sum": np.array([float(logits.double().abs().sum())])}, np.ones(1))


@pytest.mark.parametrize("family", MAKE)
def test_scores_are_those_of_single_passes_and_the_same_bits_in_any_company(family: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = [MAKE[family]().eval().requires_grad_(False) for _ in range(COUNT)]
    evaluator: Any = _Logits()
    with torch.no_grad():
        alone = [Scores.join(list(evaluator.evaluate(model, ()))).values["sum"] for model in models]
        live = MAKE[family]().eval().requires_grad_(False)
        batch = BatchedModel(live, COUNT)
        batch.check()

        def together(order: list[int]) -> list[Any]:
            for slot, number in enumerate(order):
                live.load_state_dict(models[number].state_dict())
                batch.put(slot)
            slots = list(range(len(order)))
            batch.pad(slots)
            found = batch.evaluate(evaluator, slots, ())
            assert all(isinstance(scores, Scores) for scores in found.values())
            return [found[slot].values["sum"].tolist() for slot in slots]  # type: ignore[union-attr]

        first = together([0, 1, 2])
        np.testing.assert_allclose(first, alone, rtol=1e-6)
        assert together([2, 0, 1]) == [first[2], first[0], first[1]]
        assert together([1]) == [first[1]]
        assert batch.passes == 3 * len(evaluator.inputs), "one pass for all"
        assert "forward" not in vars(live)


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 8)

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        state = self.embed(input_ids)
        return CausalLMOutput(logits=state if state.sum() > 0 else -state)


def test_a_model_that_torch_cannot_run_so_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="candidates_per_forward is 2, but torch cannot run _Branching") as refused:
        BatchedModel(_Branching(), 2).check()
    assert "\n" not in str(refused.value)


def test_a_pool_scores_candidates_together_as_one_by_one(
    family: Path, tmp_path: Path, family_config: dict[str, Any]
) -> None:
    drawing = own(tmp_path, "return float(torch.rand(()) + model(input_ids=torch.arange(8)[None]).logits.sum() * 1e-3)")
    setup = setup_of(tmp_path, family_config)
    plan = plan_with(setup, questions(tmp_path), drawing)
    jobs = [replace(job, hash_weights=True) for job in children(setup, 7)]
    one_by_one = [Evaluation(plan).run(job) for job in jobs]
    several = replace(plan, candidates_per_forward=COUNT)
    found: list[list[Outcome]] = []
    for at_once in (7, 1):
        with LocalPool(several) as pool:
            outcomes: list[Outcome] = []
            for start in range(0, 7, at_once):
                for job in jobs[start : start + at_once]:
                    pool.submit(job)
                sizes = []
                while came := pool.wait():
                    sizes.append(len(came))
                    outcomes.extend(came)
                assert sizes == ([3, 3, 1] if at_once == 7 else [1])
            found.append(outcomes)
    assert [decided(outcome) for outcome in found[0]] == [decided(outcome) for outcome in found[1]]
    for outcome, expected in zip(found[0], one_by_one, strict=True):
        assert outcome.weights_sha256 == expected.weights_sha256
        assert list(outcome.scores) == list(expected.scores)
        assert outcome.layers_run > 0
        for name, value in expected.metrics.items():
            assert outcome.metrics[name] == pytest.approx(value, rel=1e-5), name


def test_a_candidate_that_fails_takes_no_other_with_it(family: Path) -> None:
    data = {pool: str(family / "data" / "python" / f"{pool}.jsonl") for pool in ("search", "select", "certify")}
    plan = WorkerPlan(
        models_of(family),
        "base",
        (EvaluatorSpec("p", "perplexity", {"data": data}),),
        "cpu",
        dtype="float16",
        candidates_per_forward=COUNT,
    )
    good, wild = recipe_of(family, "task_arithmetic"), recipe_of(family, "task_arithmetic", weight=1e8)
    broken = good.model_copy(update={"rules": (good.rules[0].model_copy(update={"operator": "no_such"}),)})
    with LocalPool(plan) as pool:
        for number, recipe in enumerate([wild, good, broken]):
            pool.submit(Job(number, recipe, "search"))
        outcomes = pool.wait()
        pool.submit(Job(3, good, "search"))
        (again,) = pool.wait()
    kinds = [outcome.failure and outcome.failure.kind for outcome in outcomes]
    assert kinds == ["not_finite", None, "error"]
    assert outcomes[1].metrics == again.metrics


def test_workers_on_ray_take_one_candidate_at_a_time_and_the_config_says_so(
    tmp_path: Path, family_config: dict[str, Any]
) -> None:
    cluster = {**family_config["cluster"], "pool": "ray", "candidates_per_forward": 2}
    with pytest.raises(ConfigError, match="candidates_per_forward above 1 needs pool: local"):
        setup_of(tmp_path, {**family_config, "cluster": cluster})


def test_a_config_without_likelihoods_to_share_passes_is_refused(tmp_path: Path, family_config: dict[str, Any]) -> None:
    family_config["cluster"] |= {"pool": "local", "candidates_per_forward": 2}
    family_config["evaluators"] = {"size": {"use": "cost"}}
    family_config["objectives"]["terms"] = ["size.parameters"]
    with pytest.raises(ConfigError, match="none of size is one; set it to 1"):
        setup_of(tmp_path, family_config)
