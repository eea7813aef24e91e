"""Every mistake in a config ends in its own one-line error that names the key, and in exit status 2."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import meiosis

from meiosis.cli.main import main
from search.machine import has_gpu

Edit = Callable[[dict[str, Any], Path], None]


def put(path: str, value: Any) -> Edit:
    """Set `a.b.c`; a number is an index."""

    def edit(config: dict[str, Any], folder: Path) -> None:
        here: Any = config
        *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        for part in parents:
            here = here.setdefault(part, {}) if isinstance(here, dict) else here[part]
        here[last] = value

    return edit


def drop(path: str) -> Edit:
    def edit(config: dict[str, Any], folder: Path) -> None:
        here: Any = config
        *parents, last = path.split(".")
        for part in parents:
            here = here[part]
        del here[last]

    return edit


def other_model(change: Callable[[dict[str, Any]], None]) -> Edit:
    """Replace source `cpp` by a copy whose config.json differs."""

    def edit(config: dict[str, Any], folder: Path) -> None:
        copy = folder / "other"
        shutil.copytree(config["models"]["sources"]["cpp"], copy)
        data = json.loads((copy / "config.json").read_text())
        change(data)
        (copy / "config.json").write_text(json.dumps(data))
        config["models"]["sources"]["cpp"] = str(copy)

    return edit


def other_shape(config: dict[str, Any], folder: Path) -> None:
    from transformers import AutoConfig, LlamaForCausalLM

    small = AutoConfig.from_pretrained(config["models"]["base"])
    small.intermediate_size = 40
    LlamaForCausalLM(small).save_pretrained(folder / "small")
    config["models"]["sources"]["cpp"] = str(folder / "small")


def no_weights(config: dict[str, Any], folder: Path) -> None:
    shutil.copytree(config["models"]["sources"]["cpp"], folder / "empty")
    (folder / "empty" / "model.safetensors").unlink()
    config["models"]["sources"]["cpp"] = str(folder / "empty")


def same_text_in_two_pools(config: dict[str, Any], folder: Path) -> None:
    data = config["evaluators"]["python"]["data"]
    copy = folder / "leak.jsonl"
    copy.write_text(Path(data["search"]).read_text())
    data["certify"] = str(copy)


def broken_jsonl(config: dict[str, Any], folder: Path) -> None:
    path = folder / "broken.jsonl"
    path.write_text('{"id": "a", "text": "some text"}\n{"id": "b", "text": \n')
    config["evaluators"]["python"]["data"]["search"] = str(path)


def empty_data(config: dict[str, Any], folder: Path) -> None:
    (folder / "empty.jsonl").write_text("")
    config["evaluators"]["python"]["data"]["search"] = str(folder / "empty.jsonl")


SPACE = "space.parameters.weight"

MISTAKES: dict[str, tuple[Edit, list[str]]] = {
    "unknown top key": (put("evaluatorz", {}), ["evaluatorz", "unknown key", "did you mean 'evaluators'?"]),
    "unknown search key": (put("search.budgett", 3), ["search.budgett", "did you mean 'budget'?"]),
    "unknown cluster key": (put("cluster.worker", 3), ["cluster.worker", "did you mean 'workers'?"]),
    "unknown key in a gene range": (
        put(f"{SPACE}.lo", 0),
        ["space.parameters.weight.lo", "did you mean 'low'?"],
    ),
    "unknown evaluator option": (put("evaluators.python.strid", 4), ["evaluators.python.strid", "'stride'?"]),
    "no models": (drop("models"), ["models", "missing"]),
    "no base": (drop("models.base"), ["models.base", "missing"]),
    "no sources": (put("models.sources", {}), ["models.sources", "at least 1"]),
    "no evaluators": (put("evaluators", {}), ["evaluators", "at least 1"]),
    "no objectives": (drop("objectives"), ["objectives", "missing"]),
    "budget is a word": (put("search.budget", "many"), ["search.budget", "integer", "'many'"]),
    "budget below the parents": (put("search.budget", 3), ["search.budget", "too small", "at least 5"]),
    "local pool with GPUs": (put("cluster.gpus_per_worker", 1), ["cluster", "pool: local knows no address"]),
    "an address without a port": (
        put("cluster.address", "127.0.0.1"),
        ["cluster.address", "'127.0.0.1' is not the address of a Ray head; expected host:port"],
    ),
    "a GPU and a half": (
        put("cluster.gpus_per_worker", 1.5),
        ["cluster.gpus_per_worker", "a fraction of one GPU or a whole number of GPUs, found 1.5"],
    ),
    "budget is zero": (put("search.budget", 0), ["search.budget", "greater than or equal to 1"]),
    "negative seed": (put("seed", -1), ["seed", "greater than or equal to 0"]),
    "no workers": (put("cluster.workers", 0), ["cluster.workers", "greater than or equal to 1"]),
    "workers is a fraction": (put("cluster.workers", 1.5), ["cluster.workers", "integer"]),
    "bounds crossed": (
        put(SPACE, {"low": 1, "high": 0}),
        ["space.parameters.weight", "low must be below high"],
    ),
    "initial out of bounds": (
        put(SPACE, {"low": 0, "high": 1, "initial": 2}),
        ["space.parameters.weight", "initial 2 lies outside"],
    ),
    "infinite bound": (put(SPACE, {"low": 0, "high": float("inf")}), [f"{SPACE}.high", "finite"]),
    "infinite value": (put(SPACE, float("inf")), [SPACE, "finite"]),
    "value is a list": (put(SPACE, [0, 1]), [SPACE, "number", "[0, 1]"]),
    "value is a word": (put(SPACE, "half"), [SPACE, "number", "'half'"]),
    "value beyond the operator": (
        put("space", {"operator": "ties", "parameters": {"density": 3.0}}),
        ["space.parameters.density", "3"],
    ),
    "section without content": (put("cluster", None), ["cluster", "mapping of keys", "nothing"]),
    "bound without a number": (put(f"{SPACE}.high", None), [f"{SPACE}.high", "number", "nothing"]),
    "bound missing": (drop(f"{SPACE}.high"), [f"{SPACE}.high", "missing"]),
    "impossible density": (
        put("space", {"operator": "ties", "parameters": {"density": {"low": 0, "high": 2}}}),
        ["space.parameters.density", "beyond"],
    ),
    "unknown operator": (
        put("space.operator", "task_arithmetics"),
        ["space.operator", "did you mean 'task_arith"],
    ),
    "unknown parameter": (
        put("space.parameters.wieght", 1.0),
        ["parameters.wieght", "did you mean 'weight'?"],
    ),
    "slerp of three": (put("space", {"operator": "slerp"}), ["space.operator", "exactly 2 sources", "has 3"]),
    "nothing to search": (put(SPACE, 0.5), ["space.parameters", "nothing to search"]),
    "unknown split": (put("space.split", ["attn"]), ["space.split.0", "'attn'", "attention"]),
    "bad pattern": (put("space.patterns", {"early": "("}), ["space.patterns", "not a regular expression"]),
    "pattern without tensors": (
        put("space.patterns", {"early": "qqq"}),
        ["patterns.early", "no tensor name matches"],
    ),
    "unknown evaluator": (
        put("evaluators.python.use", "perplexitty"),
        ["evaluators.python.use", "'perplexity'?"],
    ),
    "evaluator without use": (drop("evaluators.python.use"), ["evaluators.python.use", "missing"]),
    "module that is not there": (
        put("evaluators.python.use", "nowhere:Thing"),
        ["cannot be imported", "nowhere"],
    ),
    "unknown metric": (put("objectives.terms.0", "python.nnl"), ["objectives", "did you mean 'python.nll'?"]),
    "metric without evaluator": (put("objectives.terms.0", "nll"), ["objectives", "pattern"]),
    "weight zero": (
        put("objectives.terms.0", {"metric": "python.nll", "weight": 0}),
        ["weight", "greater than 0"],
    ),
    "constraint that is none": (
        put("constraints", ["python.nll < 3"]),
        ["constraints.0", "not a constraint"],
    ),
    "constraint on nothing": (
        put("constraints", ["cpp.acc <= 3"]),
        ["constraints.0", "no evaluator gives 'cpp.acc'"],
    ),
    "unknown optimizer": (
        put("search.optimizer", "TwoPointDE"),
        ["search.optimizer", "did you mean 'TwoPointsDE'?"],
    ),
    "banned optimizer": (
        put("search.optimizer", "NGOpt"),
        ["search.optimizer", "refused", "crashes in mid-run"],
    ),
    "threaded optimizer": (put("search.optimizer", "Cobyla"), ["search.optimizer", "refused", "never end"]),
    "unknown baseline": (
        put("search.baselines", ["greedysoup"]),
        ["baselines.0", "did you mean 'greedy_soup'?"],
    ),
    "unknown order": (put("search.order", "orderd"), ["search.order", "'orderd'", "'ordered' or 'arrival'"]),
    "base folder missing": (put("models.base", "./nowhere"), ["models.base", "nowhere"]),
    "source folder missing": (
        put("models.sources.cpp", "/no/such/model"),
        ["models.sources.cpp", "/no/such/model"],
    ),
    "a source called base": (
        put("models.sources.base", "x"),
        ["models.sources", "'base' names the base model"],
    ),
    "other architecture": (
        other_model(lambda data: data.update(architectures=["MistralForCausalLM"], model_type="mistral")),
        ["models.sources.cpp", "Mistral", "Llama"],
    ),
    "weights missing": (no_weights, ["models.sources.cpp", "model.safetensors"]),
    "other shapes": (other_shape, ["models.sources.cpp", "shape"]),
    "data file missing": (
        put("evaluators.python.data.search", "nowhere.jsonl"),
        ["evaluators.python", "nowhere.jsonl"],
    ),
    "data file broken": (broken_jsonl, ["evaluators.python", "broken.jsonl:2"]),
    "data file empty": (empty_data, ["evaluators.python", "empty.jsonl"]),
    "same text in two pools": (same_text_in_two_pools, ["evaluators.python", "certify", "search"]),
    "bad device": (put("cluster.device", "gpu"), ["cluster.device", "'gpu'"]),
    "bad dtype": (put("cluster.dtype", "fp32"), ["cluster.dtype", "'fp32'", "float32"]),
    "bad name": (put("name", "my run/1"), ["name", "my run/1"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line_that_names_the_key_and_status_2(
    mistake: str,
    family_config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    edit, expected = MISTAKES[mistake]
    edit(family_config, tmp_path)
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(family_config, sort_keys=False))
    status, stdout, stderr = run(["plan", str(path)], monkeypatch, capsys)
    assert status == 2, stderr
    assert stdout == ""
    lines = [line for line in stderr.splitlines() if line.startswith("meiosis: ")]
    assert len(lines) == 1, stderr
    assert stderr.count("\n") == 1, stderr
    for text in expected:
        assert text in lines[0], lines[0]
    assert lines[0].startswith(f"meiosis: {path}:"), lines[0]
    line, column = lines[0].removeprefix(f"meiosis: {path}:").split(":")[:2]
    assert line.isdigit()
    assert column.isdigit()


def run(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["meiosis", *arguments])
    capsys.readouterr()  # what transformers said while the mistake was made
    with pytest.raises(SystemExit) as ended:
        main()
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("models: [unclosed\n", "not valid YAML"),
        ("- a\n- b\n", "expected a mapping"),
        ("", "expected a mapping"),
        ("seed: 1\nseed: 2\n", "2:1: seed: stands twice"),
        ("a: &a {b: *a}\n", "an alias that contains itself"),
        ("seed: !!python/object:os.system x\n", "not valid YAML"),
        ("\tseed: 1\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_config_is_refused_in_one_line(
    text: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    status, _, stderr = run(["plan", str(path)], monkeypatch, capsys)
    assert status == 2
    assert expected in stderr
    assert stderr.count("\n") == 1


def test_all_faults_of_a_config_are_reported_at_once(
    family_config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for edit in (
        put("search.optimizer", "NGOpt"),
        put("space.operator", "tiess"),
        put("models.base", "./nowhere"),
    ):
        edit(family_config, tmp_path)
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(family_config, sort_keys=False))
    status, _, stderr = run(["plan", str(path)], monkeypatch, capsys)
    assert status == 2
    assert stderr.count("\n") == 3
    for key in ("search.optimizer", "space.operator", "models.base"):
        assert f" {key}: " in stderr


def test_a_line_number_points_at_the_key(tmp_path: Path) -> None:
    from search.errors import ConfigError
    from search.yaml_source import YamlSource

    source = YamlSource("a: 1\nsearch:\n  budget: 2\n  deep:\n    - x: 1\n    - y: 2\n", "my.yaml")
    assert source.fault(("search", "budget"), "m") == "my.yaml:3:3: search.budget: m"
    assert source.fault(("search", "deep", 1, "y"), "m") == "my.yaml:6:7: search.deep.1.y: m"
    with pytest.raises(ConfigError, match="2:1: a: stands twice"):
        YamlSource("a: 1\na: 2\n", "my.yaml")


def test_set_replaces_values_of_the_config(family_config: dict[str, Any], tmp_path: Path) -> None:
    from search.config import load_config
    from search.errors import ConfigError

    path = tmp_path / "good.yaml"
    path.write_text(yaml.safe_dump(family_config))
    loaded = load_config(path, ("search.budget=7", "space.layers_per_group=0", "cluster.device=cpu"))
    assert loaded.config.search.budget == 7
    assert loaded.config.space.layers_per_group == 0
    with pytest.raises(ConfigError, match=r"search\.budgt"):
        load_config(path, ("search.budgt=7",))
    with pytest.raises(ConfigError, match=r"expected key\.path=value"):
        load_config(path, ("search.budget",))


@pytest.mark.parametrize(("key", "value"), [("device", "cuda"), ("gpus_per_worker", 1)])
def test_a_gpu_that_is_not_there_is_noticed_before_the_run_exists(
    key: str, value: object, family_config: dict[str, Any], tmp_path: Path
) -> None:
    if has_gpu():
        pytest.skip("this machine has a GPU")
    put("cluster.pool", "ray")(family_config, tmp_path)
    put(f"cluster.{key}", value)(family_config, tmp_path)
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(family_config))
    ended = meiosis("search", path, "--run", "one")
    assert ended.status == 2
    assert f"cluster.{key}: this machine has no GPU" in ended.err
    assert not (tmp_path / "results").exists()
