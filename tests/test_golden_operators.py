"""The operators that came from mergekit agree with what mergekit 0.1.5 wrote for the same merge files.

Recipes say `compute: inputs`, so that models are merged in their dtype, rounding where mergekit rounds, with torch's
sums. These depend on the width of the processor's vectors; mergekit ran on one with AVX2.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from search.merge.apply import Merger
from search.merge.sources import InMemoryTensors
from search.recipe import Recipe

torch.set_num_threads(1)

SAME_SUMS = torch.backends.cpu.get_cpu_capability() == "AVX2"
"""Whether torch sums here in the order in which it did for mergekit."""

GOLDEN = Path(os.environ.get("MEIOSIS_GOLDEN") or Path(__file__).parent / "golden")
"""Some tensors of every model, or a folder of the same layout with whole models; see its README.md."""

METHODS = (
    "arcee_fusion",
    "breadcrumbs",
    "breadcrumbs_ties",
    "karcher",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "passthrough",
    "ram",
    "ramplus_tl",
    "sce",
)
FAMILIES = ("ll-fp32", "ll-bf16")
LAYER = re.compile(r"(?<=model\.layers\.)\d+")
PER_SOURCE = ("weight", "density", "gamma", "scale")


class Merged(NamedTuple):
    """Tensor name -> ours, mergekit's, and what went in."""

    ours: dict[str, Tensor]
    expected: dict[str, Tensor]
    inputs: dict[str, list[Tensor]]


def cases(family: str) -> Iterator[str]:
    for folder in sorted((GOLDEN / "expected" / family).iterdir()):
        if yaml.safe_load((folder / "config.yaml").read_text())["merge_method"] in METHODS:
            yield folder.name


def load_model(reference: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / reference / "model.safetensors")


def stack_layers(config: dict[str, Any], name: str) -> tuple[str, str, dict[str, Any]]:
    """Model, tensor and parameters behind one tensor of a passthrough merge of slices."""
    part, tensor = config["slices"][0 if "embed" in name else -1], name
    if found := LAYER.search(name):
        left = int(found.group())
        for part in config["slices"]:
            low, high = part["sources"][0]["layer_range"]
            if left < high - low:
                break
            left -= high - low
        tensor = LAYER.sub(str(low + left), name)
    source = part["sources"][0]
    values = {}
    for key, setting in source.get("parameters", {}).items():
        values[key] = next(entry["value"] for entry in setting if entry.get("filter", "") in tensor)
    return source["model"], tensor, values


def split_values(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    own = {key: value for key, value in values.items() if key in PER_SOURCE}
    return own, {key: value for key, value in values.items() if key not in own}


def rule_for(config: dict[str, Any], name: str) -> tuple[dict[str, Any], dict[str, tuple[str, str]]]:
    """The rule of one output tensor, and source name -> (model, tensor) behind it."""
    method, base = config["merge_method"], config.get("base_model")
    if "slices" in config:
        model, tensor, values = stack_layers(config, name)
        return {"tensors": [name], "operator": method, "sources": {model: values}}, {model: (model, tensor)}
    shared = dict(config.get("parameters", {}))
    if base is not None and method in ("nuslerp", "multislerp"):
        shared["task_vectors"] = True
    sources = {}
    for entry in config["models"]:
        own, common = split_values(entry.get("parameters", {}))
        shared |= common
        if entry["model"] != base:
            sources[entry["model"]] = own
    behind = {model: (model, name) for model in [*sources, *([base] if base else [])]}
    return {"tensors": [name], "operator": method, "sources": sources, "parameters": shared}, behind


def merge(family: str, case: str, **changes: Any) -> Merged:
    """One case; ours in the dtype that is computed in."""
    folder = GOLDEN / "expected" / family / case
    config = yaml.safe_load((folder / "config.yaml").read_text())
    expected = load_file(folder / "model.safetensors")
    models: dict[str, dict[str, Tensor]] = {}
    rules, inputs = [], {}
    for name in expected:
        rule, behind = rule_for(config, name)
        rules.append(rule)
        for source, (model, tensor) in behind.items():
            models.setdefault(source, {})[name] = load_model(model)[tensor]
        inputs[name] = [models[source][name] for source in behind]
    data = {
        "base": config.get("base_model"),
        "models": {model: {"path": model} for model in models},
        "rules": rules,
        "compute": "inputs",
        **changes,
    }
    ours = {name: torch.full_like(values[0], 7.0) for name, values in inputs.items()}
    sources = {name: InMemoryTensors(tensors) for name, tensors in models.items()}
    Merger(sources, names=list(expected)).merge_into(Recipe.from_data(data), ours)
    return Merged(ours, expected, inputs)


def units_apart(first: Tensor, second: Tensor) -> Tensor:
    """How many bfloat16 numbers lie between two of them, per element."""
    ordered = []
    for values in (first, second):
        bits = values.view(torch.int16).int()
        ordered.append(torch.where(bits < 0, -(bits & 0x7FFF), bits))
    return (ordered[0] - ordered[1]).abs()


def largest(values: list[Tensor]) -> Tensor:
    return torch.stack([value.double().abs() for value in values]).amax(0)


CASES = [(family, case) for family in FAMILIES for case in cases(family)]


def test_every_deterministic_case_of_these_operators_is_compared() -> None:
    for family in FAMILIES:
        found = [case for other, case in CASES if other == family]
        methods = {
            yaml.safe_load((GOLDEN / "expected" / family / case / "config.yaml").read_text())["merge_method"]
            for case in found
        }
        assert len(found) == 19
        assert methods == set(METHODS)


@pytest.mark.parametrize("case", [case for family, case in CASES if family == "ll-fp32"])
def test_in_float32_has_the_bits_of_mergekit(case: str) -> None:
    merged = merge("ll-fp32", case)
    for name, expected in merged.expected.items():
        assert merged.ours[name].dtype == expected.dtype
        if SAME_SUMS:
            assert torch.equal(merged.ours[name], expected), name
        error = (merged.ours[name].double() - expected.double()).abs()
        assert bool((error <= 1e-6 * largest(merged.inputs[name])).all()), name


@pytest.mark.parametrize("case", [case for family, case in CASES if family == "ll-bf16"])
def test_in_bfloat16_has_the_bits_of_mergekit(case: str) -> None:
    # Two methods give float32 there, which our output, in the dtype of the inputs, rounds once.
    merged = merge("ll-bf16", case)
    differing = total = 0
    for name, expected in merged.expected.items():
        apart = units_apart(merged.ours[name], expected.bfloat16())
        assert int(apart.max()) <= (0 if SAME_SUMS else 1), name
        differing, total = differing + int((apart > 0).sum()), total + apart.numel()
    assert differing <= 1e-3 * total
