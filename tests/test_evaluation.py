"""The body of a worker: the bits of a candidate are its own, and what goes wrong is its outcome."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import end, meiosis, spawn, write_config
from family import DOMAINS, config_of
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes import PARAMETERS, models_of, recipe_of

from evaluators.base import EvaluatorSpec
from search.checkpoints.fingerprint import hash_tensors
from search.checkpoints.reading import CheckpointTensors, open_checkpoint
from search.errors import DeviceLostError
from search.evaluation import Evaluation, require_device
from search.local_pool import LocalPool
from search.merge.apply import Merger
from search.model_state import model_state
from search.pool import Job, Outcome, WorkerPlan
from search.recipe import Recipe
from search.seeds import seeded

pytestmark = pytest.mark.usefixtures("one_thread")


def perplexity(family: Path, name: str = "python") -> EvaluatorSpec:
    data = {pool: str(family / "data" / name / f"{pool}.jsonl") for pool in ("search", "select", "certify")}
    return EvaluatorSpec(name, "perplexity", {"data": data})


def plan_of(family: Path, *evaluators: EvaluatorSpec, dtype: str | None = None) -> WorkerPlan:
    return WorkerPlan(models_of(family), "base", evaluators, "cpu", dtype, threads=1)


def job(recipe: Recipe, candidate: int = 0) -> Job:
    return Job(candidate, recipe, "search", hash_weights=True)


def found(outcome: Outcome) -> tuple[object, ...]:
    """All of an outcome that the candidate decides."""
    assert outcome.failure is None, outcome.failure
    scores = {
        name: (s.items, s.weights.tobytes(), {metric: v.tobytes() for metric, v in s.values.items()})
        for name, s in outcome.scores.items()
    }
    return outcome.weights_sha256, dict(outcome.metrics), scores


def fresh(family: Path, recipe: Recipe, *evaluators: EvaluatorSpec) -> tuple[object, ...]:
    """The outcome of a recipe on a worker that has seen no other."""
    return found(Evaluation(plan_of(family, *evaluators)).run(job(recipe)))


# The bits of a candidate


@pytest.mark.parametrize("operator", PARAMETERS)
def test_a_candidate_is_the_same_after_others_as_on_a_new_worker(family: Path, operator: str) -> None:
    body = Evaluation(plan_of(family, perplexity(family)))
    a, b = recipe_of(family, operator), recipe_of(family, "linear", weight=0.9)
    first, other, again = (found(body.run(job(recipe, i))) for i, recipe in enumerate([a, b, a]))
    assert first == again == fresh(family, a, perplexity(family))
    assert other == fresh(family, b, perplexity(family))
    assert first[0] != other[0]


@pytest.fixture(scope="module")
def long_lived(family: Path) -> tuple[Evaluation, dict[tuple[str, str | None], tuple[Recipe, str]]]:
    """A worker, and recipes with the hash of their tensors, computed apart from any live model."""
    merger = Merger({name: CheckpointTensors(open_checkpoint(family / name)) for name in ("base", *DOMAINS)})
    recipes = {(o, d): recipe_of(family, o, d) for o in PARAMETERS for d in (None, "float16")}
    # The live model is float32: a recipe's dtype rounds, and its values are kept in float32.
    hashes = {
        key: hash_tensors({name: tensor.float() for name, tensor in merger.merge_tensors(recipe)})
        for key, recipe in recipes.items()
    }
    return Evaluation(plan_of(family)), {key: (recipes[key], hashes[key]) for key in recipes}


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_no_sequence_of_candidates_leaves_a_trace_in_the_next(long_lived: Any, data: st.DataObject) -> None:
    body, known = long_lived
    for key in data.draw(st.lists(st.sampled_from(list(known)), min_size=1, max_size=6)):
        recipe, expected = known[key]
        assert body.run(job(recipe)).weights_sha256 == expected


def test_the_hash_covers_the_tensors_and_only_where_it_is_asked_for(family: Path) -> None:
    body = Evaluation(plan_of(family))
    recipe = recipe_of(family, "task_arithmetic")
    assert body.run(Job(0, recipe, "search")).weights_sha256 is None
    hashes = {body.run(job(recipe_of(family, "task_arithmetic", weight=w))).weights_sha256 for w in (0.4, 0.401)}
    assert len(hashes) == 2


def test_a_parent_is_scored_as_the_parent_itself(family: Path) -> None:
    parent = Recipe.from_data(
        {
            "base": "base",
            "models": {name: ref.model_dump() for name, ref in models_of(family).items()},
            "rules": [{"operator": "linear", "sources": {"cpp": {"weight": 1.0}}}],
        }
    )
    outcome = Evaluation(plan_of(family, perplexity(family))).run(job(parent))
    assert outcome.weights_sha256 == models_of(family)["cpp"].sha256


# What goes wrong


CHANGES: dict[str, str] = {
    "writes in place": "[p.add_(1) for p in model.parameters()]",
    "writes through data": "[p.data.mul_(2) for p in model.parameters()]",
    "writes one number through data": "model.model.norm.weight.data[3] = 7",
    "exchanges rows through data": "w = model.lm_head.weight; w.data[[3, 9]] = w.data[[9, 3]]",
    "exchanges columns through data": "w = model.lm_head.weight; w.data.copy_(w.data.flip(1))",
    "changes two signs through data": "model.lm_head.weight.data[5, [1, 3]] *= -1",
    "gives parameters other memory": "model.lm_head.weight.data = model.lm_head.weight.data.clone()",
    "replaces a parameter": "model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)",
    "replaces a layer": "model.model.layers[0] = copy.deepcopy(model.model.layers[1])",
    "drops a layer": "del model.model.layers[1]",
    "rounds to half and back": "model.half(); model.float()",
}


def odd_function(folder: Path, body: str) -> tuple[EvaluatorSpec, Path]:
    """A `python` evaluator that does `body` while the returned file is there."""
    flag, path = folder / "flag", folder / "odd.py"
    path.write_text(
        "import copy, math, pathlib, sys\nimport torch\n"
        "def score(model):\n"
        f"    if pathlib.Path({str(flag)!r}).exists():\n"
        f"        {body}\n"
        "    return float(model.training)\n"
    )
    return EvaluatorSpec("odd", "python", {"function": f"{path}:score"}), flag


def outcomes(
    family: Path, folder: Path, body: str, prepare: Callable[[Path], None] = Path.touch
) -> tuple[Outcome, tuple[object, ...], tuple[object, ...]]:
    """The outcome with a fault, that of the next candidate, and the same on a worker that saw no fault."""
    odd, flag = odd_function(folder, body)
    evaluators = (odd, perplexity(family))
    worker = Evaluation(plan_of(family, *evaluators))
    recipe = recipe_of(family, "task_arithmetic")
    before = found(worker.run(job(recipe)))
    prepare(flag)
    bad = worker.run(job(recipe, 1))
    flag.unlink()
    after = found(worker.run(job(recipe, 2)))
    assert before == after
    # The same operator in some groups: what did not change between the two is not merged again.
    other = recipe_of(family, "task_arithmetic", weight=0.2)
    assert found(worker.run(job(other, 3))) == fresh(family, other, *evaluators)
    return bad, after, fresh(family, recipe, *evaluators)


@pytest.mark.parametrize("change", CHANGES)
def test_an_evaluator_that_changes_the_model_fails_and_the_next_candidate_is_right(
    change: str, family: Path, tmp_path: Path
) -> None:
    bad, after, expected = outcomes(family, tmp_path, CHANGES[change])
    assert bad.failure is not None
    assert bad.failure.kind == "error"
    assert "evaluator 'odd' changed the weights" in bad.failure.message
    assert not bad.scores
    assert not bad.metrics
    assert after == expected


@pytest.mark.parametrize("end", ["raise ValueError('no good')", "sys.exit(3)", "raise MemoryError"])
def test_an_evaluator_that_changes_the_model_and_breaks_off_leaves_no_trace(
    end: str, family: Path, tmp_path: Path
) -> None:
    change = "model.lm_head.weight.data = model.lm_head.weight.data + 1"
    bad, after, expected = outcomes(family, tmp_path, f"{change}; {end}")
    assert bad.failure is not None
    assert bad.failure.kind == ("out_of_memory" if "Memory" in end else "error")
    assert after == expected


def test_an_evaluator_that_raises_is_a_failure_with_its_message_and_traceback(family: Path, tmp_path: Path) -> None:
    bad, after, expected = outcomes(family, tmp_path, "raise ValueError('no good')")
    assert bad.failure is not None
    assert bad.failure.kind == "error"
    assert "odd.py:score raised ValueError: no good" in bad.failure.message
    assert "\n" not in bad.failure.message
    assert "Traceback" in bad.failure.detail
    assert after == expected


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_metric_that_is_not_finite_is_a_failure_that_names_it(value: str, family: Path, tmp_path: Path) -> None:
    bad, after, expected = outcomes(family, tmp_path, f"return float('{value}')")
    assert bad.failure is not None
    assert bad.failure.kind == "not_finite"
    assert bad.failure.message == f"odd.score is {value}"
    assert not bad.scores
    assert not bad.metrics
    assert after == expected


def test_weights_that_overflow_are_a_failure_not_finite(family: Path) -> None:
    plan = plan_of(family, perplexity(family), dtype="float16")
    body = Evaluation(plan)
    outcome = body.run(job(recipe_of(family, "task_arithmetic", weight=1e8)))
    assert outcome.failure is not None
    assert outcome.failure.kind == "not_finite"
    good = job(recipe_of(family, "task_arithmetic"))
    assert found(body.run(good)) == found(Evaluation(plan).run(good))


def test_an_evaluator_that_leaves_the_model_in_training_mode_does_not_reach_the_next_one(
    family: Path, tmp_path: Path
) -> None:
    odd, flag = odd_function(tmp_path, "model.train()")
    flag.touch()
    (tmp_path / "look.py").write_text("def score(model):\n    return float(model.training)\n")
    look = EvaluatorSpec("look", "python", {"function": f"{tmp_path / 'look.py'}:score"})
    body = Evaluation(plan_of(family, look, odd))
    for candidate in range(2):
        outcome = body.run(job(recipe_of(family, "linear"), candidate))
        assert outcome.metrics["look.score"] == 0.0
    body = Evaluation(plan_of(family, odd, look))
    assert body.run(job(recipe_of(family, "linear"))).metrics["look.score"] == 0.0


@pytest.mark.parametrize("name", ["TooFew", "Twice", "Nothing"])
def test_scores_of_other_items_than_asked_for_are_a_failure(name: str, family: Path) -> None:
    odd = EvaluatorSpec("odd", f"odd_evaluators:{name}")
    body = Evaluation(plan_of(family, odd))
    outcome = body.run(job(recipe_of(family, "linear")))
    assert outcome.failure is not None
    assert outcome.failure.kind == "error"
    assert "evaluator 'odd' scored" in outcome.failure.message
    assert "4 were asked for" in outcome.failure.message


def test_scores_in_chunks_and_another_order_are_joined(family: Path) -> None:
    body = Evaluation(plan_of(family, EvaluatorSpec("odd", "odd_evaluators:Whole")))
    outcome = body.run(job(recipe_of(family, "linear")))
    assert outcome.metrics == {"odd.one": 1.0}
    assert sorted(outcome.scores["odd"].items) == [f"search-{i}" for i in range(4)]


def test_a_recipe_that_does_not_fit_is_the_failure_of_its_candidate(family: Path) -> None:
    body = Evaluation(plan_of(family, perplexity(family)))
    good = recipe_of(family, "linear")
    bad = good.model_copy(update={"rules": (good.rules[0].model_copy(update={"tensors": ("lm_head*",)}),)})
    outcome = body.run(job(bad))
    assert outcome.failure is not None
    assert "no rule of the recipe matches" in outcome.failure.message
    assert found(body.run(job(good))) == fresh(family, good, perplexity(family))


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool)


def values_of(dtype: torch.dtype, count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 9, (count,), generator=generator).to(dtype)


def bits_of(tensor: torch.Tensor) -> object:
    """What `model_state` says of the bits of a tensor."""
    model = torch.nn.Module()
    model.register_buffer("values", tensor)
    return model_state(model)["values"][-1]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(DTYPES), st.sampled_from([1, 7, 300, 300_000]), st.integers(0, 9), st.data())
def test_any_other_order_or_sign_of_the_numbers_is_seen(
    dtype: torch.dtype, count: int, seed: int, data: st.DataObject
) -> None:
    before = values_of(dtype, count, seed)
    after = before.clone()
    first, second = (data.draw(st.integers(0, count - 1)) for _ in range(2))
    change = data.draw(st.sampled_from(["exchange", "reverse", "roll", "negate two", "negate all", "copy"]))
    if change == "exchange":
        after[[first, second]] = before[[second, first]]
    elif change == "reverse":
        after = before.flip(0)
    elif change == "roll":
        after = before.roll(first)
    elif change == "copy":
        after[first] = before[second]
    elif dtype != torch.bool:
        chosen = [first, second] if change == "negate two" else slice(None)
        after[chosen] = -before[chosen]
    same = torch.equal(before.view(torch.uint8), after.view(torch.uint8))  # 0 and -0 are equal, their bits are not
    assert (bits_of(before) == bits_of(after)) == same


def test_the_rows_of_an_identity_matrix_have_their_places() -> None:
    matrix = torch.eye(64)
    assert bits_of(matrix[[*range(1, 64), 0]]) != bits_of(matrix)


def test_the_bits_of_a_tensor_do_not_depend_on_where_it_lies_in_memory() -> None:
    memory = values_of(torch.bfloat16, 1001, 0)
    assert bits_of(memory[1:]) == bits_of(memory[1:].clone())
    matrix = values_of(torch.float32, 600, 1).view(20, 30)
    assert bits_of(matrix.T) == bits_of(matrix.T.contiguous())
    assert bits_of(torch.empty(0)) == bits_of(torch.empty(0, 3))


def test_the_base_must_be_in_the_live_model_as_it_is_in_its_files(family: Path) -> None:
    """In all dtypes that a live model can have."""
    for dtype in (None, "float16", "bfloat16", "float64"):
        assert Evaluation(plan_of(family, dtype=dtype)).run(job(recipe_of(family, "linear"))).failure is None


class _Lost:
    """The body of a worker whose device fails."""

    def __init__(self, plan: WorkerPlan) -> None:
        pass

    def run(self, job: Job) -> Outcome:
        raise DeviceLostError("cuda:0 fails whatever it is asked")


def test_a_lost_device_is_not_the_failure_of_a_candidate(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lost_device", sys.modules[__name__])
    with LocalPool(plan_of(family), body="lost_device:_Lost") as pool:
        pool.submit(job(recipe_of(family, "linear")))
        with pytest.raises(DeviceLostError):
            pool.wait()


def test_a_processor_is_never_lost() -> None:
    require_device("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_assertion_on_the_device_ends_the_process(family: Path, tmp_path: Path) -> None:
    """In a process of its own: its device is of no use afterwards."""
    odd, flag = odd_function(tmp_path, "torch.zeros(1, device='cuda')[torch.tensor([9], device='cuda')].cpu()")
    flag.touch()
    arguments = (plan_of(family, odd, perplexity(family)), job(recipe_of(family, "linear")))
    (tmp_path / "arguments").write_bytes(pickle.dumps((replace(arguments[0], device="cuda"), arguments[1])))
    program = (
        "import pickle, sys\nfrom pathlib import Path\nfrom search.evaluation import Evaluation\n"
        "plan, job = pickle.loads(Path(sys.argv[1]).read_bytes())\nEvaluation(plan).run(job)\n"
    )
    ended = end(spawn(tmp_path / "arguments", code=program))
    assert ended.status == 1
    assert "DeviceLostError: cuda fails whatever it is asked" in ended.err


# In a search


def test_a_search_goes_on_over_failures_and_records_them(family: Path, tmp_path: Path) -> None:
    """Every second merge fails, in one of three ways; the parents do not."""
    from safetensors.torch import load_file

    sums = [
        float(load_file(family / name / "model.safetensors")["lm_head.weight"].double().sum())
        for name in ("base", *DOMAINS)
    ]
    path = tmp_path / "moody.py"
    path.write_text(
        "import hashlib\n"
        "def score(model):\n"
        "    total = float(model.lm_head.weight.double().sum())\n"
        f"    if total in {sums!r}:\n        return 0.0\n"
        "    mood = hashlib.sha256(repr(total).encode()).digest()[0] % 6\n"
        "    if mood == 0:\n        return float('nan')\n"
        "    if mood == 1:\n        raise ValueError('not in the mood')\n"
        "    if mood == 2:\n        model.lm_head.weight.data.zero_()\n"
        "    return float(mood)\n"
    )
    config = config_of(family, tmp_path / "runs")
    config["evaluators"] = {
        "moody": {"use": "python", "function": f"{path}:score"},
        "python": config["evaluators"]["python"],
    }
    config["objectives"] = ["python.nll"]
    config["search"] |= {"budget": 30, "baselines": []}
    file = write_config(config, tmp_path)
    ended = meiosis("search", file, "--run", "moody")
    assert ended.status == 0, ended.err
    status = meiosis("status", tmp_path / "runs" / "moody", "--json").json
    assert status["state"] == "finished"
    assert status["done"] == 30
    messages = " ".join(status["failures"])
    for text in ("not_finite: moody.score is nan", "ValueError: not in the mood", "'moody' changed the weights"):
        assert text in messages
    shown = meiosis("status", tmp_path / "runs" / "moody").out
    assert "not in the mood" in shown
    again = meiosis("search", file, "--run", "again")
    assert again.out.replace("again", "moody") == ended.out


def test_what_an_evaluator_draws_does_not_depend_on_what_ran_before(family: Path, tmp_path: Path) -> None:
    """Global generators of torch, NumPy and Python, as users' functions use them."""

    def draws() -> tuple[float, float, float]:
        import random

        return float(torch.rand(())), float(np.random.rand()), random.random()

    with seeded(3):
        first = draws()
    outside = float(torch.rand(()))
    with seeded(3):
        second = draws()
    assert first == second
    assert float(torch.rand(())) != outside


def test_a_seeded_block_leaves_the_random_state_as_it_was() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with seeded(9):
        torch.rand(5)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_seeded_block_draws_the_same_on_its_device_and_leaves_that_as_it_was() -> None:
    torch.cuda.manual_seed(1)
    expected = torch.rand(3, device="cuda")
    torch.cuda.manual_seed(1)
    draws = []
    for _ in range(2):
        with seeded(9, "cuda"):
            draws.append(torch.rand(5, device="cuda"))
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(torch.rand(3, device="cuda"), expected)
