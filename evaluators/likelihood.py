"""Log-probabilities that a causal language model gives to tokens, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluators.batching import plan_batches

if TYPE_CHECKING:
    import torch

    from evaluators.tokens import Tokens

SOFTMAX_ELEMENTS = 1 << 24
"""Most elements of logits that are turned into float32 at once: 64 MiB, not the whole batch."""


@dataclass(frozen=True)
class Window:
    """What the model reads at once, and what it is scored on.

    Attributes:
        tokens: (t,) the input.
        targets: (k,) with k <= t: what the last k positions of the input are to predict.
    """

    tokens: Tokens
    targets: Tokens


LogProbabilities = NDArray[np.float64]


def score_windows(
    model: torch.nn.Module, windows: Mapping[str, Sequence[Window]], *, batch_tokens: int, device: str
) -> Iterator[dict[str, tuple[LogProbabilities, ...]]]:
    """Natural log-probabilities of the targets, for every item as soon as all its windows are done.

    Windows of one item with the same input go through the model once (answers of one token each).

    Args:
        model: causal language model with the Hugging Face forward signature.
        windows: item -> its windows.
        batch_tokens: most input tokens in a batch, padding included.
        device: where the model takes its input.

    Yields:
        After a batch that completed items: item -> (k,) log-probabilities for each of its windows.
    """
    rows = _rows(windows)
    plan = plan_batches([len(row.tokens) for row in rows], [row.name for row in rows], batch_tokens)
    found: dict[str, list[LogProbabilities | None]] = {item: [None] * len(parts) for item, parts in windows.items()}
    for batch in plan:
        chosen = [rows[index] for index in batch]
        scored = iter(
            _forward(
                model,
                [(row.tokens, [windows[row.item][p].targets for p in row.parts]) for row in chosen],
                device,
            )
        )
        for row in chosen:
            for part in row.parts:
                found[row.item][part] = next(scored)
        done = {}
        for item in dict.fromkeys(row.item for row in chosen):
            parts = tuple(part for part in found[item] if part is not None)
            if len(parts) == len(found[item]):
                done[item] = parts
                del found[item]
        if done:
            yield done


def window_losses(
    model: torch.nn.Module, windows: Mapping[str, Sequence[Window]], *, batch_tokens: int, device: str
) -> Iterator[tuple[torch.Tensor, float]]:
    """Negative log-likelihood of all targets with its gradient: for every batch the sum and the number of targets.

    The batches are those of `score_windows`.
    """
    import torch

    rows = _rows(windows)
    for batch in plan_batches([len(row.tokens) for row in rows], [row.name for row in rows], batch_tokens):
        chosen = [rows[index] for index in batch]
        arrays = _arrays([(row.tokens, [windows[row.item][p].targets for p in row.parts]) for row in chosen])
        logits = _logits(model, arrays, device).flatten(0, 1)
        positions, targets = torch.from_numpy(arrays.positions), torch.from_numpy(np.concatenate(arrays.targets))
        predicted = logits[positions.to(device)]
        predicted = predicted.to(torch.float64 if predicted.dtype == torch.float64 else torch.float32)
        yield torch.nn.functional.cross_entropy(predicted, targets.to(device), reduction="sum"), len(targets)


def window_sums(model: torch.nn.Module, windows: Sequence[Window], device: str) -> torch.Tensor:
    """Log-likelihoods of windows with their gradient, (n_windows,) float32, all in one batch."""
    import torch

    rows = _rows({"": windows})
    arrays = _arrays([(row.tokens, [windows[p].targets for p in row.parts]) for row in rows])
    logits = _logits(model, arrays, device).flatten(0, 1)
    predicted = logits[torch.from_numpy(arrays.positions).to(device)].to(torch.float32)
    targets = torch.from_numpy(np.concatenate(arrays.targets)).to(device)
    logs = -torch.nn.functional.cross_entropy(predicted, targets, reduction="none")
    sums = [part.sum() for part in logs.split([len(sequence) for sequence in arrays.targets])]
    order = [part for row in rows for part in row.parts]
    return torch.stack([sums[order.index(part)] for part in range(len(windows))])


@contextmanager
def scoring(model: torch.nn.Module) -> Iterator[None]:
    """Without gradients and without dropout; the model's modes are put back afterwards.

    Not `torch.inference_mode`: its tensors have no version counters, by which the caller sees that
    weights were left alone.
    """
    import torch

    training = [module for module in model.modules() if module.training]
    with torch.no_grad():
        try:
            if training:
                model.eval()
            yield
        finally:
            for module in training:
                module.training = True


@dataclass(frozen=True)
class _Row:
    """One input, and which windows of its item read it."""

    name: str
    item: str
    tokens: Tokens
    parts: tuple[int, ...]


def _rows(windows: Mapping[str, Sequence[Window]]) -> list[_Row]:
    rows = []
    for item, parts in windows.items():
        same: dict[bytes, list[int]] = {}
        for index, window in enumerate(parts):
            same.setdefault(window.tokens.tobytes(), []).append(index)
        for indices in same.values():
            rows.append(_Row(f"{item}\0{indices[0]:09d}", item, parts[indices[0]].tokens, tuple(indices)))
    return rows


class _Arrays(NamedTuple):
    """A batch: padded input and mask (n, t), and what is predicted where, as flat positions in (n * t)."""

    inputs: Tokens
    mask: Tokens
    positions: Tokens
    targets: list[Tokens]


def _arrays(rows: Sequence[tuple[Tokens, Sequence[Tokens]]]) -> _Arrays:
    longest = max(len(tokens) for tokens, _ in rows)
    # Padding stands on the right, where a causal model cannot see it; the mask is for those that look.
    inputs = np.zeros((len(rows), longest), np.int64)
    mask = np.zeros((len(rows), longest), np.int64)
    positions, targets = [], []
    for row, (tokens, sequences) in enumerate(rows):
        inputs[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
        for sequence in sequences:
            positions.append(row * longest + np.arange(len(tokens) - len(sequence), len(tokens)))
            targets.append(sequence)
    return _Arrays(inputs, mask, np.concatenate(positions), targets)


def _logits(model: torch.nn.Module, arrays: _Arrays, device: str) -> torch.Tensor:
    """(n, t, vocabulary)."""
    import torch

    found: torch.Tensor = model(
        input_ids=torch.from_numpy(arrays.inputs).to(device),
        attention_mask=torch.from_numpy(arrays.mask).to(device),
        use_cache=False,
    ).logits
    return found


def _forward(
    model: torch.nn.Module, rows: Sequence[tuple[Tokens, Sequence[Tokens]]], device: str
) -> list[LogProbabilities]:
    """Log-probabilities of every target sequence of every (tokens, target sequences), in order."""
    arrays = _arrays(rows)
    with scoring(model):
        logits = _logits(model, arrays, device)
        flat = _gather(logits.flatten(0, 1), arrays.positions, np.concatenate(arrays.targets))
    return np.split(flat, np.cumsum([len(sequence) for sequence in arrays.targets])[:-1])


def _gather(logits: torch.Tensor, positions: Tokens, targets: Tokens) -> LogProbabilities:
    """log softmax of the logits at (position, target), in float32 (float64 for such models)."""
    import torch

    step = max(1, SOFTMAX_ELEMENTS // logits.shape[1])
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    pieces = []
    for start in range(0, len(positions), step):
        rows = torch.from_numpy(positions[start : start + step]).to(logits.device)
        columns = torch.from_numpy(targets[start : start + step]).to(logits.device)
        chosen = logits[rows].to(dtype)
        wanted = chosen.gather(1, columns[:, None])[:, 0]
        pieces.append((wanted - chosen.logsumexp(1)).cpu().double())  # there are devices without float64
    found: LogProbabilities = torch.cat(pieces).numpy()
    return found
