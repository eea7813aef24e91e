"""A tiny model whose merged weights are the point that was merged, so that the whole search runs on a landscape.

Of the tensor of a group, source number k holds a one in place k and zeros elsewhere, and the base zeros: after any
merge the first places hold the weights of the sources. It is then the program itself that searches, with its
generation 0, its racing, its driver and its history, and only the scores come from the landscape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from quality.landscapes import POOLS, Landscape, Vector, load

from evaluators.base import Context, Evaluator, Metric, Options, Scores

if TYPE_CHECKING:
    import torch

PLACES = 16
"""Elements of the tensor of a group; at least as many as there are sources."""

METRICS = {
    "nll": Metric("minimize", unit="nats", help="loss of the landscape"),
    "margin": Metric("maximize", low=0, high=1, help="whether the margin is above 0"),
}
NAMES = {"nll": "nll", "margin": "accuracy"}


def write_models(landscape: Landscape, folder: Path) -> None:
    """`base` and the sources as checkpoint folders."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4,
        hidden_size=2,
        intermediate_size=PLACES // 2,
        num_hidden_layers=landscape.groups,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=4,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).float()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    for number, name in enumerate(("base", *landscape.sources), -1):
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight.data.zero_()
            if number >= 0:
                layer.mlp.gate_proj.weight.data.view(-1)[number] = 1.0
        model.save_pretrained(folder / name)


def patterns(landscape: Landscape) -> dict[str, str]:
    """Groups of tensors: a layer each; what is outside of layers goes with the first."""
    found = {f"group{layer}": rf"layers\.{layer}\." for layer in range(1, landscape.groups)}
    return {**found, "group0": "."}


def point_of(model: torch.nn.Module, landscape: Landscape) -> Vector:
    """The point that was merged."""
    layers: Any = model.model.layers
    count = len(landscape.sources)
    rows = [layer.mlp.gate_proj.weight.detach().reshape(-1)[:count].double().numpy() for layer in layers]
    return np.concatenate(rows)


class TableOptions(Options):
    """Options of `TableScores`."""

    landscape: str
    task: str


class TableScores(Evaluator):
    """The scores of one task of a landscape."""

    metrics: Mapping[str, Metric] = METRICS
    Options = TableOptions
    help = "Scores of a landscape."
    options: TableOptions

    def __init__(self, options: TableOptions) -> None:
        super().__init__(options)
        self._landscape = _loaded(options.landscape)
        kind = self._landscape.kind
        self._metric = NAMES[kind]
        self.metrics = {self._metric: METRICS[kind]}
        sizes = self._landscape.tasks[options.task]
        # The search must choose its winner on something: half of the certify items, which count for the curve too.
        self._rows = {f"{pool}/{row}": (pool, row) for pool in POOLS for row in range(sizes[pool])}

    def prepare(self, context: Context) -> None:
        pass

    def items(self, pool: str) -> Sequence[str]:
        if pool == "search":
            return [item for item, (kind, _) in self._rows.items() if kind == "search"]
        half = 0 if pool == "select" else 1
        return [item for item, (kind, row) in self._rows.items() if kind == "certify" and row % 2 == half]

    def evaluate(self, model: torch.nn.Module, items: Sequence[str]) -> Iterator[Scores]:
        point = point_of(model, self._landscape)
        scores = {
            pool: self._landscape.scores(self.options.task, pool, point) for pool in {self._rows[i][0] for i in items}
        }
        values = np.array([scores[pool][row] for pool, row in (self._rows[item] for item in items)])
        if self._landscape.kind == "margin":
            values = (values > 0).astype(np.float64)
        yield Scores(tuple(items), {self._metric: values}, np.ones(len(items)))


_LANDSCAPES: dict[str, Landscape] = {}


def _loaded(name: str) -> Landscape:
    if name not in _LANDSCAPES:
        _LANDSCAPES[name] = load(name)
    return _LANDSCAPES[name]
