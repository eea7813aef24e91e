"""The walk over a recipe: what is written, what is left alone, what is refused."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from search.errors import CheckpointError, RecipeError
from search.merge.apply import Merger
from search.merge.check import check_recipe
from search.merge.sources import InMemoryTensors
from search.recipe import Recipe

torch.set_num_threads(1)

Models = dict[str, dict[str, Tensor]]


def models(size: int = 3000) -> Models:
    generator = torch.Generator().manual_seed(0)
    return {
        model: {name: torch.randn(size, generator=generator) for name in ("x", "y", "z")}
        for model in ("base", "a", "b")
    }


def merger(tensors: Models, **options: Any) -> Merger:
    return Merger({name: InMemoryTensors(model) for name, model in tensors.items()}, **options)


def recipe(rules: list[dict[str, Any]] | None = None, **changes: Any) -> Recipe:
    rule = {"operator": "task_arithmetic", "sources": {"a": {"weight": 0.5}, "b": {"weight": 0.25}}}
    data = {"base": "base", "models": {name: {"path": name} for name in ("base", "a", "b")}}
    return Recipe.from_data({**data, "rules": rules or [rule], **changes})


def average(weight: float, tensor: str = "*") -> dict[str, Any]:
    sources = {"a": {"weight": weight}, "b": {"weight": 1.0}}
    return {"tensors": [tensor], "operator": "linear", "sources": sources}


def blank(tensors: Models) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors["base"].items()}


def result(tensors: Models, wanted: Recipe) -> dict[str, Tensor]:
    return dict(merger(tensors).merge_tensors(wanted))


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


# --- only what changed


def test_tensors_whose_rule_did_not_change_are_left_alone() -> None:
    tensors = models()
    engine, targets = merger(tensors), blank(tensors)
    first = recipe([average(0.5, "x"), average(0.5)])
    stats = engine.merge_into(first, targets)
    assert (stats.written, stats.skipped) == (3, 0)
    assert stats.bytes_read == 3 * 2 * 3000 * 4
    second = recipe([average(0.75, "x"), average(0.5)])
    stats = engine.merge_into(second, targets)
    assert (stats.written, stats.skipped) == (1, 2)
    assert same(targets, result(tensors, second))
    stats = engine.merge_into(second, targets)
    assert (stats.written, stats.skipped, stats.bytes_read) == (0, 3, 0)
    # Written out or by default, the parameters are the same.
    said = recipe([{**average(0.75, "x"), "parameters": {"normalize": True}}, average(0.5, "[yz]")])
    assert engine.merge_into(said, targets).written == 0


def test_after_invalidate_everything_is_written() -> None:
    tensors = models()
    engine, targets = merger(tensors), blank(tensors)
    engine.merge_into(recipe(), targets)
    engine.invalidate()
    assert engine.merge_into(recipe(), targets).written == 3


def test_a_target_that_somebody_wrote_to_is_merged_again() -> None:
    tensors = models()
    engine, targets = merger(tensors), blank(tensors)
    engine.merge_into(recipe(), targets)
    targets["y"][3] += 1.0
    assert engine.merge_into(recipe(), targets).written == 1
    assert same(targets, result(tensors, recipe()))


def test_other_targets_are_never_taken_for_those_of_the_last_merge() -> None:
    tensors = models()
    engine = merger(tensors)
    for _ in range(5):
        targets = blank(tensors)  # may well lie where the last ones were
        assert engine.merge_into(recipe(), targets).written == 3
        assert same(targets, result(tensors, recipe()))
        del targets


def test_views_of_one_parameter_are_told_apart_and_left_alone_together() -> None:
    tensors = models(64)
    fused = torch.zeros(3, 8, 8)
    targets = {name: fused[index].reshape(-1) for index, name in enumerate("xyz")}
    engine = merger(tensors)
    assert engine.merge_into(recipe(), targets).written == 3
    assert engine.merge_into(recipe(), targets).written == 0
    wanted = result(tensors, recipe())
    assert torch.equal(fused.view(3, -1), torch.stack([wanted[name] for name in "xyz"]))


class Breaking(InMemoryTensors):
    """A model whose files can be lost for a while."""

    lost = ""

    def get(self, name: str) -> Tensor:
        if name == self.lost:
            raise CheckpointError(f"tensor '{name}' cannot be read")
        return super().get(name)


def test_a_merge_that_failed_half_way_is_not_trusted() -> None:
    tensors = models()
    sources = {name: Breaking(model) for name, model in tensors.items()}
    engine, targets = Merger(sources), blank(tensors)
    engine.merge_into(recipe(), targets)
    sources["b"].lost = "y"
    with pytest.raises(CheckpointError):
        engine.merge_into(recipe([average(0.5)]), targets)
    sources["b"].lost = ""
    assert engine.merge_into(recipe(), targets).written == 2  # z was never reached
    assert same(targets, result(tensors, recipe()))


def test_the_seed_is_part_of_a_rule_only_where_masks_are_drawn() -> None:
    tensors = models()
    engine, targets = merger(tensors), blank(tensors)
    dare = {"operator": "dare_linear", "sources": {"a": {"weight": 1.0, "density": 0.5}}}
    rules = [{**dare, "tensors": ["x"]}, average(0.5)]
    engine.merge_into(recipe(rules, seed=1), targets)
    assert engine.merge_into(recipe(rules, seed=2), targets).written == 1
    assert same(targets, result(tensors, recipe(rules, seed=2)))


@given(
    steps=st.lists(
        st.tuples(st.sampled_from("xyz"), st.sampled_from(["linear", "ties", "dare_ties"]), st.integers(0, 8)),
        min_size=1,
        max_size=6,
    )
)
@settings(max_examples=15, deadline=None)
def test_candidates_that_change_some_tensors_have_the_bits_of_merges_from_nothing(
    steps: list[tuple[str, str, int]],
) -> None:
    tensors = models(1500)
    engine, targets = merger(tensors), blank(tensors)
    rules = {name: average(0.5, name) for name in "xyz"}
    engine.merge_into(recipe(list(rules.values())), targets)
    for name, operator, value in steps:
        values: dict[str, float] = {"weight": 0.1 + value / 8}
        if operator != "linear":
            values["density"] = value / 8
        changed = {"tensors": [name], "operator": operator, "sources": {"a": values, "b": {"weight": 0.3}}}
        differs = changed != rules[name]
        rules[name] = changed
        candidate = recipe(list(rules.values()))
        assert engine.merge_into(candidate, targets).written == int(differs)
        assert same(targets, result(tensors, candidate))


def test_memory_that_a_parameter_was_given_since_is_written() -> None:
    tensors = models()
    engine = merger(tensors)
    targets = {name: torch.nn.Parameter(tensor) for name, tensor in blank(tensors).items()}
    engine.merge_into(recipe(), targets)
    targets["y"].data = torch.zeros(3000)
    assert engine.merge_into(recipe(), targets).written == 1
    assert torch.equal(targets["y"].detach(), result(tensors, recipe())["y"])


def test_values_of_another_type_are_not_taken_for_those_of_an_earlier_recipe() -> None:
    tensors = models()
    engine, targets = merger(tensors), blank(tensors)
    engine.merge_into(recipe([{**average(0.5), "parameters": {"normalize": True}}]), targets)
    with pytest.raises(RecipeError, match="found 1, expected true or false"):
        engine.merge_into(recipe([{**average(0.5), "parameters": {"normalize": 1}}]), targets)


# --- where it is written


def test_a_recipe_dtype_rounds_even_into_wider_targets() -> None:
    tensors = models()
    targets = blank(tensors)
    merger(tensors).merge_into(recipe(dtype="bfloat16"), targets)
    for name, tensor in result(tensors, recipe()).items():
        assert torch.equal(targets[name], tensor.bfloat16().float())


def test_some_of_the_tensors_may_be_merged() -> None:
    tensors = models()
    rules = [average(0.5, "x"), average(2.0)]  # the rule for x is fine although x is not asked for
    targets = {"y": torch.zeros(3000)}
    assert merger(tensors).merge_into(recipe(rules), targets).written == 1
    assert torch.equal(targets["y"], result(tensors, recipe(rules))["y"])
    assert [name for name, _ in merger(tensors).merge_tensors(recipe(rules), ["z", "x"])] == ["z", "x"]


def test_parameters_that_require_gradients_can_be_targets() -> None:
    tensors = models()
    targets = {name: torch.nn.Parameter(tensor) for name, tensor in blank(tensors).items()}
    merger(tensors).merge_into(recipe(), targets)
    assert same({name: p.detach() for name, p in targets.items()}, result(tensors, recipe()))


def test_counters_are_copied_where_all_inputs_agree_and_refused_where_not() -> None:
    tensors = models()
    for model in tensors.values():
        model["steps"] = torch.tensor(7)
        model["mask"] = torch.tensor([True, False])
    targets = blank(tensors)
    merger(tensors).merge_into(recipe(), targets)
    assert targets["steps"].item() == 7
    assert targets["mask"].tolist() == [True, False]
    tensors["b"]["steps"] = torch.tensor(8)
    with pytest.raises(RecipeError, match="tensor 'steps' is int64 and differs between 'a' and 'b'"):
        merger(tensors).merge_into(recipe(), blank(tensors))
    own = {"tensors": ["steps"], "operator": "linear", "sources": {"b": {"weight": 1.0}}}
    assert result(tensors, recipe([own, average(1.0)]))["steps"].item() == 8


# --- refused


def test_fp8_is_refused_by_name() -> None:
    tensors = models()
    tensors["b"]["y"] = tensors["b"]["y"].to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match="tensor 'y' of model 'b' is stored as float8_e4m3fn"):
        merger(tensors).merge_into(recipe(), blank(tensors))


def test_other_shapes_are_refused_by_name() -> None:
    tensors = models()
    tensors["b"]["y"] = torch.zeros(3001)
    with pytest.raises(CheckpointError, match=r"tensor 'y' of model 'b' has shape \[3001\], expected \[3000\]"):
        merger(tensors).merge_into(recipe(), blank(tensors))


def test_a_tensor_that_a_source_lacks_is_refused_by_name() -> None:
    tensors = models()
    del tensors["b"]["y"]
    with pytest.raises(RecipeError, match="model 'b' has no tensor 'y'"):
        merger(tensors).merge_into(recipe(), blank(tensors))


def test_targets_that_the_donor_lacks_are_refused_by_name() -> None:
    tensors = models()
    with pytest.raises(RecipeError, match=r"model 'base' has no tensor 'layer\.x'"):
        merger(tensors).merge_into(recipe(), {"layer.x": torch.zeros(3000)})


def test_models_that_were_not_opened_are_refused_by_name() -> None:
    tensors = models()
    del tensors["b"]
    with pytest.raises(RecipeError, match="no model called 'b' was opened"):
        merger(tensors).merge_into(recipe(), blank(tensors))


def test_weights_other_than_the_recipe_was_made_from_are_refused() -> None:
    tensors = models()
    engine = merger(tensors, identity={"a": "1" * 64, "b": "2" * 64, "base": "3" * 64})
    pinned = {name: {"path": name, "sha256": "3" * 64} for name in ("base", "b")}
    with pytest.raises(RecipeError, match=r"models\.b\.sha256: the recipe wants the weights 333333333333"):
        engine.merge_into(recipe(models={**pinned, "a": {"path": "a"}}), blank(tensors))


A = {"a": {"weight": 1.0}}


@pytest.mark.parametrize(
    ("rule", "changes", "message"),
    [
        (
            {"operator": "tie", "sources": A},
            {},
            "rules[0].operator: unknown operator 'tie'; did you mean 'ties'?",
        ),
        (
            {"operator": "ties", "sources": {"a": {"weight": 1.0, "densty": 0.5}}},
            {},
            "rules[0].sources.a.densty: operator 'ties' has no such parameter; did you mean 'density'?",
        ),
        (
            {"operator": "ties", "sources": A, "parameters": {"normalise": True}},
            {},
            "rules[0].parameters.normalise: operator 'ties' has no such parameter; did you mean 'normalize'?",
        ),
        ({"operator": "ties", "sources": {"a": {"weight": True}}}, {}, "found True, expected a number"),
        ({"operator": "ties", "sources": {"a": {"weight": "1.0x"}}}, {}, "found '1.0x', expected a number"),
        ({"operator": "ties", "sources": {"a": {"weight": float("inf")}}}, {}, "expected a finite number"),
        (
            {"operator": "linear", "sources": A, "parameters": {"normalize": 1}},
            {},
            "found 1, expected true or false",
        ),
        (
            {"operator": "ties", "sources": {"a": {"weight": 1.0, "density": 1.5}}},
            {},
            "rules[0].sources.a.density: found 1.5, expected a value from 0 to 1",
        ),
        ({"operator": "linear", "sources": {"a": {}}}, {}, "operator 'linear' needs a value for 'weight'"),
        ({"operator": "slerp", "sources": {"a": {}, "b": {}}}, {}, "operator 'slerp' needs a value for 't'"),
        (
            {"operator": "slerp", "sources": {"a": {}}, "parameters": {"t": 0.5}},
            {},
            "operator 'slerp' takes exactly 2, found 1",
        ),
        (
            {"operator": "slerp", "sources": {"a": {}, "b": {}, "base": {}}, "parameters": {"t": 0.5}},
            {},
            "operator 'slerp' takes exactly 2, found 3",
        ),
        ({"operator": "ties", "sources": A}, {"base": None}, "operator 'ties' takes differences from a base"),
        ({"operator": "ties", "sources": {"base": {"weight": 1.0}}}, {}, "'base' is the base"),
        (
            {"operator": "slerp", "sources": {"a": {"t": 0.5}, "b": {}}},
            {},
            "rules[0].sources.a.t: is shared by all sources; write it under rules[0].parameters",
        ),
        ({"operator": "linear", "sources": A}, {"dtype": "bfloat"}, "did you mean 'bfloat16'?"),
        ({"operator": "linear", "sources": A}, {"dtype": "int8"}, "dtype: 'int8' is not one of float32"),
    ],
)
def test_a_recipe_that_its_operators_cannot_carry_out_is_refused_in_one_line(
    rule: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        check_recipe(recipe([rule], **changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_parameter_of_the_sources_may_be_given_once_for_all() -> None:
    tensors = models()
    short = {"operator": "linear", "sources": {"a": {}, "b": {"weight": 3.0}}, "parameters": {"weight": 1.0}}
    long = {"operator": "linear", "sources": {"a": {"weight": 1.0}, "b": {"weight": 3.0}}}
    assert same(result(tensors, recipe([short])), result(tensors, recipe([long])))


# --- prepared once per node


SLERP = {"operator": "slerp", "sources": {"a": {}, "b": {}}, "parameters": {"t": 0.3}}
TIES = {
    "operator": "ties",
    "sources": {"a": {"weight": 1.0, "density": 0.3}, "b": {"weight": 1.0, "density": 0.9}},
}


def _merge_with_files(folder: str, results: Any) -> None:
    torch.set_num_threads(1)
    tensors = models(70_000)
    engine = merger(tensors, prepared_folder=Path(folder), identity={name: name for name in tensors})
    for rule in (SLERP, TIES):
        for name, tensor in engine.merge_tensors(recipe([rule])):
            results.put((os.getpid(), str(rule["operator"]), name, float(tensor.double().sum())))


def test_processes_that_start_together_share_what_is_prepared(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results: Any = context.Queue()
    workers = [context.Process(target=_merge_with_files, args=(str(tmp_path), results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in range(3 * 2 * 3)]
    for worker in workers:
        worker.join()
    assert len({pid for pid, *_ in found}) == 3
    assert len({tuple(rest) for _, *rest in found}) == 2 * 3
    # SLERP prepares per pair, TIES per source, so that subsets of the sources find theirs.
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert not list(tmp_path.glob("*.part"))


def test_a_prepared_file_that_was_cut_short_is_made_again(tmp_path: Path) -> None:
    tensors = models()
    options: dict[str, Any] = {"prepared_folder": tmp_path, "identity": {name: name for name in tensors}}
    wanted = dict(merger(tensors, **options).merge_tensors(recipe([SLERP])))
    (path,) = tmp_path.glob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert same(dict(merger(tensors, **options).merge_tensors(recipe([SLERP]))), wanted)
    assert path.read_bytes() == whole


def test_prepared_files_of_other_weights_are_not_mistaken(tmp_path: Path) -> None:
    tensors = models()
    first = merger(tensors, prepared_folder=tmp_path, identity={"a": "1", "b": "2"})
    dict(first.merge_tensors(recipe([SLERP])))
    tensors["b"] = {name: tensor.flip(0) for name, tensor in tensors["b"].items()}
    second = merger(tensors, prepared_folder=tmp_path, identity={"a": "1", "b": "3"})
    assert same(dict(second.merge_tensors(recipe([SLERP]))), result(tensors, recipe([SLERP])))


def test_models_without_a_known_hash_leave_no_files(tmp_path: Path) -> None:
    tensors = models()
    engine = merger(tensors, prepared_folder=tmp_path, identity={"a": "1"})
    assert same(dict(engine.merge_tensors(recipe([SLERP]))), result(tensors, recipe([SLERP])))
    assert not list(tmp_path.iterdir())
