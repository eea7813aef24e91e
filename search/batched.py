"""Several candidates in one forward pass, for models so small that a pass costs more than what it computes.

The weights of K candidates stand in one tensor each; torch.func runs the model over all of them at once. Evaluators
see nothing of it: their chunks are asked for in turn, and the first that calls the model gets what it asked for,
while the rest waits for the others, who call with the same input. There are always K, so what a candidate computes
does not depend on how many came with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from evaluators.base import Evaluator, Scores
from search.errors import UserError
from search.prefix.layers import find_layers
from search.prefix.passes import input_key


class _Answers(NamedTuple):
    """What the model gave to all candidates for one input, by slot, until it is fetched."""

    key: bytes
    outputs: dict[int, Any]


class BatchedModel:
    """K candidates with the architecture of one live model.

    Args:
        model: in eval mode; holds one candidate at a time, which `put` copies.
        count: K.

    Attributes:
        passes: forward passes that each candidate was part of.
    """

    def __init__(self, model: nn.Module, count: int) -> None:
        self.count, self.passes = count, 0
        self._model = model
        left_out = {
            f"{prefix}.{name}" if prefix else name
            for prefix, module in model.named_modules()
            for name in module._non_persistent_buffers_set
        }
        own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self._live = {name: tensor.detach() for name, tensor in own.items() if name not in left_out}
        self._stack = {name: tensor.new_empty((count, *tensor.shape)) for name, tensor in self._live.items()}
        self._slot = 0
        self._within = False
        self._answers: dict[int, _Answers] = {}
        self._calls = [0] * count

    @property
    def layers(self) -> int:
        """How many layers a pass runs."""
        found = find_layers(self._model)
        return 0 if found is None else len(found)

    def put(self, slot: int) -> None:
        """Take what the live model holds for the candidate in a slot."""
        for name, tensor in self._live.items():
            self._stack[name][slot].copy_(tensor)

    def pad(self, used: Sequence[int]) -> None:
        """Fill the slots that are not used."""
        for slot in sorted(set(range(self.count)) - set(used)):
            for stacked in self._stack.values():
                stacked[slot].copy_(stacked[used[0]])

    def check(self) -> None:
        """Raise `UserError` unless torch can run this model over several sets of weights at once."""
        self.put(0)
        self.pad([0])
        ids = torch.zeros((1, 2), dtype=torch.int64, device=next(self._model.parameters()).device)
        try:
            with torch.no_grad():
                self._together((), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False})
        except (RuntimeError, ValueError, TypeError) as error:
            line = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(
                f"cluster.candidates_per_forward is {self.count}, but torch cannot run {type(self._model).__name__} "
                f"over several sets of weights at once: {line}; set it to 1"
            ) from error

    def evaluate(
        self, evaluator: Evaluator, slots: Sequence[int], items: Sequence[str]
    ) -> dict[int, Scores | BaseException]:
        """Scores of the candidates in these slots, or what the evaluator raised for one.

        Args:
            evaluator: one with `plain_forward`.
        """
        self._answers, self._calls = {}, [0] * self.count
        chunks: dict[int, list[Scores]] = {slot: [] for slot in slots}
        found: dict[int, Scores | BaseException] = {}
        with self._answering():
            running = {slot: iter(evaluator.evaluate(self._model, items)) for slot in slots}
            while running:
                for slot, scores in list(running.items()):
                    self._slot = slot
                    try:
                        chunks[slot].append(next(scores))
                    except StopIteration:
                        found[slot] = Scores.join(chunks[slot])
                        del running[slot]
                    except (torch.OutOfMemoryError, MemoryError):
                        raise
                    except (Exception, SystemExit) as error:  # noqa: BLE001 - the outcome of its candidate
                        found[slot] = error
                        del running[slot]
                # Calls that all have behind them, or that nobody will make any more.
                least = min((self._calls[slot] for slot in running), default=0)
                self._answers = {call: kept for call, kept in self._answers.items() if call >= least}
        self._answers = {}
        return found

    @contextmanager
    def _answering(self) -> Iterator[None]:
        own = vars(self._model).get("forward")
        original = self._model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **kwargs) if self._within else self._answer(args, kwargs)

        self._model.forward = forward
        try:
            yield
        finally:
            if own is None:
                del self._model.forward
            else:
                self._model.forward = own

    def _answer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        slot, call = self._slot, self._calls[self._slot]
        self._calls[slot] += 1
        key = input_key(args, kwargs)
        known = self._answers.get(call)
        if key is None or (known is not None and known.key != key):
            return self._alone(slot, args, kwargs)
        if known is None:
            outputs = self._together(args, kwargs)
            known = self._answers[call] = _Answers(key, dict(enumerate(outputs)))
            self.passes += 1
        return known.outputs.pop(slot)

    def _together(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """What the model gives, for every slot."""
        kinds: list[Any] = []

        def run(weights: Mapping[str, Tensor]) -> Any:
            output = functional_call(self._model, dict(weights), args, kwargs)
            if isinstance(output, Mapping):
                kinds.append(type(output))
                return {name: value for name, value in output.items() if isinstance(value, Tensor)}
            return output

        self._within = True
        try:
            with warnings.catch_warnings():
                # Of attention on a CPU, which runs candidate by candidate.
                warnings.filterwarnings("ignore", message="There is a performance drop")
                found = vmap(run)(self._stack)
        finally:
            self._within = False
        if kinds:
            return [kinds[0](**{name: value[slot] for name, value in found.items()}) for slot in range(self.count)]
        if isinstance(found, tuple):
            return [tuple(value[slot] for value in found) for slot in range(self.count)]
        return [found[slot] for slot in range(self.count)]

    def _alone(self, slot: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._within = True
        try:
            weights = {name: stacked[slot] for name, stacked in self._stack.items()}
            return functional_call(self._model, weights, args, kwargs)
        finally:
            self._within = False
