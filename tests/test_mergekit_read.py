"""Merge files of mergekit are read as what mergekit makes of them, and refused where it would be silent."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from merge_files import LAYER_SHAPES, make_model, merge, read, tensors_of
from safetensors.torch import load_file, save_file

from meiosis.cli.main import cli
from search.errors import ConfigError, MeiosisError
from search.mergekit.methods import METHODS
from search.recipe_file import read_recipe
from search.registry import OPERATORS
from search.sources import open_models, open_sources

torch.set_num_threads(1)

WHOLE = os.environ.get("MEIOSIS_GOLDEN")
GOLDEN = Path(WHOLE or Path(__file__).parent / "golden")
SAME_SUMS = torch.backends.cpu.get_cpu_capability() == "AVX2"
"""Whether torch sums here in the order in which it did for mergekit."""
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")


def golden_cases() -> list[str]:
    found = []
    for path in sorted(GOLDEN.glob("expected/*/*/config.yaml")):
        if yaml.safe_load(path.read_text())["merge_method"] not in RANDOM:
            found.append(f"{path.parent.parent.name}/{path.parent.name}")
    return found


def whole_folder(reference: str, tmp_path: Path) -> Path:
    """A golden model as a folder: the tests carry some tensors of each, without a config."""
    folder = GOLDEN / reference
    if (folder / "config.json").exists():
        shutil.copytree(folder, tmp_path / reference, dirs_exist_ok=True)
        return tmp_path / reference
    copy = tmp_path / reference
    if copy.exists():
        return copy
    copy.mkdir(parents=True)
    os.symlink(folder / "model.safetensors", copy / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 4}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def ulps(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """How many bfloat16 numbers lie between two of them."""
    ordered = []
    for values in (ours, theirs):
        bits = values.view(torch.int16).int()
        ordered.append(torch.where(bits < 0, -(bits & 0x7FFF), bits))
    return (ordered[0] - ordered[1]).abs()


@pytest.mark.parametrize("case", golden_cases())
def test_a_merge_file_makes_what_mergekit_made_of_it(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_file(GOLDEN / "expected" / case / "model.safetensors")
    config = GOLDEN / "expected" / case / "config.yaml"
    for reference in {ref.path for ref in read_paths(config)}:
        whole_folder(reference, tmp_path)
    monkeypatch.chdir(tmp_path)
    ours = merge(read_recipe(config), expected)
    elements = differing = 0
    for name, theirs in expected.items():
        assert ours[name].dtype == theirs.dtype, name
        assert ours[name].shape == theirs.shape, name
        if SAME_SUMS:
            assert torch.equal(ours[name], theirs), name
        if theirs.dtype == torch.bfloat16:
            far = ulps(ours[name], theirs) > 1
        else:
            # A sum near zero carries the error of its terms, which are of the size of the tensor's elements.
            far = (ours[name].double() - theirs.double()).abs() > 1e-6 * theirs.double().abs().max()
        elements, differing = elements + far.numel(), differing + int(far.sum())
    assert differing == 0, f"{differing} of {elements}"


class _Path:
    def __init__(self, path: str) -> None:
        self.path = path


def read_paths(config: Path) -> list[_Path]:
    data = yaml.safe_load(config.read_text())
    entries = [*(data.get("models") or []), *(s for part in data.get("slices") or [] for s in part["sources"])]
    return [_Path(entry["model"]) for entry in entries] + ([_Path(data["base_model"])] if "base_model" in data else [])


def test_every_method_of_mergekit_has_an_operator_with_its_parameters_and_defaults() -> None:
    for name, method in METHODS.items():
        known = {parameter.name: parameter for parameter in OPERATORS.get(name).parameters}
        for scope, parameters in (("source", method.per_model), ("shared", method.shared)):
            for parameter, default in parameters.items():
                assert known[parameter].scope == scope, (name, parameter)
                assert known[parameter].default == default, (name, parameter)
                assert known[parameter].kind == method.kinds[parameter], (name, parameter)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate(("base", "a", "b")):
        make_model(tmp_path / name, seed=seed)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(recipe: object, tensor: str, model: str = "a", parameter: str = "weight") -> object:
    names = ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    layers = getattr(recipe, "layers", None)
    count = 3 if layers is None else len(layers)
    names += [f"model.layers.{k}.{rest}" for k in range(count) for rest in LAYER_SHAPES]
    return recipe.assign(names)[tensor].sources[model].get(parameter)  # type: ignore[attr-defined]


def test_a_gradient_interpolates_over_layers_and_gives_embedding_norm_and_head_its_first_value(models: Path) -> None:
    recipe = read(
        "merge_method: linear\nmodels:\n- model: a\n  parameters: {weight: [0, 0.2, 1]}\n"
        "- model: b\n  parameters: {weight: [1, 0]}\n",
        models,
    )
    for layer, (first, second) in enumerate([(0.0, 1.0), (0.2, 0.5), (1.0, 0.0)]):
        assert weights(recipe, f"model.layers.{layer}.mlp.down_proj.weight") == pytest.approx(first)
        assert weights(recipe, f"model.layers.{layer}.mlp.down_proj.weight", "b") == pytest.approx(second)
    for outside in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert weights(recipe, outside) == 0.0
        assert weights(recipe, outside, "b") == 1.0


def test_gradients_restart_in_every_slice_and_end_in_a_slice_of_one_layer(models: Path) -> None:
    recipe = read(
        "merge_method: linear\nslices:\n"
        "- sources:\n  - {model: a, layer_range: [0, 2], parameters: {weight: [0.25, 0.75]}}\n"
        "- sources:\n  - {model: a, layer_range: [2, 3], parameters: {weight: [0.25, 0.5]}}\n",
        models,
    )
    assert recipe.layers is None
    found = [weights(recipe, f"model.layers.{k}.input_layernorm.weight") for k in range(3)]
    assert found == [0.25, 0.75, 0.5]
    assert weights(recipe, "lm_head.weight") == 0.25


def test_filters_go_by_the_name_in_the_input_and_the_first_that_matches_wins(models: Path) -> None:
    text = (
        "merge_method: passthrough\nslices:\n"
        "- sources:\n  - {model: a, layer_range: [1, 3]}\n"
        "- sources:\n  - model: a\n    layer_range: [1, 3]\n    parameters:\n      scale:\n"
        "      - {filter: layers.1.mlp, value: 2.0}\n      - {filter: mlp, value: 3.0}\n"
        "      - {filter: '*', value: 4.0}\n"
    )
    recipe = read(text, models)
    assert recipe.layers == ({"a": 1}, {"a": 2}, {"a": 1}, {"a": 2})
    assert weights(recipe, "model.layers.2.mlp.down_proj.weight", parameter="scale") == 2.0
    assert weights(recipe, "model.layers.3.mlp.down_proj.weight", parameter="scale") == 3.0
    assert weights(recipe, "model.layers.3.input_layernorm.weight", parameter="scale") == 4.0
    assert weights(recipe, "lm_head.weight", parameter="scale") == 4.0
    ours, theirs = merge(recipe), tensors_of(models / "a")
    assert torch.equal(ours["model.layers.2.mlp.down_proj.weight"], theirs["model.layers.1.mlp.down_proj.weight"] * 2)
    assert torch.equal(ours["model.layers.1.mlp.down_proj.weight"], theirs["model.layers.2.mlp.down_proj.weight"])


def test_the_innermost_scope_that_has_a_value_wins(models: Path) -> None:
    text = (
        "merge_method: linear\nmodules:\n  default:\n    parameters: {weight: 3}\n    slices:\n"
        "    - parameters: {weight: 2}\n      sources:\n"
        "      - {model: a, layer_range: [0, 1], parameters: {weight: {filter: mlp, value: 1}}}\n"
        "    - sources:\n      - {model: a, layer_range: [1, 3]}\n"
        "parameters: {weight: 4, normalize: false}\n"
    )
    recipe = read(text, models)
    assert weights(recipe, "model.layers.0.mlp.down_proj.weight") == 1
    assert weights(recipe, "model.layers.0.input_layernorm.weight") == 2
    assert weights(recipe, "model.layers.1.mlp.down_proj.weight") == 3


def test_a_base_model_of_linear_is_one_more_model_that_needs_its_weight(models: Path) -> None:
    text = "merge_method: linear\nbase_model: base\nmodels:\n- {model: a, parameters: {weight: 1}}\n"
    with pytest.raises(ConfigError, match="needs 'weight' for every model; 'base' has none"):
        read(text, models)
    recipe = read(text + "parameters: {weight: 0.5}\n", models)
    assert dict(recipe.rules[0].sources) == {"a": {"weight": 1.0}, "base": {"weight": 0.5}}


def test_t_0_of_slerp_is_the_base_wherever_it_stands(models: Path) -> None:
    recipe = read("merge_method: slerp\nbase_model: b\nmodels:\n- model: a\n- model: b\nparameters: {t: 0}\n", models)
    assert list(recipe.rules[0].sources) == ["b", "a"]
    torch.testing.assert_close(
        merge(recipe)["model.norm.weight"], tensors_of(models / "b")["model.norm.weight"], rtol=0, atol=0
    )


def test_numbers_that_yaml_takes_for_text_are_numbers(models: Path) -> None:
    text = "merge_method: nearswap\nbase_model: base\nmodels:\n- model: a\nparameters: {t: 1e-3}\n"
    assert read(text, models).rules[0].parameters == {"t": 0.001}


def test_dtype_casts_the_inputs_and_out_dtype_the_output(tmp_path: Path) -> None:
    make_model(tmp_path / "a", dtype=torch.bfloat16)
    make_model(tmp_path / "b", seed=1)
    entries = f"models:\n- model: {tmp_path}/a\n- model: {tmp_path}/b\nparameters: {{weight: 1}}\n"
    plain = read("merge_method: linear\n" + entries, tmp_path)
    assert (plain.input_dtype, plain.dtype) == (None, "float32")  # what the types of the inputs promote to
    cast = read("merge_method: linear\ndtype: bfloat16\n" + entries, tmp_path)
    assert (cast.input_dtype, cast.dtype) == ("bfloat16", "bfloat16")
    out = read("merge_method: linear\ndtype: float32\nout_dtype: float16\n" + entries, tmp_path)
    assert (out.input_dtype, out.dtype) == ("float32", "float16")


def test_an_adapter_is_merged_onto_its_model(models: Path) -> None:
    adapter = models / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "a", "bias": "none"}))
    name = "base_model.model.model.layers.1.self_attn.q_proj"
    low = {f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(4, 2)}
    save_file(low, adapter / "adapter_model.safetensors")
    recipe = read("merge_method: passthrough\nmodels:\n- model: a+adapter\n", models)
    assert recipe.models["adapter"].adapts == "a"
    ours, theirs = merge(recipe), tensors_of(models / "a")
    changed = "model.layers.1.self_attn.q_proj.weight"
    torch.testing.assert_close(ours[changed], theirs[changed] + 2 * 2 * torch.ones(4, 4))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if name != changed)


def test_revisions_of_hub_models_are_kept() -> None:
    from search.mergekit.merge_file import ModelReference, _reference

    reference = ModelReference.model_validate(_reference("org/model@v1+org/lora@main"))
    assert (reference.model.path, reference.model.revision) == ("org/model", "v1")
    assert reference.lora is not None
    assert (reference.lora.path, reference.lora.revision) == ("org/lora", "main")
    assert str(reference) == "org/model@v1+org/lora@main"


def test_models_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for seed, name in enumerate(("x/model", "y/model", "z/base")):
        make_model(tmp_path / name, seed=seed)
    text = "".join(f"- model: {tmp_path}/{name}\n" for name in ("x/model", "y/model", "z/base"))
    recipe = read(f"merge_method: karcher\nmodels:\n{text}", tmp_path)
    # `base` would mean the recipe's base to its vocabulary, so a model of that name is called otherwise.
    assert list(recipe.models) == ["x/model", "y/model", "z/base"]


def test_a_relative_path_that_could_be_two_folders_is_refused(models: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "deep" / "a")
    with pytest.raises(ConfigError, match=r"'a' could be .*write the whole path"):
        read("merge_method: passthrough\nmodels:\n- model: a\n", tmp_path / "deep")


def test_the_chat_template_is_that_of_most_models_or_the_text_given(models: Path) -> None:
    for name, template in (("base", "{{ 1 }}"), ("a", "{{ 2 }}"), ("b", "{{ 2 }}")):
        (models / name / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    text = "merge_method: karcher\nbase_model: base\nmodels:\n- model: a\n- model: b\nchat_template: "
    assert read(text + "auto\n", models).chat_template == "{{ 2 }}"
    recipe = read(text + "'{{ messages }}'\n", models)
    opened = open_sources(open_models(recipe.models, base=recipe.base), recipe)
    assert opened.files["chat_template.jinja"] == b"{{ messages }}"
    with pytest.raises(ConfigError, match=r"merge\.yml:6:1: chat_template: 'chatml' is a template that comes with"):
        read(text + "chatml\n", models)


LINEAR = "merge_method: linear\nmodels:\n- model: a\n  parameters:\n    weight: 1\n"

FAULTS = {
    LINEAR + "dtyp: bfloat16\n": "merge.yml:6:1: dtyp: unknown key; did you mean 'dtype'?",
    LINEAR + "dtype: bfloat17\n": "merge.yml:6:1: dtype: 'bfloat17' is not one of float32, bfloat16, float16, float64; "
    "did you mean 'bfloat16'?",
    LINEAR.replace("weight", "wieght"): "merge.yml:5:5: models.0.parameters.wieght: method 'linear' has no such "
    "parameter; did you mean 'weight'?",
    LINEAR.replace("    weight: 1", "    weight: 1\n    normalize: true"): "merge.yml:6:5: models.0.parameters."
    "normalize: is shared by all models, so that it has no effect here; put it under the global parameters",
    LINEAR.replace("1\n", "one\n"): "merge.yml:5:5: models.0.parameters.weight: must be a number, found 'one'",
    LINEAR.replace("linear", "liner"): "merge.yml:1:1: merge_method: mergekit has no method 'liner'; did you mean "
    "'linear'?",
    LINEAR + "slices: [{sources: [{model: a, layer_range: [0, 1]}]}]\n": "merge.yml:1:1: expected exactly one of "
    "'models', 'slices' and 'modules', with something in it",
    LINEAR.replace("model: a", "model: c"): "merge.yml:3:3: models.0: 'c': no such folder",
    LINEAR + "- model: a\n  parameters: {weight: 2}\n": "merge.yml:6:3: models.1.model: 'a' stands here already; give "
    "every model once",
    LINEAR.replace("weight: 1", "weight: [{fliter: mlp, value: 1}]"): "merge.yml:5:15: models.0.parameters.weight.0."
    "fliter: unknown key; did you mean 'filter'?",
    LINEAR + "tokenizer_source: b\n": "merge.yml:6:1: tokenizer_source: 'b' is not among the models of the file",
    LINEAR + "tokenizer_source: base\n": "merge.yml:6:1: tokenizer_source: the file names no base_model",
    LINEAR.replace("weight: 1", "weight: {filter: mlp, value: 1}"): "merge.yml:2:1: models: method 'linear' needs "
    "'weight' for every model; 'a' has none at 'lm_head.weight'",
    "merge_method: ties\nmodels:\n- model: a\n  parameters: {weight: 1, density: 1.5}\nbase_model: base\n": "merge.yml:"
    "4:27: models.0.parameters.density: found 1.5, expected a value from 0 to 1",
    "merge_method: ties\nmodels:\n- model: a\n  parameters: {weight: 1}\n": "merge.yml:1:1: merge_method: 'ties' takes "
    "differences from a base; name it under base_model",
    "merge_method: slerp\nbase_model: base\nmodels:\n- model: a\n": "merge.yml:1:1: merge_method: method 'slerp' needs "
    "'t'",
    "merge_method: passthrough\nslices:\n- sources:\n  - {model: a, layer_range: [0, 9]}\n": "merge.yml:3:3: slices.0."
    "sources: layer_range [0, 9] goes beyond the 3 layers of 'a'",
    "merge_method: passthrough\nslices:\n- sources:\n  - {model: a, layer_range: [2, 2]}\n": "layer_range [2, 2] holds "
    "no layer",
    "merge_method: task_arithmetic\nbase_model: base\nslices:\n- sources:\n  - {model: a, layer_range: [0, 3], "
    "parameters: {weight: 1}}\n": "base_model 'base' must be one of the sources of every slice",
    "merge_method: passthrough\nmodules:\n  text: {models: [{model: a}]}\n  vision: {models: [{model: a}]}\n": ""
    "modules: found text, vision; models of several modules",
}


@pytest.mark.parametrize(("text", "message"), FAULTS.items(), ids=range(len(FAULTS)))
def test_what_mergekit_ignores_or_trips_over_is_told_in_one_line_with_its_place(
    text: str, message: str, models: Path
) -> None:
    with pytest.raises(MeiosisError) as error:
        read(text, models)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_all_faults_of_a_file_are_told_at_once(models: Path) -> None:
    text = "merge_method: linear\nmodels:\n- {model: a, parameters: {w: 1}}\nparameters: {x: 2}\ndtype: half\n"
    with pytest.raises(ConfigError) as error:
        read(text, models)
    assert len(str(error.value).splitlines()) == 3


def test_what_has_no_effect_in_mergekit_is_noted(models: Path) -> None:
    notes: list[str] = []
    text = (
        "merge_method: linear\nslices:\n- residual_weight: 0.5\n  sources:\n"
        "  - {model: a, layer_range: [0, 3], parameters: {weight: 1}}\nparameters: {int8_mask: true}\n"
    )
    read(text, models, notes)
    assert [note.partition(": ")[0] for note in notes] == ["merge.yml:6:14", "merge.yml:3:3"]
    assert all("has no effect" in note for note in notes)
    notes.clear()
    text = "merge_method: task_arithmetic\nbase_model: base\n"
    text += "models:\n- {model: a, parameters: {weight: 1, density: 0.5}}\n"
    read(text + "parameters: {int8_mask: true, rescale: true}\n", models, notes)
    assert notes == []


def test_meiosis_merge_takes_a_merge_file_as_it_is(models: Path) -> None:
    (models / "merge.yml").write_text(
        "merge_method: task_arithmetic\nbase_model: base\nmodels:\n- {model: a, parameters: {weight: 0.5}}\n"
    )
    result = CliRunner().invoke(cli, ["merge", "merge.yml", "out"])
    assert result.exit_code == 0, result.output
    base, a = tensors_of(models / "base"), tensors_of(models / "a")
    for name, merged in tensors_of(models / "out").items():
        torch.testing.assert_close(merged, base[name] + 0.5 * (a[name] - base[name]))
    # What was written is a recipe of ours, from which the same model can be made again.
    again = read_recipe(models / "out" / "recipe.yaml")
    assert again.base == "base"
    assert all(torch.equal(values, tensors_of(models / "out")[name]) for name, values in merge(again).items())
