"""Tiny checkpoints in the layout of Llama, written by hand, for tests of merge files and layers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from search.merge.apply import Merger
from search.mergekit.reader import read_merge_file
from search.recipe import Recipe
from search.sources import open_models, open_sources
from search.yaml_source import YamlSource

LAYER_SHAPES = {
    "input_layernorm.weight": (4,),
    "mlp.down_proj.weight": (4, 6),
    "self_attn.q_proj.weight": (4, 4),
}


def make_model(folder: Path, *, layers: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A folder with random tensors of a Llama of `layers` layers with a head of its own."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"lm_head.weight": (8, 4), "model.embed_tokens.weight": (8, 4), "model.norm.weight": (4,)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{rest}": shape for rest, shape in LAYER_SHAPES.items()}
    folder.mkdir(parents=True)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": 4,
        "num_attention_heads": 2,
        "intermediate_size": 6,
        "vocab_size": 8,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read(text: str, folder: Path, notes: list[str] | None = None) -> Recipe:
    """The recipe of a merge file with this text that lies in `folder`."""
    return read_merge_file(YamlSource(text, "merge.yml"), folder, (notes if notes is not None else []).append)


def merge(recipe: Recipe, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """What a recipe makes, by the path that every merge takes; by default all tensors."""
    opened = open_sources(open_models(recipe.models, base=recipe.base), recipe)
    merger = Merger(opened.tensors, names=opened.names, statistics=opened.statistics)
    return dict(merger.merge_tensors(recipe, names))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")
