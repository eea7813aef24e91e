"""Recipes written as merge files of mergekit merge to the same tensors, or are refused with every reason."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_files import LAYER_SHAPES, make_model, merge, read, tensors_of

from meiosis.cli.main import cli
from search.errors import MeiosisError
from search.mergekit.filters import as_setting
from search.mergekit.methods import METHODS
from search.mergekit.settings import Reading, look_up
from search.mergekit.vocabulary import tokenizer_keys
from search.mergekit.writer import write_merge_file
from search.recipe import Recipe
from search.yaml_source import YamlSource

torch.set_num_threads(1)

NAMES = [
    "lm_head.weight",
    "model.embed_tokens.weight",
    "model.norm.weight",
    *(f"model.layers.{layer}.{rest}" for layer in range(3) for rest in LAYER_SHAPES),
]


@pytest.fixture(scope="module")
def models() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        for seed, name in enumerate(("base", "a", "b")):
            make_model(Path(folder) / name, seed=seed)
        yield Path(folder)


def recipe_of(models: Path, rules: list[dict[str, Any]], **keys: Any) -> Recipe:
    refs = {name: {"path": str(models / name)} for name in ("base", "a", "b")}
    return Recipe.from_data({"models": refs, "rules": rules, **keys})


def there_and_back(recipe: Recipe) -> Recipe:
    return read(write_merge_file(recipe), Path("/"))


def assert_same_merge(first: Recipe, second: Recipe) -> None:
    ours, theirs = merge(first), merge(second)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name]), name


numbers = st.sampled_from([0.0, 0.25, 0.5, 1.0, -0.5, 1e-05])


@st.composite
def recipes(draw: st.DrawFn, models: Path) -> Recipe:
    """Recipes of one method whose parameters differ by tensor, layer and model."""
    name = draw(st.sampled_from([n for n in METHODS if n not in ("karcher", "arcee_fusion", "model_stock")]))
    method = METHODS[name]
    two = name in ("slerp", "nuslerp", "nearswap", "passthrough")
    sources = {"slerp": ["base", "a"], "nuslerp": ["a", "b"], "nearswap": ["a"], "passthrough": ["b"]}
    used = sources[name] if two else draw(st.permutations(["a", "b"]))
    if method.base == "a source" and draw(st.booleans()):
        used = [*used, "base"]
    from_base = method.base == "may be" and draw(st.booleans())

    def value(parameter: str) -> Any:
        if method.kinds[parameter] == "bool":
            return draw(st.booleans())
        if parameter in ("density", "t", "gamma", "select_topk", "alpha"):
            return draw(st.sampled_from([0.25, 0.5, 0.75] if parameter != "gamma" else [0.0, 0.125]))
        if parameter in ("weight", "scale", "lambda"):
            return draw(st.sampled_from([0.25, 0.5, 1.0, 2.0]))
        return draw(st.sampled_from([1e-05, 0.0625]))

    cuts = draw(st.lists(st.lists(st.sampled_from(NAMES), min_size=1, max_size=5, unique=True), max_size=3))
    rules, given_away = [], set()
    for cut in [*cuts, None]:
        tensors = ["*"] if cut is None else [tensor for tensor in cut if tensor not in given_away]
        if not tensors or (cut is not None and len(given_away | set(tensors)) == len(NAMES)):
            continue
        given_away |= set(tensors)
        shared = {p: value(p) for p, d in method.shared.items() if d is None or draw(st.booleans())}
        if from_base:
            shared["task_vectors"] = True
        per_model = {
            model: {p: value(p) for p, d in method.per_model.items() if d is None or draw(st.booleans())}
            for model in used
        }
        rules.append({"tensors": tensors, "operator": name, "sources": per_model, "parameters": shared})
    if name.startswith("della"):
        for rule in rules:
            for values in rule["sources"].values():
                values |= {"density": 0.5, "epsilon": 0.0625}
    dtypes = st.sampled_from([None, "float32", "bfloat16", "float16"])
    input_dtype = draw(dtypes)
    # mergekit cannot compute in more than the inputs are rounded to, and sums norms in float32, we in float64.
    sums = name in ("slerp", "nuslerp", "multislerp", "sce") or name.startswith(
        ("ties", "breadcrumbs", "della", "dare")
    )
    narrow = input_dtype in ("bfloat16", "float16")
    compute = "inputs" if sums or narrow or draw(st.booleans()) else "float32"
    return recipe_of(models, rules, base="base", dtype=draw(dtypes), input_dtype=input_dtype, compute=compute)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_recipe_that_is_written_and_read_merges_to_the_same_tensors(data: st.DataObject, models: Path) -> None:
    recipe = data.draw(recipes(models))
    assert_same_merge(recipe, there_and_back(recipe))


@settings(max_examples=60, deadline=None)
@given(
    values=st.dictionaries(
        st.sampled_from([*NAMES, "model.layers.10.mlp.down_proj.weight", "norm.weight", "weight"]), numbers, min_size=1
    )
)
def test_filters_give_every_tensor_its_value(values: dict[str, float]) -> None:
    setting = as_setting(values)
    reading = Reading(YamlSource("a: 1", "file"), METHODS["linear"])
    scope = reading.scope({"weight": setting}, (), of_model=True)
    assert not reading.faults
    for name, value in values.items():
        found = look_up("weight", [scope], name, 0.0)
        assert found is not None
        assert found.value == value


def test_filters_are_short() -> None:
    assert as_setting({name: 1.0 if "mlp" in name else 2.0 for name in NAMES}) == [
        {"filter": "mlp", "value": 1.0},
        {"value": 2.0},
    ]
    by_layer = as_setting({name: 1.0 if ".layers.1." in name else 2.0 for name in NAMES})
    assert by_layer == [{"filter": "layers.1.", "value": 1.0}, {"value": 2.0}]


def test_layers_become_slices_and_come_back(models: Path) -> None:
    layers = [{"a": 0, "base": 0}, {"a": 1, "base": 1}, {"a": 1, "base": 0}, {"b": 2, "base": 2}]
    rules = [
        {
            "tensors": [f"model.layers.{k}.*" for k in (0, 1)],
            "operator": "task_arithmetic",
            "sources": {"a": {"weight": 1}},
        },
        {"tensors": ["model.layers.2.mlp*"], "operator": "task_arithmetic", "sources": {"a": {"weight": 0.5}}},
        {"tensors": ["model.layers.2.*"], "operator": "task_arithmetic", "sources": {"a": {"weight": 0.25}}},
        {"tensors": ["model.embed*"], "operator": "task_arithmetic", "sources": {"a": {"weight": 2}}},
        {"tensors": ["*"], "operator": "task_arithmetic", "sources": {"b": {"weight": 1}}},
    ]
    recipe = recipe_of(models, rules, base="base", layers=layers)
    text = write_merge_file(recipe)
    slices = yaml.safe_load(text)["slices"]
    assert [part["sources"][0]["layer_range"] for part in slices] == [[0, 2], [1, 2], [2, 3]]
    again = read(text, Path("/"))
    assert again.layers == recipe.layers
    assert_same_merge(recipe, again)


def test_layers_made_of_different_models_become_slices(models: Path) -> None:
    rules = [
        {"tensors": ["model.embed*", "model.layers.0.*"], "operator": "linear", "sources": {"a": {"weight": 1}}},
        {"tensors": ["*"], "operator": "linear", "sources": {"a": {"weight": 1}, "b": {"weight": 3}}},
    ]
    recipe = recipe_of(models, rules)
    again = there_and_back(recipe)
    assert again.layers is None
    assert_same_merge(recipe, again)


def test_the_vocabulary_and_the_template_come_back(models: Path) -> None:
    rules = [{"operator": "linear", "sources": {"base": {"weight": 1}, "a": {"weight": 1}}}]
    vocabulary = {
        "tokens_of": "union",
        "tokens": {
            "<x>": {"source": "a", "force": True},
            "<y>": {"source": "zero"},
            "<z>": {"source": "a", "token": "<s>"},
            "<w>": {"source": "a", "token_id": 3},
            "<v>": {"force": True},
        },
        "pad_to_multiple_of": 8,
    }
    recipe = recipe_of(models, rules, base="base", chat_template="{{ x }}")
    text = write_merge_file(recipe)
    recipe = Recipe.from_data({**recipe.model_dump(), "vocabulary": vocabulary})
    section = tokenizer_keys(recipe, Path())
    data = {**yaml.safe_load(text), "base_model": str(models / "base"), **section}
    again = read(yaml.safe_dump(data), Path("/"))
    assert again.vocabulary == recipe.vocabulary
    assert again.chat_template == "{{ x }}"


def test_models_stored_in_bfloat16_are_computed_in_float32_where_the_recipe_is(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        make_model(tmp_path / name, seed=seed, dtype=torch.bfloat16)
    rule = {"operator": "task_arithmetic", "sources": {"a": {"weight": 0.3}, "b": {"weight": 0.3}}}
    recipe = recipe_of(tmp_path, [rule], base="base")
    data = yaml.safe_load(write_merge_file(recipe))
    assert (data["dtype"], data["out_dtype"]) == ("float32", "bfloat16")
    assert_same_merge(recipe, there_and_back(recipe))


def test_a_path_that_mergekit_would_take_apart_is_written_in_parts(tmp_path: Path) -> None:
    make_model(tmp_path / "a+b@c")
    refs = {"m": {"path": str(tmp_path / "a+b@c")}}
    recipe = Recipe.from_data({"models": refs, "rules": [{"operator": "passthrough", "sources": {"m": {}}}]})
    text = write_merge_file(recipe)
    assert yaml.safe_load(text)["models"][0]["model"] == {"model": {"path": str(tmp_path / "a+b@c")}}
    assert_same_merge(recipe, read(text, Path("/")))


def linear(**weights: float) -> dict[str, Any]:
    return {"operator": "linear", "sources": {name: {"weight": weight} for name, weight in weights.items()}}


REFUSED = [
    ([{"operator": "tsv_m", "sources": {"a": {}}}], {"base": "base"}, ["it has no method 'tsv_m'"]),
    (
        [{"tensors": ["*mlp*"], **linear(a=1)}, {"operator": "passthrough", "sources": {"a": {}}}],
        {},
        ["a merge file has one method, the recipe has several: linear, passthrough"],
    ),
    (
        [{"tensors": ["*mlp*"], **linear(a=1)}, linear(a=1, b=1)],
        {},
        [f"the tensors of layer {k} are not all made of the same models in the same order" for k in range(3)],
    ),
    (
        [{"tensors": ["lm_head*"], **linear(a=1)}, linear(a=1, b=1)],
        {},
        ["'lm_head.weight' is not made of the models of the last layers, whose slice it belongs to"],
    ),
    (
        [{"operator": "task_arithmetic", "sources": {"a": {"weight": 1}}}],
        {"base": "base", "input_dtype": "bfloat16"},
        ["it computes 'task_arithmetic' in bfloat16 here, the recipe in float32"],
    ),
    (
        [
            {"tensors": ["*mlp*"], "operator": "multislerp", "sources": {"a": {"weight": 1}}},
            {"operator": "multislerp", "sources": {"a": {"weight": 1}}, "parameters": {"task_vectors": True}},
        ],
        {"base": "base"},
        ["some rules of 'multislerp' take differences from a base and others do not"],
    ),
]


@pytest.mark.parametrize(("rules", "keys", "reasons"), REFUSED, ids=range(len(REFUSED)))
def test_what_mergekit_cannot_express_is_told_line_by_line(
    rules: list[dict[str, Any]], keys: dict[str, Any], reasons: list[str], models: Path
) -> None:
    with pytest.raises(MeiosisError) as error:
        write_merge_file(recipe_of(models, rules, **keys))
    assert str(error.value).splitlines() == [f"mergekit cannot express this: {reason}" for reason in reasons]


def test_other_masks_are_announced(models: Path) -> None:
    notes: list[str] = []
    rule = {"operator": "dare_linear", "sources": {"a": {"weight": 1, "density": 0.5}}}
    write_merge_file(recipe_of(models, [rule], base="base", seed=7), report=notes.append)
    assert notes == [
        "seed 7: mergekit draws other masks for 'dare_linear', so its merge is another sample of the same distribution"
    ]


def test_the_command_converts_both_ways(tmp_path: Path, models: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe_of(models, [linear(a=1, b=2)]).to_yaml())
    runner = CliRunner()
    written = runner.invoke(cli, ["mergekit", str(tmp_path), "-o", str(tmp_path / "merge.yml")])
    assert written.exit_code == 0, written.output
    assert yaml.safe_load((tmp_path / "merge.yml").read_text())["merge_method"] == "linear"
    back = runner.invoke(cli, ["mergekit", str(tmp_path / "merge.yml")])
    assert back.exit_code == 0, back.output
    (tmp_path / "back.yaml").write_text(back.stdout)
    merged = runner.invoke(cli, ["merge", str(tmp_path / "back.yaml"), str(tmp_path / "out")])
    assert merged.exit_code == 0, merged.output
    a, b = tensors_of(models / "a"), tensors_of(models / "b")
    for name, values in tensors_of(tmp_path / "out").items():
        torch.testing.assert_close(values, (a[name] + 2 * b[name]) / 3)
    taken = runner.invoke(cli, ["mergekit", str(tmp_path), "-o", str(tmp_path / "merge.yml")])
    assert isinstance(taken.exception, MeiosisError)
    assert "exists, and nothing is overwritten" in str(taken.exception)
    nowhere = runner.invoke(cli, ["mergekit", str(tmp_path), "-o", str(tmp_path / "no" / "merge.yml")])
    assert isinstance(nowhere.exception, MeiosisError)
    assert "there is no folder" in str(nowhere.exception)
