"""Merges agree with what mergekit 0.1.5 wrote for the same merge files.

In float32 every deterministic case of our operators agrees. In bfloat16 mergekit computes linear and
SLERP in float32, as we do, and the rest in bfloat16 step by step: there its result is compared with
ours within the error of its arithmetic, and TIES, whose trimming and signs turn on such errors,
only where mergekit itself was told to compute in float32.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from search.merge.apply import Merger
from search.merge.sources import InMemoryTensors
from search.recipe import Recipe

torch.set_num_threads(1)

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
if not GOLDEN.is_dir():
    pytest.skip(f"the golden merges are not beside the repository ({GOLDEN})", allow_module_level=True)

DETERMINISTIC = ("linear", "slerp", "task_arithmetic", "ties")
IGNORED = {
    "int8_mask",  # only a dtype of temporaries
    "density:task_arithmetic",
}
LAYER = re.compile(r"model\.layers\.(\d+)\.")


def cases(family: str) -> Iterator[str]:
    """Names of the cases whose method is one of ours and whose output does not depend on a generator."""
    for folder in sorted((GOLDEN / "expected" / family).iterdir()):
        if yaml.safe_load((folder / "config.yaml").read_text())["merge_method"] in DETERMINISTIC:
            yield folder.name


def load_model(reference: str, cast: str | None) -> dict[str, torch.Tensor]:
    tensors = load_file(GOLDEN / reference / "model.safetensors")
    return {name: tensor.to(getattr(torch, cast)) if cast else tensor for name, tensor in tensors.items()}


def read_value(setting: Any, tensor: str, position: float) -> Any:
    """A parameter at one tensor: a number, a gradient over layers, or a list of filtered values."""
    if isinstance(setting, dict) or (isinstance(setting, list) and setting and isinstance(setting[0], dict)):
        for entry in [setting] if isinstance(setting, dict) else setting:
            if entry.get("filter", "*") == "*" or entry["filter"] in tensor:
                return read_value(entry["value"], tensor, position)
        return None
    if isinstance(setting, list):
        x = position * (len(setting) - 1)
        low = int(x)
        high = min(low + 1, len(setting) - 1)
        return (1 - (x - low)) * setting[low] + (x - low) * setting[high]
    return setting


def recipe_of(config: dict[str, Any], tensors: list[str], layers: int) -> Recipe:
    """Our recipe for a merge file whose output layers are the input layers, one rule per tensor."""
    method, base = config["merge_method"], config.get("base_model")
    slices = config.get("slices") or [
        {"sources": [{**entry, "layer_range": [0, layers]} for entry in config["models"]]}
    ]
    names: dict[str, str] = {}
    for reference in [base, *(source["model"] for part in slices for source in part["sources"])]:
        if reference is not None:
            names.setdefault(reference, reference.replace("inputs/", "").replace("/", " "))
    rules = []
    for tensor in tensors:
        layer = LAYER.match(tensor)
        if layer is None:
            part = slices[0] if "embed" in tensor else slices[-1]
            position = 0.0
        else:
            at = int(layer.group(1))
            (part,) = [p for p in slices if p["sources"][0]["layer_range"][0] <= at < p["sources"][0]["layer_range"][1]]
            low, high = part["sources"][0]["layer_range"]
            position = 1.0 if high - low == 1 else (at - low) / (high - low - 1)
        scopes = [part.get("parameters", {}), config.get("parameters", {})]

        def look_up(key: str, scopes: list[dict[str, Any]], tensor: str = tensor, position: float = position) -> Any:
            for scope in scopes:
                if key in scope and (value := read_value(scope[key], tensor, position)) is not None:
                    return value
            return None

        sources: dict[str, dict[str, Any]] = {}
        for source in part["sources"]:
            if source["model"] == base and method not in ("linear", "slerp"):
                continue
            own = [source.get("parameters", {}), *scopes]
            found = {key: look_up(key, own) for key in ("weight", "density") if method != "slerp"}
            sources[names[source["model"]]] = {
                key: value
                for key, value in found.items()
                if value is not None and not (key == "density" and method != "ties")
            }
        shared = {
            key: value
            for key in ("t", "normalize", "lambda", "rescale")
            if (value := look_up(key, scopes)) is not None
        }
        rules.append({"tensors": [tensor], "operator": method, "sources": sources, "parameters": shared})
    if method == "slerp":  # t = 0 is the base, wherever it is listed
        first = names[base]
        for rule in rules:
            rule["sources"] = {first: {}, **rule["sources"]}
    models = {name: {"path": reference} for reference, name in names.items()}
    needs_base = method in ("task_arithmetic", "ties")
    return Recipe.from_data({"base": names[base] if needs_base else None, "models": models, "rules": rules})


def merge(family: str, case: str, cast: str | None = None) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(ours, mergekit's) for one case, ours written in the dtype of mergekit's output."""
    folder = GOLDEN / "expected" / family / case
    config = yaml.safe_load((folder / "config.yaml").read_text())
    expected = load_file(folder / "model.safetensors")
    layers = 1 + max(int(match.group(1)) for name in expected if (match := LAYER.match(name)))
    recipe = recipe_of(config, list(expected), layers)
    models = {
        name: InMemoryTensors(load_model(ref.path, cast or config.get("dtype"))) for name, ref in recipe.models.items()
    }
    ours = {name: torch.full_like(tensor, 7.0) for name, tensor in expected.items()}
    Merger(models).merge_into(recipe, ours)
    return ours, expected


