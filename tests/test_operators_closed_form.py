"""The closed-form operators compute what their papers say: against NumPy in float64 and cases worked by hand."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from closed_form_cases import (
    DECOMPOSING,
    MERGING,
    SHAPES,
    Array,
    close,
    merged,
    normal,
    orthonormal,
    polar,
    recipe_of,
    tasks_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from search.errors import RecipeError
from search.merge.apply import Merger
from search.merge.sources import InMemoryTensors
from search.recipe import Recipe

torch.set_num_threads(1)


# TSV-M


@settings(max_examples=20, deadline=None)
@given(SHAPES, st.integers(1, 4), st.integers(0, 10**6))
def test_tsv_m_is_the_product_of_the_polar_factors_of_the_cut_singular_vectors(
    shape: tuple[int, int], count: int, seed: int
) -> None:
    tasks = tasks_of(count, shape, seed)
    parts = [np.linalg.svd(task.numpy(), full_matrices=False) for task in tasks]
    kept = min(shape) // count
    left = polar(np.concatenate([u[:, :kept] for u, _, _ in parts], 1))
    right = polar(np.concatenate([v[:kept] for _, _, v in parts]).T).T
    values = np.concatenate([s[:kept] for _, s, _ in parts])
    np.testing.assert_allclose(merged("tsv_m", tasks).numpy(), left * values @ right, rtol=1e-6, atol=1e-6)


def test_tsv_m_of_low_rank_tasks_in_orthogonal_directions_is_their_sum() -> None:
    left, right = orthonormal(12, 6, 1), orthonormal(9, 6, 2)
    tasks = [left[:, 2 * i : 2 * i + 2] @ normal(2, 2, seed=i) @ right[:, 2 * i : 2 * i + 2].T for i in range(3)]
    close(merged("tsv_m", tasks), sum(tasks))


def test_tsv_m_weights_and_lambda_scale_the_tasks_after_they_were_made_orthogonal() -> None:
    tasks = tasks_of(3, (9, 10))
    alone = [merged("tsv_m", tasks, per_source=[{"weight": float(i == j)} for j in range(3)]) for i in range(3)]
    found = merged("tsv_m", tasks, per_source=[{"weight": w} for w in (0.5, -1.0, 2.0)], **{"lambda": 0.3})
    close(found, 0.3 * (0.5 * alone[0] - alone[1] + 2 * alone[2]))


def test_tsv_m_of_equal_tasks_is_the_task_cut_to_its_share_of_the_rank() -> None:
    (task,) = tasks_of(1, (9, 12))
    left, values, right = np.linalg.svd(task.numpy(), full_matrices=False)
    close(merged("tsv_m", [task] * 3), left[:, :3] * values[:3] @ right[:3])


def test_tsv_m_averages_matrices_with_fewer_rows_than_there_are_sources() -> None:
    tasks = tasks_of(3, (2, 40))
    close(merged("tsv_m", tasks), sum(tasks) / 3)


# Isotropic merging


@settings(max_examples=20, deadline=None)
@given(SHAPES, st.integers(1, 4), st.integers(0, 10**6))
def test_iso_c_makes_all_singular_values_the_mean_of_those_of_the_sum(
    shape: tuple[int, int], count: int, seed: int
) -> None:
    tasks = tasks_of(count, shape, seed)
    left, values, right = np.linalg.svd(sum(tasks).numpy(), full_matrices=False)
    found = merged("iso_c", tasks)
    np.testing.assert_allclose(torch.linalg.svdvals(found), np.full(min(shape), values.mean()), rtol=1e-6)
    np.testing.assert_allclose(found.numpy(), values.mean() * left @ right, rtol=1e-6, atol=1e-6)


def test_iso_c_spreads_the_values_of_a_low_rank_sum_over_its_rank_only() -> None:
    left, right = orthonormal(8, 2, 1), orthonormal(10, 2, 2)
    sum_ = left @ torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64)) @ right.T
    close(merged("iso_c", [sum_ / 2, sum_ / 2]), 2.0 * left @ right.T)


def iso_cts(tasks: list[Array], common: float) -> Array:
    """By eigenvalues, with own directions first."""
    total, count = sum(tasks), len(tasks)
    least = min(total.shape)
    own = min(least // count, round((least - int(least * common)) / count))
    k = least - own * count
    u, s, v = np.linalg.svd(total, full_matrices=False)
    lefts, rights, values = [u[:, :k]], [v[:k].T], [s[:k]]
    for task in tasks:
        rest = (np.eye(len(task)) - u[:, :k] @ u[:, :k].T) @ task
        a, b, c = np.linalg.svd(rest, full_matrices=False)
        lefts, rights, values = [*lefts, a[:, :own]], [*rights, c[:own].T], [*values, b[:own]]
    mean = float(np.concatenate(values).mean())
    return mean * polar(np.concatenate(lefts, 1)) @ polar(np.concatenate(rights, 1)).T


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([(20, 25), (25, 15), (16, 16)]), st.sampled_from([0.8, 0.5]), st.integers(0, 10**6))
def test_iso_cts_takes_common_directions_and_those_of_each_task_outside_of_them(
    shape: tuple[int, int], common: float, seed: int
) -> None:
    tasks = tasks_of(3, shape, seed)
    wanted = iso_cts([task.numpy() for task in tasks], common)
    np.testing.assert_allclose(merged("iso_cts", tasks, common=common).numpy(), wanted, rtol=1e-6, atol=1e-6)


def test_iso_cts_with_common_directions_only_is_iso_c() -> None:
    tasks = tasks_of(3, (10, 14))
    close(merged("iso_cts", tasks, common=1.0), merged("iso_c", tasks))


def test_a_share_that_was_not_prepared_gives_the_same_bits_whatever_was_merged_before() -> None:
    tasks = [normal(10, 14, seed=i).float() for i in range(2)]
    models = {"base": torch.zeros(10, 14), "m0": tasks[0], "m1": tasks[1]}

    def engine() -> Merger:
        return Merger({model: InMemoryTensors({"w": value}) for model, value in models.items()})

    used = engine()
    for share in (0.8, 0.5, 0.8, 0.3, 0.5):
        recipe = recipe_of("iso_cts", 2, {"common": share}, None)
        found = dict(used.merge_tensors(recipe))["w"]
        assert torch.equal(found, dict(engine().merge_tensors(recipe))["w"])


# WUDI


def interference(merge: Tensor, tasks: list[Tensor]) -> Tensor:
    """The loss of the paper, for matrices (outputs, inputs)."""
    return sum(((merge - task) @ task.T).square().sum() / task.square().sum() for task in tasks)


@settings(max_examples=20, deadline=None)
@given(SHAPES, st.integers(1, 4), st.integers(0, 10**6))
def test_wudi_has_no_gradient_of_the_interference(shape: tuple[int, int], count: int, seed: int) -> None:
    tasks = tasks_of(count, shape, seed)
    found = merged("wudi", tasks).requires_grad_(True)
    interference(found, tasks).backward()
    start = sum(tasks).requires_grad_(True)
    interference(start, tasks).backward()
    assert found.grad is not None
    assert start.grad is not None
    assert found.grad.norm() <= 1e-4 * start.grad.norm() + 1e-9


def test_wudi_is_where_the_steps_of_adam_from_the_sum_go() -> None:
    tasks = [0.1 * task for task in tasks_of(3, (8, 6))]
    found = merged("wudi", tasks)
    steps = sum(tasks).clone().requires_grad_(True)
    optimizer = torch.optim.Adam([steps], lr=3e-3)
    for step in range(1500):
        optimizer.param_groups[0]["lr"] = 3e-3 * 0.995**step
        optimizer.zero_grad()
        interference(steps, tasks).backward()
        optimizer.step()
    assert interference(found, tasks) <= interference(steps.detach(), tasks) * (1 + 1e-6)
    torch.testing.assert_close(steps.detach(), found, rtol=1e-2, atol=1e-3)


def test_wudi_keeps_the_sum_where_tasks_use_different_inputs() -> None:
    rows = orthonormal(10, 6, 3)
    tasks = [normal(7, 2, seed=i) @ rows[:, 2 * i : 2 * i + 2].T for i in range(3)]
    np.testing.assert_allclose(merged("wudi", tasks).numpy(), sum(tasks).numpy(), atol=1e-6)


def test_wudi_is_blind_to_a_task_without_changes() -> None:
    tasks = tasks_of(2, (6, 8))
    close(merged("wudi", [*tasks, torch.zeros(6, 8)]), merged("wudi", tasks))


def test_wudi_knows_matrices_that_are_stored_with_inputs_first() -> None:
    tasks = tasks_of(2, (6, 18))
    turned = merged("wudi", [task.T.contiguous() for task in tasks])
    close(merged("wudi", tasks, name="transformer.h.0.attn.c_attn.weight"), turned.T)
    close(merged("wudi", [t.T for t in tasks], name="transformer.h.0.attn.c_attn.weight"), turned)


# TALL masks and consensus


def test_consensus_by_hand() -> None:
    # The sums are 2, 1, 1, 0. With threshold 1 a task uses what is at least the rest of the sum.
    tasks = [torch.tensor([1.0, 1.0, 3.0, 1.0]), torch.tensor([1.0, 0.0, -2.0, -1.0])]
    per_source = [{"threshold": 1.0}] * 2
    close(merged("consensus", tasks, per_source=per_source, **{"lambda": 1.0}), [2.0, 0.0, 0.0, 0.0])
    close(merged("consensus", tasks, per_source=per_source, k=1, **{"lambda": 0.5}), [1.0, 0.5, 0.5, 0.0])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.floats(0.0, 2.0), st.integers(0, 6), st.integers(0, 10**6))
def test_consensus_keeps_what_enough_masks_cover(count: int, threshold: float, k: int, seed: int) -> None:
    tasks = tasks_of(count, (1500,), seed)
    total = sum(tasks).numpy()
    uses = sum((np.abs(t.numpy()) >= threshold * np.abs(total - t.numpy())).astype(int) for t in tasks)
    found = merged("consensus", tasks, per_source=[{"threshold": threshold}] * count, k=k, **{"lambda": 1.0})
    close(found, np.where(uses >= k, total, 0.0))


def test_consensus_of_no_tasks_is_task_arithmetic_and_of_too_many_the_base() -> None:
    tasks = tasks_of(3, (50, 40))
    arithmetic = merged("task_arithmetic", tasks, per_source=[{"weight": 0.7}] * 3, **{"lambda": 0.4})
    close(merged("consensus", tasks, per_source=[{"weight": 0.7}] * 3, k=0), arithmetic)
    close(merged("consensus", tasks, k=4), torch.zeros(50, 40))


def test_a_tall_mask_takes_one_task_out_of_the_sum() -> None:
    tasks = [torch.tensor([1.0, 1.0, 0.25]), torch.tensor([1.0, -3.0, 2.0])]
    close(merged("tall_mask", tasks, threshold=0.5), [2.0, 0.0, 0.0])
    close(merged("tall_mask", tasks, threshold=0.5, task=1), [2.0, -2.0, 2.25])
    close(merged("tall_mask", tasks, threshold=0.0), sum(tasks))


def test_a_tall_mask_brings_back_tasks_that_change_different_elements() -> None:
    tasks = [torch.tensor([1.0, 0.0, 2.0, 0.0]), torch.tensor([0.0, -1.0, 0.0, 0.0])]
    for index, task in enumerate(tasks):
        close(merged("tall_mask", tasks, task=index), task)


def test_a_tall_mask_of_a_task_that_is_not_there_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"^rules\[0\]: operator 'tall_mask': task is 2, .* at most 1$"):
        merged("tall_mask", tasks_of(2, (4,)), task=2)


# LiNeS


def test_lines_scales_layers_by_their_depth() -> None:
    names = ["embed_tokens", *(f"layers.{i}.mlp.w" for i in range(3)), "norm", "lm_head"]
    names = [f"model.{name}.weight" for name in names]
    models = {"base": 0.0, "m0": 1.0, "m1": 3.0}
    engine = Merger({m: InMemoryTensors({n: torch.full((4,), value) for n in names}) for m, value in models.items()})
    recipe = recipe_of("lines", 2, {"alpha": 1.2, "beta": 0.5}, [{"weight": 1.0}, {"weight": 0.5}])
    found = {name: float(tensor[0]) for name, tensor in engine.merge_tensors(recipe)}
    scales = [0.6, 0.6, 0.85, 1.1, 1.1, 1.1]
    assert found == pytest.approx(dict(zip(names, [2.5 * scale for scale in scales], strict=True)))


def test_lines_without_slope_is_the_average() -> None:
    tasks = tasks_of(3, (30, 20))
    close(merged("lines", tasks, beta=0.0), sum(tasks) / 3)


# Shapes and degenerate inputs


@pytest.mark.parametrize("operator", DECOMPOSING)
@pytest.mark.parametrize("name", ["w", "model.embed_tokens.weight"])
def test_vectors_and_embeddings_get_the_mean_of_the_task_vectors(operator: str, name: str) -> None:
    tasks = tasks_of(3, (30, 20) if "embed" in name else (600,))
    close(merged(operator, tasks, name=name, **{"lambda": 0.5}), sum(tasks) / 6)


@pytest.mark.parametrize("operator", DECOMPOSING)
def test_kernels_of_convolutions_are_matrices_with_a_row_per_output(operator: str) -> None:
    tasks = tasks_of(2, (8, 3, 2, 2))
    flat = merged(operator, [task.reshape(8, 12) for task in tasks])
    close(merged(operator, tasks), flat.reshape(8, 3, 2, 2))


@pytest.mark.parametrize("operator", DECOMPOSING)
def test_experts_in_one_tensor_are_merged_one_by_one(operator: str) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tasks = tasks_of(2, (3, 8, 6))
    turn = operator == "wudi"  # the others do not care which side the inputs are, or Iso-CTS takes it as it is
    for expert in range(3):
        alone = [task[expert].T if turn else task[expert] for task in tasks]
        wanted = merged(operator, [task.contiguous() for task in alone])
        close(merged(operator, tasks, name=name)[expert], wanted.T if turn else wanted)


@pytest.mark.parametrize("operator", MERGING)
@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (1,), (1, 1), (1, 40), (40, 1), (2, 3, 0)])
def test_every_shape_has_a_finite_merge(operator: str, shape: tuple[int, ...]) -> None:
    tasks = tasks_of(3, shape)
    found = merged(operator, tasks)
    assert found.shape == torch.Size(shape)
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("operator", MERGING)
def test_tasks_without_changes_give_the_base(operator: str) -> None:
    base = normal(12, 9)
    assert torch.equal(merged(operator, [torch.zeros(12, 9)] * 3, base=base), torch.zeros(12, 9, dtype=torch.float64))


@pytest.mark.parametrize("operator", DECOMPOSING)
def test_one_source_of_low_rank_among_changes_of_zero_is_finite_and_keeps_its_directions(operator: str) -> None:
    left, right = orthonormal(12, 2, 1), orthonormal(9, 2, 2)
    task = left @ right.T
    found = merged(operator, [task, torch.zeros(12, 9), torch.zeros(12, 9)])
    close(left @ left.T @ found @ right @ right.T, found)
    assert found.norm() > 0.5 * task.norm()


@pytest.mark.parametrize("operator", ["tsv_m", "wudi"])
def test_one_source_alone_is_given_back(operator: str) -> None:
    (task,) = tasks_of(1, (9, 12))
    np.testing.assert_allclose(merged(operator, [task]), task, atol=1e-9)


@pytest.mark.parametrize("operator", DECOMPOSING)
def test_the_order_of_sources_does_not_matter(operator: str) -> None:
    tasks = tasks_of(3, (12, 9))
    np.testing.assert_allclose(merged(operator, tasks[::-1]), merged(operator, tasks), atol=1e-9)


@pytest.mark.parametrize("operator", ["tsv_m", "iso_c", "wudi"])
def test_a_turned_matrix_merges_to_the_turned_merge_where_sides_do_not_count(operator: str) -> None:
    tasks = tasks_of(3, (12, 9))
    if operator == "wudi":  # which has sides, is the same only for what commutes
        tasks = [torch.diag(normal(6, seed=i)) for i in range(3)]
    np.testing.assert_allclose(merged(operator, [t.T for t in tasks]), merged(operator, tasks).T, atol=1e-9)


@pytest.mark.parametrize("operator", ["iso_cts", "regmean"])
def test_a_single_merge_keeps_no_decomposed_tensor(operator: str) -> None:
    def held() -> int:
        gc.collect()
        return sum(one.numel() for one in gc.get_objects() if isinstance(one, Tensor))

    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(6)]
    generator = torch.Generator().manual_seed(2)
    tensors = {model: {n: torch.randn(40, 40, generator=generator) for n in names} for model in ("base", "a", "b")}
    gram = {f"gram/{n}": torch.eye(40) for n in names} | {f"gram_axis/{n}": torch.tensor(1) for n in names}
    merger = Merger(
        {model: InMemoryTensors(found) for model, found in tensors.items()},
        statistics={model: InMemoryTensors(gram) for model in ("a", "b")},
        keep_prepared=False,
    )
    rule = {"operator": operator, "sources": {"a": {}, "b": {}}, "parameters": {}}
    # What is not prepared: another share, other weights.
    rule |= {"parameters": {"common": 0.5}} if operator == "iso_cts" else {"sources": {"a": {"weight": 2.0}, "b": {}}}
    models = {model: {"path": model, "statistics": "file"} for model in tensors}
    recipe = Recipe.from_data({"base": "base", "models": models, "rules": [rule]})
    before = held()
    for _ in merger.merge_tensors(recipe):
        pass
    del _
    assert held() - before < 6 * 40 * 40 / 2
