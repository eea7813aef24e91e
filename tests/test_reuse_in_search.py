"""Reuse of hidden states where searches use it: by evaluators, workers, pools and the history."""

from __future__ import annotations

import json
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from command_line import write_config
from family import DOMAINS
from recipes import models_of, recipe_of

from cluster.jobs import JobBook
from cluster.pool import RayPool
from evaluators.base import EvaluatorSpec
from search.config import load_config
from search.evaluation import Evaluation
from search.genome import Genome
from search.local_pool import LocalPool
from search.memory import Needs, Node, plan_memory
from search.memory_sizes import REUSE_BYTES
from search.pool import Job, Outcome, Pool, WorkerPlan
from search.prefix.affinity import Prefixes, Recent
from search.prefix.contents import contents_of
from search.setup import Setup, check
from search.worker_plan import with_room, worker_plan

if TYPE_CHECKING:
    from cluster.local_ray import Session

GIB = 2**30
pytestmark = pytest.mark.usefixtures("one_thread")


def setup_of(folder: Path, config: dict[str, Any]) -> Setup:
    return check(load_config(write_config(config, folder)))


def children(setup: Setup, count: int, parents: int = 4, seed: int = 0) -> list[Job]:
    """Jobs of random parents, and of children with the first genes of one of those before and the rest of another."""
    rng, genes = random.Random(seed), len(setup.space.genes)
    found = [tuple(rng.random() for _ in range(genes)) for _ in range(parents)]
    while len(found) < count:
        one, other = rng.sample(found, 2)
        split = rng.randrange(1, genes)
        found.append(one[:split] + other[split:])
    prefixes = Prefixes(tensor for group in setup.space.groups for tensor in group.tensors)
    recipes = [setup.space.decode(Genome(coordinates)) for coordinates in found]
    return [Job(number, recipe, "search", prefix=prefixes.of(recipe)) for number, recipe in enumerate(recipes)]


def decided(outcome: Outcome) -> tuple[object, ...]:
    assert outcome.failure is None, outcome.failure
    scores = {
        name: (block.items, {metric: values.tobytes() for metric, values in block.values.items()})
        for name, block in outcome.scores.items()
    }
    return outcome.candidate, dict(outcome.metrics), scores


def questions(folder: Path) -> EvaluatorSpec:
    """Multiple choice, with questions whose texts have several lengths."""
    data = {}
    for pool in ("search", "select", "certify"):
        path = folder / f"{pool}.jsonl"
        lines = [
            json.dumps(
                {
                    "id": f"{pool}-{n}",
                    "context": f"def {pool}_{n}(x):{' pass' * (n % 3)}",
                    "choices": ["return", "x"],
                    "answer": 0,
                }
            )
            for n in range(5)
        ]
        path.write_text("\n".join(lines) + "\n")
        data[pool] = str(path)
    return EvaluatorSpec("questions", "multiple_choice", {"data": data})


def own(folder: Path, *lines: str) -> EvaluatorSpec:
    """A function of a user's, with these lines as its body."""
    function = folder / "own.py"
    body = "".join(f"    {line}\n" for line in lines)
    function.write_text(f"import pathlib, torch\ndef score(model):\n{body}")
    return EvaluatorSpec("own", "python", {"function": f"{function}:score"})


def plan_with(setup: Setup, *more: EvaluatorSpec) -> WorkerPlan:
    """The plan of a setup with more evaluators."""
    plan = worker_plan(setup)
    return replace(plan, evaluators=(*plan.evaluators, *more))


