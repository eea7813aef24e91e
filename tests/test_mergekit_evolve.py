"""Search files of mergekit-evolve become configs of ours; what they ask for beyond that is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from merge_files import make_model

from meiosis.cli.main import cli
from search.config import Config
from search.errors import ConfigError
from search.mergekit.evolve import Converted, read_evolve_file
from search.recipe import ModelRef
from search.space import make_space
from search.yaml_source import YamlSource

FILE = """\
genome:
  models: [a, b]
  merge_method: dare_ties
  base_model: base
  layer_granularity: 1
  allow_negative_weights: true
  filters: [self_attn, mlp]
tasks:
- gsm8k_train
- name: arc_challenge_train
  weight: 0.5
  metric: acc_norm,none
"""


def convert(text: str) -> tuple[dict[str, Any], Converted]:
    converted = read_evolve_file(YamlSource(text, "evolve.yml"))
    return yaml.safe_load(converted.text), converted


def filled_in(data: dict[str, Any]) -> Config:
    """With an evaluator, as the file asks for, the config is one of ours."""
    evaluators = {"task": {"use": "multiple_choice"}}
    return Config.model_validate({**data, "evaluators": evaluators, "objectives": ["task.accuracy"]})


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate(("base", "a", "b")):
        make_model(tmp_path / name, seed=seed)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_genome_becomes_a_space(models: Path) -> None:
    data, _ = convert(FILE)
    assert data["models"] == {"base": str(models / "base"), "sources": {"a": str(models / "a"), "b": str(models / "b")}}
    assert data["space"]["operator"] == "dare_ties"
    assert data["space"]["layers_per_group"] == 1
    assert data["space"]["patterns"] == {"self_attn": "self_attn", "mlp": "mlp"}
    assert data["space"]["parameters"] == {
        "weight": {"low": -1.0, "high": 1.0, "initial": 0.5},
        "density": {"low": 0.0, "high": 1.0, "initial": 0.9},
        "normalize": True,
    }
    config = filled_in(data)
    names = [
        f"model.layers.{k}.{part}.weight" for k in range(3) for part in ("self_attn.q_proj", "mlp.up_proj", "norm")
    ]
    refs = {name: ModelRef(path=name) for name in ("base", "a", "b")}
    space = make_space(config.space, tensors=names, models=refs, sources=config.models.sources)
    assert len(space.genes) == len(space.groups) * 4


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_ties", "slerp"])
def test_every_method_gives_a_config_of_ours(method: str) -> None:
    text = f"genome:\n  models: [a, b]\n  merge_method: {method}\n  base_model: base\ntasks: [x]\n"
    config = filled_in(convert(text)[0])
    assert config.space.operator == method
    assert config.space.layers_per_group == 0


def test_normalize_and_bounds_of_weights_are_those_of_the_file() -> None:
    text = "genome: {models: [a, b], merge_method: linear, normalize: false}\ntasks: [x]\n"
    data, converted = convert(text)
    assert data["space"]["parameters"] == {
        "weight": {"low": 0.0, "high": 1.0, "initial": 0.5},
        "normalize": False,
    }
    assert any("names no base_model" in note for note in converted.notes)


def test_tasks_are_left_for_the_user_to_fill_in() -> None:
    _, converted = convert(FILE)
    assert "# TO BE FILLED IN: what scores a candidate." in converted.text
    assert "#   arc_challenge_train, metric acc_norm,none, weight 0.5" in converted.text
    with pytest.raises(Exception, match="evaluators"):
        Config.model_validate(yaml.safe_load(converted.text))


@pytest.mark.parametrize(
    ("key", "note"),
    [
        ("  smooth: true\n", "evolve.yml:8:3: genome.smooth: values interpolated over layers are not searched here"),
        ("  tokenizer_source: union\n", "evolve.yml:8:3: genome.tokenizer_source: a search wants models with one"),
        ("", "evolve.yml:7:3: genome.filters: tensors that match a pattern share genes over all layers here"),
        ("", "evolve.yml:5:3: genome.layer_granularity: mergekit-evolve gives the embedding the genes of the first"),
    ],
)
def test_what_a_search_does_otherwise_is_noted_with_its_line(key: str, note: str) -> None:
    _, converted = convert(FILE.replace("tasks:", f"{key}tasks:"))
    assert any(line.startswith(note) for line in converted.notes), converted.notes


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("layer_granularity", "layer_granularty", "evolve.yml:5:3: genome.layer_granularty: unknown key; did you mean"),
        ("tasks:", "limits: 3\ntasks:", "evolve.yml:8:1: limits: unknown key; did you mean 'limit'?"),
        ("dare_ties", "della", "evolve.yml:3:3: genome.merge_method: 'della' is not possible; expected 'linear'"),
        ("  base_model: base\n", "", "evolve.yml:1:1: genome: 'dare_ties' needs a base_model"),
        ("[a, b]", "[a, a]", "evolve.yml:2:3: genome.models: names a model twice"),
        (
            "tasks:\n- gsm8k_train",
            "tasks:\n- {name: x, wieght: 1}",
            "evolve.yml:9:13: tasks.0.wieght: unknown key; did",
        ),
    ],
)
def test_faults_are_told_with_their_line(old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        convert(FILE.replace(old, new))
    assert str(error.value).startswith(message)
    assert len(str(error.value).splitlines()) == 1


def test_the_command_prints_the_config_and_says_what_is_missing(models: Path) -> None:
    (models / "evolve.yml").write_text(FILE)
    result = CliRunner().invoke(cli, ["mergekit", "evolve.yml"])
    assert result.exit_code == 0
    assert yaml.safe_load(result.stdout)["space"]["operator"] == "dare_ties"
    assert "The config lacks evaluators and objectives" in result.stderr
    merged = CliRunner().invoke(cli, ["merge", "evolve.yml", "out"])
    assert "is a search file of mergekit-evolve; `meiosis mergekit evolve.yml`" in str(merged.exception)
