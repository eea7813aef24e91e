"""Models of other families than Llama, end to end: search, export, load with stock transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command_line import meiosis, write_config

from search.evaluation import Evaluation
from search.pool import Job, WorkerPlan
from search.recipe_file import read_recipe


@dataclass(frozen=True)
class Family:
    """A tiny model of a kind, and how to look at it.

    Attributes:
        make: the base, random.
        auto: the class with which its users load it.
        inputs: Python expression of its input, as the function of the evaluator builds it.
        classes: what the loss is over; the last dimension of the logits.
    """

    make: Callable[[], transformers.PreTrainedModel]
    auto: Any
    inputs: str
    classes: int


IDS = "{'input_ids': torch.randint(0, 64, (4, 12), generator=g)}"

FAMILIES = {
    "qwen2": Family(
        lambda: transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(
                vocab_size=64,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=32,
                tie_word_embeddings=True,
            )
        ),
        transformers.AutoModelForCausalLM,
        IDS,
        64,
    ),
    "gpt2": Family(
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
            )
        ),
        transformers.AutoModelForCausalLM,
        IDS,
        64,
    ),
    "bert": Family(
        lambda: transformers.BertForSequenceClassification(
            transformers.BertConfig(
                vocab_size=64,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=32,
                num_labels=3,
            )
        ),
        transformers.AutoModelForSequenceClassification,
        IDS,
        3,
    ),
    "vit": Family(
        lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=16,
                patch_size=8,
                num_labels=4,
            )
        ),
        transformers.AutoModelForImageClassification,
        "{'pixel_values': torch.randn(4, 3, 16, 16, generator=g)}",
        4,
    ),
}

LOSS = """
import torch

def inputs():
    g = torch.Generator().manual_seed(7)
    return {inputs}

def loss(model):
    logits = model(**inputs()).logits.flatten(0, -2)
    g = torch.Generator().manual_seed(8)
    labels = torch.randint(0, {classes}, (len(logits),), generator=g)
    return float(torch.nn.functional.cross_entropy(logits, labels))
"""


def checkpoints(family: Family, folder: Path) -> dict[str, str]:
    """The base and two fine-tunes of it: all weights moved, by other draws."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = family.make()
        for parameter in base.parameters():  # norms and biases start at ones and zeros
            parameter.data += 0.1 * torch.randn_like(parameter)
        paths = {}
        for number, name in enumerate(("base", "left", "right")):
            torch.manual_seed(number)
            model = copy.deepcopy(base)
            if number:
                for parameter in model.parameters():
                    parameter.data += 0.1 * torch.randn_like(parameter)
            paths[name] = str(folder / name)
            model.save_pretrained(paths[name])
    return paths


@pytest.mark.parametrize("operator", ["task_arithmetic", "slerp"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_search_over_another_family_exports_a_model_with_the_logits_of_the_live_one(
    name: str, operator: str, tmp_path: Path
) -> None:
    family = FAMILIES[name]
    paths = checkpoints(family, tmp_path)
    function = tmp_path / "loss.py"
    function.write_text(LOSS.format(inputs=family.inputs, classes=family.classes))
    config = {
        "models": {"base": paths["base"], "sources": {"left": paths["left"], "right": paths["right"]}},
        "space": {"operator": operator},
        "evaluators": {
            "loss": {
                "use": "python",
                "function": f"{function}:loss",
                "metrics": {"value": {"direction": "minimize"}},
            }
        },
        "objectives": ["loss.value"],
        "search": {"budget": 14, "finalists": 2, "baselines": ["uniform_soup", "ties"]},
        "cluster": {"pool": "local"},
        "results": str(tmp_path / "runs"),
    }
    file = write_config(config, tmp_path)
    ended = meiosis("search", file, "--run", "run", "--json")
    assert ended.status == 0, ended.err
    verdict = ended.json["verdict"]
    status = meiosis("status", tmp_path / "runs" / "run", "--json").json
    assert status["done"] == 14
    assert status["failures"] == {}
    assert not verdict["unavailable"]
    # All values differ: every candidate was another model.
    values = [row["value"] for row in verdict["rows"]]
    assert len(set(values)) == len(values) >= 5

    # One that the optimiser found, whether or not it won: no weight of it is a parent's.
    out = tmp_path / "out"
    assert meiosis("export", tmp_path / "runs" / "run", out, "--trial", 13).status == 0
    recipe = read_recipe(out / "recipe.yaml")
    assert {rule.operator for rule in recipe.rules} == {operator}
    body = Evaluation(WorkerPlan(recipe.models, "base", (), "cpu", threads=1))
    outcome = body.run(Job(0, recipe, "search", hash_weights=True))
    assert outcome.failure is None
    live = body._model.model

    model, report = family.auto.from_pretrained(out, output_loading_info=True)
    assert type(model) is type(live) is type(family.make())
    assert not any(report.values()), report
    scope: dict[str, Any] = {}
    exec(function.read_text(), scope)
    with torch.no_grad():
        logits = model.eval()(**scope["inputs"]()).logits
        assert torch.equal(logits, live(**scope["inputs"]()).logits)
        base = family.auto.from_pretrained(paths["base"]).eval()(**scope["inputs"]()).logits
        loss = scope["loss"](model)
    assert not torch.allclose(logits, base)
    assert meiosis("evaluate", out, "--config", file, "--json").json["metrics"] == {"loss.value": loss}
    winner = meiosis("evaluate", ended.json["model"], "--config", file, "--items", "certify", "--json").json
    row = next(row for row in verdict["rows"] if row["candidate"] == verdict["winner"])
    assert winner["metrics"] == row["metrics"]


def test_an_evaluator_of_text_refuses_a_classifier_before_it_is_loaded(
    family_config: dict[str, Any], tmp_path: Path
) -> None:
    model = checkpoints(FAMILIES["vit"], tmp_path)["base"]
    ended = meiosis("evaluate", model, "--config", write_config(family_config, tmp_path))
    assert ended.status == 2
    assert ended.err.count("\n") == 3, ended.err  # one line for each of its three evaluators
    assert "ViTForImageClassification" in ended.err
    assert "ForCausalLM" in ended.err


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_of_another_family_is_in_a_group_of_its_kind(name: str, tmp_path: Path) -> None:
    from search.checkpoints.reading import open_checkpoint
    from search.grouping import group_tensors

    paths = checkpoints(FAMILIES[name], tmp_path)
    tensors = list(open_checkpoint(paths["base"]).tensors)
    groups = group_tensors(tensors, 1, ("attention", "mlp", "norm", "embedding", "head"), {})
    assert sorted(tensor for group in groups for tensor in group.tensors) == sorted(tensors)
    labels = {group.name for group in groups}
    kinds = {"embedding", *(f"layer{i}.{kind}" for i in (0, 1) for kind in ("attention", "mlp", "norm"))}
    assert kinds <= labels, labels
    assert ("head" in labels) == (name in ("bert", "vit"))