def test_several_evaluators_score_as_on_a_worker_that_keeps_nothing(
    family: Path, tmp_path: Path, family_config: dict[str, Any]
) -> None:
    generating = own(
        tmp_path,
        "ids = torch.arange(8)[None]",
        "out = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)",
        "return float(out.sum() + model(input_ids=ids, labels=ids).loss)",
    )
    setup = setup_of(tmp_path, family_config)
    plan = plan_with(setup, questions(tmp_path), generating)
    jobs = children(setup, 10)
    cold, warm = Evaluation(plan), Evaluation(replace(plan, reuse_bytes=GIB))
    run = reused = 0
    for job in jobs:
        expected, found = cold.run(job), warm.run(job)
        assert decided(found) == decided(expected)
        assert expected.layers_reused == 0
        run, reused = run + found.layers_run, reused + found.layers_reused
    assert reused > run / 8
    # Nothing to merge and no layer to run but for the evaluator that generates.
    again = warm.run(jobs[-1])
    assert decided(again) == decided(cold.run(jobs[-1]))
    assert again.bytes_read == 0
    only_own = Evaluation(replace(plan, evaluators=(generating,))).run(jobs[-1])
    assert again.layers_run == only_own.layers_run


def test_out_of_memory_with_states_of_others_is_tried_again_without_them(family: Path, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    flagged = own(
        tmp_path,
        f"flag = pathlib.Path({str(flag)!r})",
        "if flag.exists():",
        "    flag.unlink()",
        "    raise MemoryError('no room')",
        "return 1.0",
    )
    data = {pool: str(family / "data" / "python" / f"{pool}.jsonl") for pool in ("search", "select", "certify")}
    specs = (EvaluatorSpec("p", "perplexity", {"data": data}), flagged)
    plan = WorkerPlan(models_of(family), "base", specs, "cpu", reuse_bytes=GIB)
    worker = Evaluation(plan)
    job = Job(0, recipe_of(family, "task_arithmetic"), "search")
    first = worker.run(job)
    flag.touch()
    assert decided(worker.run(job)) == decided(first)
    flag.touch()
    worker.run(job)
    plain = Evaluation(replace(plan, reuse_bytes=0))
    flag.touch()
    failed = plain.run(job)
    assert failed.failure is not None
    assert failed.failure.kind == "out_of_memory", "there was nothing that it could let go of"


# What the driver sees


def test_the_driver_sees_the_same_beginnings_as_the_worker(
    tmp_path: Path, family: Path, family_config: dict[str, Any]
) -> None:
    setup = setup_of(tmp_path, family_config)
    worker = Evaluation(worker_plan(setup))
    places: Any = {}
    for name in worker._names:
        inside = name.startswith("model.layers.")
        places[name] = int(name.split(".")[2]) if inside else "before" if "embed" in name else "after"
    jobs = children(setup, 14)
    chains = [contents_of(worker._merger.fingerprints(job.recipe, worker._targets), places, 2).chain() for job in jobs]
    for one, chain in zip(jobs, chains, strict=True):
        assert len(one.prefix) == len(chain) == 3
        for other, theirs in zip(jobs, chains, strict=True):
            assert [a == b for a, b in zip(one.prefix, other.prefix, strict=True)] == [
                a == b for a, b in zip(chain, theirs, strict=True)
            ]
    lengths = {sum(a == b for a, b in zip(jobs[0].prefix, job.prefix, strict=True)) for job in jobs[1:]}
    assert lengths >= {0, 3} or lengths >= {1, 2}


def test_prefixes_of_a_large_model_cost_the_driver_little(tmp_path: Path, family_config: dict[str, Any]) -> None:
    from search.config import SpaceConfig
    from search.recipe import ModelRef
    from search.space import make_space

    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "norm")
    names = ["model.embed_tokens.weight", *(f"model.layers.{n}.{part}.weight" for n in range(32) for part in parts)]
    models = {name: ModelRef(path=name) for name in ("base", *DOMAINS)}
    config = SpaceConfig(operator="task_arithmetic", layers_per_group=1)
    space = make_space(config, tensors=names, models=models, sources=DOMAINS)
    recipes = [space.decode(Genome((x,) * len(space.genes))) for x in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)]
    prefixes = Prefixes(names)
    prefixes.of(recipes[0])
    times = []
    for recipe in recipes:
        began = time.perf_counter()
        assert len(prefixes.of(recipe)) == 33
        times.append(time.perf_counter() - began)
    assert min(times) < 0.002


