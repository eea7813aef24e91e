"""Learned soups: the gradient against finite differences, the end against brute force, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import meiosis, write_config
from family import DOMAINS
from recipes import models_of

from evaluators.base import Context, Evaluator, EvaluatorSpec, Scores
from evaluators.registry import make_evaluator
from search.checkpoints.reading import CheckpointTensors, open_checkpoint
from search.errors import MeiosisError
from search.grouping import group_tensors
from search.merge.apply import Merger
from search.merge.live import build_live_model
from search.recipe import Recipe
from search.soups.learned import MixingGradient, SoupLoss, learn_soup
from search.soups.plan import LearnSoup, LossTerm, mixture, weight_key, weights_of
from search.store.events import Ask, Trial
from search.store.run_folder import RunFolder

TERMS = tuple(LossTerm(f"{name}.nll", 1.0, 1.0) for name in DOMAINS)


class Kitchen:
    """All that learning needs, over the family."""

    def __init__(self, family: Path, sources: Sequence[str] = DOMAINS, by: str = "layer") -> None:
        torch.set_num_threads(1)
        checkpoints = {name: open_checkpoint(family / name) for name in ("base", *sources)}
        self.sources = {name: CheckpointTensors(checkpoint) for name, checkpoint in checkpoints.items()}
        self.names = tuple(checkpoints["base"].tensors)
        self.merger = Merger(self.sources)
        self.live = build_live_model(family / "base", device="cpu", dtype="float32")
        self.evaluators: dict[str, Evaluator] = {}
        for name in DOMAINS:
            data = {pool: str(family / "data" / name / f"{pool}.jsonl") for pool in ("search", "select", "certify")}
            self.evaluators[name] = make_evaluator(EvaluatorSpec(name, "perplexity", {"data": data}))
            self.evaluators[name].prepare(Context(family / "base"))
        groups = [("*",)] if by == "model" else [g.tensors for g in group_tensors(self.names, 1, (), {})]
        share = 1 / len(sources)
        models = {name: ref for name, ref in models_of(family).items() if name in ("base", *sources)}
        rules = tuple(mixture(tensors, dict.fromkeys(sources, share)) for tensors in groups)
        self.start = Recipe(base="base", models=models, rules=rules)

    def gradient(self) -> MixingGradient:
        return MixingGradient(self.start, self.live, self.names, self.merger, self.sources)

    def loss(self, terms: tuple[LossTerm, ...] = TERMS) -> SoupLoss:
        return SoupLoss(self.gradient(), terms, self.evaluators)

    def learn(self, plan: LearnSoup) -> dict[str, float]:
        return learn_soup(
            self.start,
            plan,
            live=self.live,
            names=self.names,
            merger=self.merger,
            sources=self.sources,
            evaluators=self.evaluators,
        )


@pytest.fixture(scope="module")
def kitchen(family: Path) -> Kitchen:
    return Kitchen(family)


def test_the_loss_is_the_metric_of_the_evaluator(kitchen: Kitchen) -> None:
    kitchen.gradient().write(torch.full((3, 3), 1 / 3))
    model = kitchen.live.model
    for evaluator in kitchen.evaluators.values():
        items = evaluator.items("search")
        pairs = [(float(loss), weight) for loss, weight in evaluator.losses(model, items)]
        mean = sum(loss for loss, _ in pairs) / sum(weight for _, weight in pairs)
        scored = [scores for scores in evaluator.evaluate(model, items)]
        total = sum(float((s.values["nll"] * s.weights).sum()) for s in scored) / sum(s.weights.sum() for s in scored)
        assert mean == pytest.approx(total, rel=1e-5)


def test_questions_have_a_loss_that_is_their_metric(kitchen: Kitchen, family: Path, tmp_path: Path) -> None:
    rows = [
        {"context": "def f(x):", "choices": ["return x", "the end of", "x"], "answer": 0},
        {"context": "", "choices": ["a", "bc"], "answer": "bc"},
        {"context": "the import", "choices": ["s", "q", "statement is"], "answer": 2},
    ]
    for pool in ("search", "select", "certify"):
        lines = [
            json.dumps({**row, "id": f"{pool}{i}", "context": f"{row['context']} {pool}"}) for i, row in enumerate(rows)
        ]
        (tmp_path / f"{pool}.jsonl").write_text("\n".join(lines))
    data = {pool: str(tmp_path / f"{pool}.jsonl") for pool in ("search", "select", "certify")}
    evaluator = make_evaluator(EvaluatorSpec("questions", "multiple_choice", {"data": data}))
    evaluator.prepare(Context(family / "base"))
    items, model = evaluator.items("search"), kitchen.live.model
    pairs = list(evaluator.losses(model, items))
    scored = Scores.join(list(evaluator.evaluate(model, items)))
    mean = sum(float(loss) for loss, _ in pairs) / sum(weight for _, weight in pairs)
    assert mean == pytest.approx(evaluator.aggregate(scored)["nll"], rel=1e-5)


def test_the_gradient_by_the_weights_is_that_of_finite_differences(kitchen: Kitchen) -> None:
    loss = kitchen.loss((LossTerm("python.nll", 1.0, 1.0), LossTerm("cpp.nll", 2.0, 0.5)))
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.4], [0.2, 0.2, 0.7]], dtype=torch.float64)
    factor = 1.2
    _, gradient, by_factor = loss.at(weights, factor)
    step = 2e-3
    numeric = torch.zeros_like(weights)
    for place in np.ndindex(3, 3):
        ends = []
        for sign in (1, -1):
            moved = weights.clone()
            moved[place] += sign * step
            ends.append(loss.at(moved, factor, backward=False)[0])
        numeric[place] = (ends[0] - ends[1]) / (2 * step)
    assert torch.allclose(gradient, numeric, rtol=0.01, atol=2e-3)
    ends = [loss.at(weights, factor + sign * 0.01, backward=False)[0] for sign in (1, -1)]
    assert by_factor == pytest.approx((ends[0] - ends[1]) / 0.02, rel=0.01)


def test_the_gradient_is_that_of_autograd_through_the_whole_merge(kitchen: Kitchen) -> None:
    """An independent way: the merge as one differentiable expression, run by functional_call."""
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.2, 0.1, 0.7]], dtype=torch.float64)
    _, gradient, _ = kitchen.loss((LossTerm("english.nll", 1.0, 1.0),)).at(weights)
    free = weights.float().requires_grad_()
    group = {name: index for index, rule in enumerate(kitchen.start.rules) for name in rule.tensors}
    merged = {
        name: sum(free[group[name], i] * kitchen.sources[s].get(name).clone() for i, s in enumerate(DOMAINS))
        for name in kitchen.names
    }

    class Functional(torch.nn.Module):
        def forward(self, **kwargs: Any) -> Any:
            return torch.func.functional_call(kitchen.live.model, merged, kwargs=kwargs)

    evaluator = kitchen.evaluators["english"]
    pairs = list(evaluator.losses(Functional(), evaluator.items("search")))
    (sum(loss for loss, _ in pairs) / sum(weight for _, weight in pairs)).backward()
    assert free.grad is not None
    assert torch.allclose(gradient, free.grad.double(), rtol=1e-3, atol=1e-4)


def test_two_models_end_at_the_best_mixture_of_a_grid(family: Path) -> None:
    two = Kitchen(family, ("python", "english"), by="model")
    terms = TERMS[:2]
    loss = two.loss(terms)
    grid = np.linspace(0, 1, 41)
    values = [loss.at(torch.tensor([[1 - t, t]], dtype=torch.float64), backward=False)[0] for t in grid]
    found = two.learn(LearnSoup(terms, steps=25, rate=0.1, temperature=False))
    end = found[weight_key(0, "english")]
    assert found["soup/end"] <= min(values) + 1e-4
    assert abs(end - grid[int(np.argmin(values))]) < 0.08
    assert found[weight_key(0, "python")] + end == pytest.approx(1.0)
    assert found["soup/start"] == pytest.approx(values[20], rel=1e-6)  # both are half and half


def test_learning_by_layer_is_not_worse_than_the_mean_and_repeats_to_the_bit(kitchen: Kitchen) -> None:
    plan = LearnSoup(TERMS, steps=4, rate=0.1, temperature=False)
    first = kitchen.learn(plan)
    assert first["soup/end"] < first["soup/start"]
    assert kitchen.learn(plan) == first
    rows = [[first[weight_key(index, source)] for source in DOMAINS] for index in range(len(kitchen.start.rules))]
    assert all(sum(row) == pytest.approx(1.0) and min(row) > 0 for row in rows)
    assert len({tuple(row) for row in rows}) == len(rows)


def test_a_temperature_is_learned_along_and_changes_the_weights(kitchen: Kitchen) -> None:
    without, with_it = (kitchen.learn(LearnSoup(TERMS[:1], 3, 0.1, temperature)) for temperature in (False, True))
    assert with_it["soup/end"] != without["soup/end"]
    assert weight_key(0, "python") in with_it


def test_learning_leaves_no_gradients_and_no_hooks_in_the_model(kitchen: Kitchen) -> None:
    kitchen.learn(LearnSoup(TERMS[:1], 1, 0.1, False))
    parameters = list(kitchen.live.model.parameters())
    assert not any(p.requires_grad or p.grad is not None for p in parameters)
    assert not any(getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters)


def test_a_start_that_is_no_mixture_or_has_no_finite_loss_is_refused(kitchen: Kitchen) -> None:
    rule = kitchen.start.rules[0].model_copy(update={"operator": "task_arithmetic"})
    with pytest.raises(ValueError, match="found operator 'task_arithmetic'"):
        weights_of(kitchen.start.model_copy(update={"rules": (rule,)}))

    class Odd:
        loss_metric = "nll"

        def items(self, pool: str) -> list[str]:
            return ["a"]

        def losses(self, model: torch.nn.Module, items: Sequence[str]) -> Any:
            yield next(model.parameters()).sum() * math.nan, 1.0

    kitchen.evaluators["odd"] = Odd()  # type: ignore[assignment]
    with pytest.raises(MeiosisError, match="has the loss nan"):
        kitchen.learn(LearnSoup((LossTerm("odd.nll", 1.0, 1.0),), 1, 0.1, False))
    del kitchen.evaluators["odd"]


# As a baseline


@pytest.fixture
def learning(family_config: dict[str, Any]) -> dict[str, Any]:
    """A config with generation 0 alone: parents and the two soups."""
    options = {"weights": "layer", "steps": 3}
    family_config["search"] |= {"baselines": ["uniform_soup", {"learned_soup": options}], "baselines_only": True}
    return family_config


def trials_of(folder: Path) -> tuple[dict[str, int], dict[int, Trial], list[object]]:
    events = RunFolder(folder).events()
    asks = {event.origin: event.candidate for event in events if isinstance(event, Ask)}
    trials = {e.candidate: e for e in events if isinstance(e, Trial) and e.items == "search"}
    return asks, trials, [event.deterministic() for event in events]


def test_the_learned_soup_is_a_candidate_whose_recipe_stands_in_the_history(
    learning: dict[str, Any], tmp_path: Path
) -> None:
    ended = meiosis("search", write_config(learning, tmp_path), "--run", "one", "--json")
    assert ended.status == 0, ended.err
    asks, trials, _ = trials_of(tmp_path / "results" / "one")
    own = ["uniform_soup", "learned_soup+start", "learned_soup"]
    assert list(asks) == [*(f"parent:{name}" for name in DOMAINS), "base", *own]
    start, uniform, learned = (trials[asks[name]] for name in ("learned_soup+start", "uniform_soup", "learned_soup"))
    assert start.loss == pytest.approx(uniform.loss, rel=1e-6)
    assert learned.loss is not None
    assert uniform.loss is not None
    assert learned.loss < uniform.loss
    assert learned.loss == pytest.approx(start.metrics["soup/end"], rel=1e-5)
    labels = [row["label"] for row in ended.json["verdict"]["rows"]]
    assert "learned_soup" in labels
    assert "learned_soup+start" not in labels


def test_a_run_that_is_cut_anywhere_in_learning_resumes_to_the_same_history(
    learning: dict[str, Any], tmp_path: Path
) -> None:
    from search.config import parse_config
    from search.local_pool import LocalPool
    from search.run import Watcher, resume, start
    from search.setup import check
    from search.yaml_source import YamlSource

    class Cut(Exception):  # noqa: N818
        """The driver dies here."""

    class Counting(LocalPool):
        ran: list[int] = []  # noqa: RUF012
        stop_at = -1

        def wait(self, timeout: float | None = None) -> Any:
            if self._queue and self._queue[0].candidate == self.stop_at:
                raise Cut
            found = super().wait(timeout)
            self.ran += [outcome.candidate for outcome in found if outcome.items == "search"]
            return found

    import yaml

    config = check(parse_config(YamlSource(yaml.safe_dump(learning), "config"), tmp_path))
    make = lambda setup, plan, folder: Counting(plan, 2)  # noqa: E731
    start(config, make, Watcher(), "whole")
    _, _, whole = trials_of(tmp_path / "results" / "whole")
    for cut in (5, 6):  # learning has begun; its result is there and the soup is asked
        Counting.ran, Counting.stop_at = [], cut
        with pytest.raises(Cut):
            start(config, make, Watcher(), f"cut{cut}")
        Counting.stop_at = -1
        resume(RunFolder(tmp_path / "results" / f"cut{cut}"), make, Watcher())
        assert trials_of(tmp_path / "results" / f"cut{cut}")[2] == whole
        assert Counting.ran.count(5) == 1


def test_evaluators_without_a_gradient_are_refused_before_anything_is_spent(
    learning: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text("def size(model):\n    return 1.0\n")
    learning["evaluators"]["own"] = {"use": "python", "function": "own.py:size"}
    learning["objectives"]["terms"].append("own.score")
    ended = meiosis("plan", write_config(learning, tmp_path))
    assert ended.status == 2
    assert len(ended.err.splitlines()) == 1
    assert "search.baselines.1.learned_soup: needs a loss with a gradient, and evaluator 'own'" in ended.err
    assert ":6" in ended.err or "config.yaml:" in ended.err
    # As a mere constraint it is not differentiated.
    learning["objectives"]["terms"].pop()
    learning["constraints"] = ["own.score >= 0"]
    assert meiosis("plan", write_config(learning, tmp_path)).status == 0


def test_a_failed_learning_is_recorded_and_the_run_goes_on(learning: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "odd_loss.py").write_text(
        "from evaluators.language.perplexity import Perplexity\n"
        "class Odd(Perplexity):\n"
        "    def losses(self, model, items):\n"
        "        raise RuntimeError('no gradient today')\n"
        "        yield\n"
    )
    learning["evaluators"]["python"]["use"] = "odd_loss:Odd"
    import sys

    sys.path.insert(0, str(tmp_path))
    try:
        ended = meiosis("search", write_config(learning, tmp_path), "--run", "odd")
    finally:
        sys.path.remove(str(tmp_path))
    assert ended.status == 0, ended.err
    asks, trials, _ = trials_of(tmp_path / "results" / "odd")
    assert "learned_soup" not in asks
    assert "no gradient today" in trials[asks["learned_soup+start"]].failure_message


def test_bfloat16_models_learn_in_float32(family: Path, learning: dict[str, Any], tmp_path: Path) -> None:
    learning["cluster"]["dtype"] = "bfloat16"
    ended = meiosis("search", write_config(learning, tmp_path), "--run", "half")
    assert ended.status == 0, ended.err
    asks, trials, _ = trials_of(tmp_path / "results" / "half")
    start = trials[asks["learned_soup+start"]]
    assert start.metrics["soup/end"] < start.metrics["soup/start"]
    assert math.isfinite(trials[asks["learned_soup"]].loss or math.nan)


@pytest.mark.ray
def test_workers_on_ray_learn_the_same_soup(learning: dict[str, Any], tmp_path: Path, ray_session: object) -> None:
    meiosis("search", write_config(learning, tmp_path), "--run", "here")
    learning["cluster"] |= {"pool": "ray"}
    ended = meiosis("search", write_config(learning, tmp_path, "ray.yaml"), "--run", "ray")
    assert ended.status == 0, ended.err
    assert trials_of(tmp_path / "results" / "ray")[2] == trials_of(tmp_path / "results" / "here")[2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_learns_what_the_cpu_learns(family: Path) -> None:
    plan = LearnSoup(TERMS, steps=3, rate=0.1, temperature=False)
    here = Kitchen(family)
    there = Kitchen(family)
    there.live = build_live_model(family / "base", device="cuda", dtype="float32")
    there.evaluators = {**there.evaluators}
    for evaluator in there.evaluators.values():
        evaluator.prepare(Context(family / "base", device="cuda"))
    first, second = here.learn(plan), there.learn(plan)
    assert {key: pytest.approx(value, abs=2e-3) for key, value in first.items()} == second
