"""How large a model is and how many layers it runs, counted on the live model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from evaluators.base import Context, Evaluator, ItemPool, Metric, Scores

if TYPE_CHECKING:
    import torch


class Cost(Evaluator):
    """Properties of the model, the same on every pool: each pool has one item, which stands for the model itself.

    A tensor that several modules share counts once, so the repeated layers of a path cost layers but no parameters.
    """

    metrics: Mapping[str, Metric] = {
        "parameters": Metric("minimize", low=0, help="numbers in the distinct parameters of the model"),
        "bytes": Metric("minimize", unit="bytes", low=0, help="memory of the distinct parameters, in their dtype"),
        "layers": Metric(
            "minimize", unit="layers", low=0, help="layers that an input runs through, repeated ones each time"
        ),
    }
    help = "How large the model is: its parameters, their bytes, and the layers it runs."
    exact = True

    def prepare(self, context: Context) -> None:
        """There is nothing to prepare."""

    def items(self, pool: ItemPool) -> Sequence[str]:
        return (f"model-{pool}",)

    def evaluate(self, model: torch.nn.Module, items: Sequence[str]) -> Iterator[Scores]:
        parameters = list(model.parameters())  # torch names a shared one once
        found = {
            "parameters": float(sum(parameter.numel() for parameter in parameters)),
            "bytes": float(sum(parameter.numel() * parameter.element_size() for parameter in parameters)),
            "layers": float(count_layers(model)),
        }
        for item in items:
            yield Scores((item,), {name: np.array([value]) for name, value in found.items()}, np.ones(1))


def count_layers(model: torch.nn.Module) -> int:
    """Entries of the outermost lists of modules of one kind, a repeated module each time; encoder and decoder
    together. Without such a list what the config says, or 0."""
    import torch

    total = 0
    pending: list[torch.nn.Module] = [model]
    seen: set[int] = set()
    while pending:
        module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, torch.nn.ModuleList) and len({type(layer) for layer in module}) == 1:
            total += len(module)
        else:
            pending += module.children()
    return total or int(getattr(getattr(model, "config", None), "num_hidden_layers", 0) or 0)


PLUGIN = Cost
