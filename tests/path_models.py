"""Tiny models of the families whose layers can form a path, and recipes of paths over them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from search.merge.apply import Merger
from search.merge.live import LiveModel, build_live_model
from search.paths.worker import Paths
from search.recipe import Recipe
from search.sources import open_models, open_sources

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 40}
PREFIX = {"llama": "model.layers", "qwen2": "model.layers", "mistral": "model.layers", "gpt2": "transformer.h"}
LAYERS = 4


def save_model(kind: str, folder: Path, seed: int) -> Path:
    """A model with random weights, none of them at its usual first value, whose hidden states are about 1."""
    import transformers

    shared = {**SMALL, "num_hidden_layers": LAYERS, "num_key_value_heads": 1, "tie_word_embeddings": False}
    made: dict[str, Any] = {
        "llama": lambda: transformers.LlamaConfig(attention_bias=True, mlp_bias=True, **shared),
        "qwen2": lambda: transformers.Qwen2Config(
            use_sliding_window=True, sliding_window=6, max_window_layers=2, **shared
        ),
        "mistral": lambda: transformers.MistralConfig(sliding_window=5, **shared),
        "gpt2": lambda: transformers.GPT2Config(n_layer=LAYERS, n_embd=16, n_head=2, vocab_size=40, n_positions=64),
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(made[kind]())
        for name, parameter in model.named_parameters():
            norm = "norm" in name or "ln_" in name
            width = 1.0 if "embed" in name or "wte" in name or "wpe" in name else 0.25
            torch.nn.init.normal_(parameter, mean=1.0 if norm and name.endswith("weight") else 0.0, std=width)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return folder


def save_pair(kind: str, folder: Path) -> dict[str, Path]:
    """A base and one other model."""
    return {name: save_model(kind, folder / name, seed) for seed, name in enumerate(("base", "other"))}


def path_recipe(
    kind: str,
    models: dict[str, Path],
    hops: Sequence[tuple[str, int]],
    scales: Sequence[float],
    operator: str = "linear",
    **more: Any,
) -> Recipe:
    """A path through layers of `merged` (0.3 of the base and 0.7 of the other), `base` and `other`."""
    both = {"base": {"weight": 0.3}, "other": {"weight": 0.7}}
    merged: dict[str, Any] = {"operator": "linear", "sources": both}
    if operator != "linear":
        merged = {"operator": operator, "sources": {"other": {"weight": 0.7, "density": 0.5}}}
    rules: list[dict[str, Any]] = []
    for index, (entry, _) in enumerate(hops):
        one = {"operator": "linear", "sources": {entry: {"weight": 1.0}}}
        rules.append({"tensors": [f"{PREFIX[kind]}.{index}.*"], **(merged if entry == "merged" else one)})
    rules.append({"tensors": ["*"], **merged})
    layers = [{name: layer for name in ("base", "other")} for _, layer in hops]
    refs = {name: {"path": str(path)} for name, path in models.items()}
    data = {"base": "base", "models": refs, "rules": rules, "layers": layers, "scales": list(scales), **more}
    return Recipe.from_data(data)


class Worker:
    """The part of a worker that merges: a live model, which paths can be taken on."""

    def __init__(self, models: dict[str, Path]) -> None:
        refs = Recipe.from_data(
            {
                "models": {name: {"path": str(path)} for name, path in models.items()},
                "rules": [{"operator": "linear", "sources": {"base": {}}}],
            }
        ).models
        opened = open_sources(open_models(refs, base="base"), models=refs, donor="base")
        read_as: dict[str, str] = {}
        self.merger = Merger(opened.tensors, read_as=read_as)
        self.live: LiveModel = build_live_model(models["base"], device="cpu", dtype=None)
        names = tuple(opened.tensors["base"].names)
        self.targets = self.live.targets(names)
        self.paths = Paths(self.live, self.merger, read_as, self.targets, names)

    @contextmanager
    def on(self, recipe: Recipe) -> Iterator[Any]:
        """The model on a path."""
        with self.paths.on(recipe):
            yield self.live.model


def logits(model: Any, tokens: int = 12) -> torch.Tensor:
    """(2, tokens, vocabulary) of two sequences."""
    ids = (torch.arange(2 * tokens) * 7 % 40).reshape(2, tokens)
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


def greedy(model: Any, *, use_cache: bool = True) -> list[list[int]]:
    """Twelve tokens generated after five, for two sequences."""
    ids = (torch.arange(10) * 11 % 40).reshape(2, 5)
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=0,
    )
    found: list[list[int]] = made[:, 5:].tolist()
    return found