def test_a_worker_gets_the_job_that_suits_it_and_none_is_overtaken_twice(family: Path) -> None:
    recipe = recipe_of(family, "task_arithmetic")
    book = JobBook()
    for number, prefix in enumerate([(1, 2), (3, 4), (5, 6), (3, 4), (3, 7)]):
        book.add(Job(number, recipe, "search", prefix=prefix))
    recent = Recent()
    recent.add((3, 4))
    order = []
    while (entry := book.next_for(lambda _: True, recent.shared)) is not None:
        order.append(entry.job.candidate)
    assert order == [1, 0, 3, 2, 4]
    for number in range(3):
        book.add(Job(10 + number, recipe, "search"))
    entries = [book.next_for(lambda _: True, recent.shared) for _ in range(3)]
    assert [entry.job.candidate for entry in entries if entry] == [10, 11, 12], "nothing is known of these"


def through(pool: Pool, jobs: list[Job], window: int) -> list[Outcome]:
    """The outcomes of jobs of which so many are in the pool at a time, in their order."""
    waiting, found = list(reversed(jobs)), dict[int, Outcome]()
    end, inside = time.monotonic() + 200, 0
    while len(found) < len(jobs):
        assert time.monotonic() < end
        while waiting and inside < window:
            pool.submit(waiting.pop())
            inside += 1
        for outcome in pool.wait(1.0):
            found[outcome.candidate] = outcome
            inside -= 1
    return [found[job.candidate] for job in jobs]


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_two_workers_reuse_nearly_as_much_as_one_with_the_same_scores(
    ray_session: Session, tmp_path: Path, family: Path, family_config: dict[str, Any]
) -> None:
    setup = setup_of(tmp_path, family_config)
    plan = replace(worker_plan(setup), reuse_bytes=GIB)
    jobs = children(setup, 100, parents=5)
    with LocalPool(plan) as local:
        alone = through(local, jobs, 4)
    folder = tmp_path / "workers"
    folder.mkdir()
    with RayPool(plan, workers=2, working_folder=folder) as pool:
        pool.ready()
        together = through(pool, jobs, 4)
    assert [decided(outcome) for outcome in together] == [decided(outcome) for outcome in alone]
    assert len({outcome.worker for outcome in together}) == 2
    share = [
        sum(o.layers_reused for o in found) / sum(o.layers_run + o.layers_reused for o in found)
        for found in (alone, together)
    ]
    assert share[0] > 0.25
    assert share[1] > 0.7 * share[0], share


# Memory


def test_states_get_half_of_what_is_left_and_what_the_config_says_is_planned(
    tmp_path: Path, family_config: dict[str, Any]
) -> None:
    needs = Needs(sources=GIB, live=GIB, activations=0, merging=0, learning=0, on_gpu=False)
    left = plan_memory(needs, [Node("a", 2 * needs.host + GIB + 4 * GIB)], 2).reuse
    assert left == GIB
    assert plan_memory(needs, [Node("a", 100 * GIB)], 1).reuse == REUSE_BYTES
    assert plan_memory(needs, [Node("a", needs.host)], 1).reuse == 0
    asked = replace(needs, reuse=3 * GIB)
    assert asked.host == needs.host + 3 * GIB
    assert plan_memory(asked, [Node("a", 100 * GIB)], 1).reuse == 3 * GIB
    on_gpu = replace(needs, on_gpu=True)
    assert replace(asked, on_gpu=True).gpu == on_gpu.gpu + 3 * GIB
    assert plan_memory(on_gpu, [Node("a", 100 * GIB, (on_gpu.gpu + 2 * GIB,))], 1, 1.0).reuse == GIB
    for cluster, expected in (({}, left), ({"reuse_gib": 0}, 0), ({"reuse_gib": 0.5}, GIB // 2)):
        config = {**family_config, "cluster": {**family_config["cluster"], **cluster}}
        setup = setup_of(tmp_path, config)
        memory = plan_memory(needs, [Node("a", 2 * needs.host + GIB + 4 * GIB)], 2)
        assert with_room(worker_plan(setup), setup, memory).reuse_bytes == expected
