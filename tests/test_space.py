"""Groups, genes and recipes."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from search.config import SpaceConfig
from search.errors import RecipeError
from search.genome import Gene, Genome
from search.grouping import group_tensors, place_of
from search.recipe import ModelRef, Recipe, Rule
from search.space import Space, SpaceError, make_space

LLAMA = [
    "model.embed_tokens.weight",
    *(
        f"model.layers.{layer}.{part}.weight"
        for layer in range(12)
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "input_layernorm")
    ),
    "model.norm.weight",
    "lm_head.weight",
]
MODELS = {name: ModelRef(path=f"/models/{name}", sha256=name * 8) for name in ("base", "a", "b")}


def space(**changes: object) -> Space:
    config = SpaceConfig.model_validate({"operator": "task_arithmetic", **changes})
    return make_space(config, tensors=LLAMA, models=MODELS, sources=("a", "b"))


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("model.layers.3.self_attn.q_proj.weight", 3, "attention"),
        ("model.layers.3.post_attention_layernorm.weight", 3, "norm"),
        ("model.layers.11.mlp.gate_proj.weight", 11, "mlp"),
        ("h.0.attn.c_attn.weight", 0, "attention"),
        ("transformer.h.1.ln_2.bias", 1, "norm"),
        ("transformer.h.1.mlp.c_fc.weight", 1, "mlp"),
        ("transformer.wpe.weight", None, "embedding"),
        ("bert.encoder.layer.0.attention.output.dense.weight", 0, "attention"),
        ("bert.encoder.layer.0.attention.output.LayerNorm.weight", 0, "norm"),
        ("bert.encoder.layer.0.output.dense.weight", 0, "mlp"),
        ("bert.pooler.dense.weight", None, "head"),
        ("vit.encoder.layer.2.layernorm_before.weight", 2, "norm"),
        ("vit.embeddings.patch_embeddings.projection.weight", None, "embedding"),
        ("encoder.block.1.layer.0.SelfAttention.q.weight", 1, "attention"),
        ("decoder.block.1.layer.2.DenseReluDense.wi.weight", 1, "mlp"),
        ("lm_head.weight", None, "head"),
        ("model.norm.weight", None, "norm"),
        ("classifier.bias", None, "head"),
    ],
)
def test_the_name_of_a_tensor_tells_its_layer_and_kind(name: str, layer: int | None, kind: str) -> None:
    place = place_of(name)
    assert (place.layer, place.kind) == (layer, kind)


@given(
    layers=st.integers(0, 5),
    split=st.sets(st.sampled_from(["attention", "mlp", "norm", "embedding", "head"])),
    patterns=st.sampled_from([{}, {"first": r"layers\.0\."}, {"mine": r"q_proj", "heads": "lm_head"}]),
)
def test_every_tensor_is_in_exactly_one_group(layers: int, split: set[str], patterns: dict[str, str]) -> None:
    groups = group_tensors(LLAMA, layers, sorted(split), patterns)
    assert sorted(tensor for group in groups for tensor in group.tensors) == sorted(LLAMA)
    assert len({group.name for group in groups}) == len(groups)


def test_groups_follow_the_forward_pass_and_count_layers_as_numbers() -> None:
    groups = group_tensors(LLAMA, 1, ["embedding"], {})
    assert [group.name for group in groups] == ["embedding", *(f"layer{i}" for i in range(12)), "rest"]
    assert [g.name for g in group_tensors(LLAMA, 5, [], {})] == [
        "layers0-4",
        "layers5-9",
        "layers10-14",
        "rest",
    ]
    assert [g.name for g in group_tensors(LLAMA, 0, ["mlp"], {})] == ["layers", "layers.mlp", "rest"]


def test_encoder_and_decoder_layers_do_not_share_groups() -> None:
    names = ["encoder.block.0.layer.0.q.weight", "decoder.block.0.layer.0.q.weight", "shared.weight"]
    groups = group_tensors(names, 1, [], {})
    assert {"encoder.block.layer0", "decoder.block.layer0"} <= {group.name for group in groups}


def test_a_genome_decodes_to_the_values_its_genes_name() -> None:
    made = space(layers_per_group=0, split=["attention"], parameters={"weight": {"low": 0, "high": 2, "initial": 1}})
    coordinates = tuple((i + 1) / (len(made.genes) + 1) for i in range(len(made.genes)))
    recipe = made.decode(Genome(coordinates))
    for gene, x in zip(made.genes, coordinates, strict=True):
        group, _, rest = gene.name.partition("/")
        source, _, parameter = rest.partition(".")
        tensors = next(g.tensors for g in made.groups if g.name == group)
        rule = recipe.assign(LLAMA)[tensors[0]]
        assert rule.sources[source][parameter] == pytest.approx(2 * x)


@given(
    operator=st.sampled_from(["task_arithmetic", "ties", "breadcrumbs", "della", "slerp", "nuslerp"]),
    layers=st.integers(0, 3),
    data=st.data(),
)
def test_the_hash_found_from_a_genome_is_that_of_its_recipe(operator: str, layers: int, data: st.DataObject) -> None:
    made = space(operator=operator, layers_per_group=layers, split=["mlp"])
    size = len(made.genes)
    coordinates = data.draw(st.lists(st.floats(0, 1), min_size=size, max_size=size))
    genome = Genome(tuple(coordinates))
    assert made.recipe_hash(genome) == made.decode(genome).hash
    # A recipe that was checked is the same as this one, which was not.
    assert Recipe.from_data(made.decode(genome).model_dump()).hash == made.decode(genome).hash


def test_a_genome_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="genome has 1 genes"):
        space().decode(Genome((0.5,)))


def test_a_suggestion_decodes_to_its_weights() -> None:
    made = space(parameters={"weight": {"low": -1, "high": 1, "initial": 0}})
    genome = made.suggest({"a": 1.0, "b": 0.25})
    assert genome is not None
    for rule in made.decode(genome).rules:
        assert rule.sources == {"a": {"weight": 1.0}, "b": {"weight": pytest.approx(0.25)}}


@given(st.floats(0, 1), st.floats(-3, 3), st.floats(0.01, 5))
def test_a_gene_stays_within_its_bounds_and_inverts(x: float, low: float, width: float) -> None:
    gene = Gene("g", low, low + width, low)
    assert gene.low <= gene.value(x) <= gene.high
    assert gene.coordinate(gene.value(x)) == pytest.approx(x, abs=1e-6)


def test_int_and_bool_genes_take_all_their_values() -> None:
    whole = Gene("n", 1, 3, 2, "int")
    assert {whole.value(x / 100) for x in range(101)} == {1, 2, 3}
    yes_no = Gene("b", 0, 1, 0, "bool")
    assert [yes_no.value(x) for x in (0.0, 0.49, 0.5, 1.0)] == [False, False, True, True]


weights = st.floats(-2, 2, allow_nan=False).map(lambda x: round(x, 6))


@given(
    st.dictionaries(st.sampled_from(["a", "b"]), st.fixed_dictionaries({"weight": weights}), min_size=1),
    st.integers(0, 2**31),
    st.sampled_from([None, "float32", "bfloat16"]),
)
def test_a_recipe_round_trips_through_yaml_with_the_same_hash(
    sources: dict[str, dict[str, float]], seed: int, dtype: str | None
) -> None:
    rule = Rule(operator="task_arithmetic", sources=sources, parameters={"lambda": 0.5, "normalize": True})
    recipe = Recipe(base="base", models=MODELS, rules=(rule,), seed=seed, dtype=dtype)
    again = Recipe.from_data(yaml.safe_load(recipe.to_yaml()))
    assert again == recipe
    assert again.hash == recipe.hash


def test_the_hash_of_a_recipe_depends_on_the_bytes_of_its_models_and_not_on_their_place() -> None:
    rule = Rule(operator="linear", sources={"a": {"weight": 1.0}})
    here = Recipe(models={"a": ModelRef(path="/here", sha256="1")}, rules=(rule,))
    there = Recipe(models={"a": ModelRef(path="/there", sha256="1")}, rules=(rule,))
    other = Recipe(models={"a": ModelRef(path="/here", sha256="2")}, rules=(rule,))
    assert here.hash == there.hash != other.hash


def test_the_hash_of_a_known_recipe_never_changes() -> None:
    """Histories and model cards name it: a change here breaks every run on disk."""
    rule = Rule(operator="linear", sources={"a": {"weight": 0.5}}, parameters={"normalize": False})
    recipe = Recipe(models={"a": ModelRef(path="a", sha256="00")}, rules=(rule,), seed=7)
    import hashlib

    written = (
        '{"meiosis":1,"base":null,"models":{"a":"00"},"rules":[{"tensors":["*"],"operator":"linear",'
        '"sources":{"a":{"weight":0.5}},"parameters":{"normalize":false}}],"dtype":null,"seed":7}'
    )
    assert recipe.hash == hashlib.sha256(written.encode()).hexdigest()


def test_the_first_rule_that_matches_a_tensor_holds() -> None:
    first = Rule(tensors=("model.layers.0.*",), operator="linear", sources={"a": {"weight": 1.0}})
    rest = Rule(operator="linear", sources={"b": {"weight": 1.0}})
    assigned = Recipe(models=MODELS, rules=(first, rest)).assign(LLAMA)
    assert {name for name, rule in assigned.items() if rule is first} == {n for n in LLAMA if ".layers.0." in n}
    assert list(assigned) == LLAMA


def test_bounds_of_the_operator_hold() -> None:
    with pytest.raises(SpaceError, match="beyond") as error:
        space(operator="ties", parameters={"density": {"low": 0.0, "high": 1.5}})
    assert error.value.key == ("parameters", "density")


def test_a_rule_that_matches_no_tensor_is_a_mistake() -> None:
    typo = Rule(tensors=("model.layrs.*",), operator="linear", sources={"a": {"weight": 1.0}})
    rest = Rule(operator="linear", sources={"b": {"weight": 1.0}})
    with pytest.raises(RecipeError, match=r"no tensor of the models matches 'model\.layrs"):
        Recipe(models=MODELS, rules=(typo, rest)).assign(LLAMA)


@given(low=st.floats(0, 0.9), width=st.floats(0, 0.5), x=st.floats(0, 1))
def test_stepped_genes_take_multiples_of_their_step_within_their_bounds(low: float, width: float, x: float) -> None:
    gene = Gene("g/a.density", low, low + width, low, "float", 1 / 1024)
    value = gene.value(x)
    assert low <= value <= low + width
    if width > 1 / 1024:
        assert value * 1024 == int(value * 1024)
        assert abs(value - (low + x * width)) <= 1 / 1024


def test_densities_of_ties_are_searched_on_the_grid_that_is_prepared() -> None:
    genes = space(operator="ties").genes
    assert {gene.step for gene in genes if gene.name.endswith(".density")} == {1 / 1024}
    assert {gene.step for gene in genes if gene.name.endswith(".weight")} == {None}
