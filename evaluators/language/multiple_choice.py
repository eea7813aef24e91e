"""Questions with given answers: which of them the model finds most likely."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from evaluators.base import Context, Metric, Scores
from evaluators.errors import UserError
from evaluators.items import Item, ItemEvaluator, checked_text, text_in
from evaluators.likelihood import Window, score_windows, window_sums
from evaluators.tokens import CAUSAL_ARCHITECTURES, TextEncoder, TextOptions, Tokens

if TYPE_CHECKING:
    import torch


class MultipleChoiceOptions(TextOptions):
    """Options of `multiple_choice`."""

    delimiter: str = Field(" ", description="text between context and choice, empty for none")


class MultipleChoice(ItemEvaluator):
    """Accuracy by the likelihood of the choices after the context.

    Lines are `{"context": .., "choices": [.., ..], "answer": index from 0 or the choice itself}`.
    Tokenised as lm-evaluation-harness does: white space at the end of the context belongs to the choice,
    context and context + delimiter + choice are encoded, and the tokens past the context are the
    choice's. A context that is too long loses its beginning. `acc` is its metric of that name; `acc_norm`
    divides by the choice's length in UTF-8 bytes, without the delimiter (there `acc_bytes`, and the same as
    `acc_norm` where choices are ASCII). Among equally likely choices the first one counts as chosen.
    """

    metrics: Mapping[str, Metric] = {
        "acc": Metric("maximize", low=0, high=1, help="share of items whose answer is the most likely choice"),
        "acc_norm": Metric("maximize", low=0, high=1, help="the same by log-likelihood per byte of the choice"),
        "nll": Metric(
            "minimize",
            unit="nats",
            low=0,
            help="-log of the answer's share of the choices' likelihood; smoother",
        ),
    }
    Options = MultipleChoiceOptions
    help = "Questions with given answers, scored by the likelihood of each: raw and per byte."
    source = "Brown et al. 2020, https://arxiv.org/abs/2005.14165; lm-evaluation-harness"
    architectures = CAUSAL_ARCHITECTURES
    loss_metric = "nll"
    plain_forward = True
    options: MultipleChoiceOptions

    def parse(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        context = text_in(record, "context", empty=True)
        for key in ("choices", "answer"):
            if key not in record:
                raise ValueError(f"no key '{key}'; the line has {', '.join(map(repr, record))}")
        given, answer = record["choices"], record["answer"]
        if not isinstance(given, list) or len(given) < 2:
            raise ValueError("'choices' must be a list of at least 2 texts")
        choices = [checked_text(choice, f"choices[{index}]") for index, choice in enumerate(given)]
        for index, choice in enumerate(choices):
            if choice in choices[:index]:
                raise ValueError(f"choices[{choices.index(choice)}] and choices[{index}] are the same: {choice!r}")
        return {"context": context, "choices": choices, "answer": _index_of(answer, choices)}

    def prepare(self, context: Context) -> None:
        encoder = TextEncoder(context, self.options)
        items = list(self.data)
        pairs = [
            _pair(item.content["context"], self.options.delimiter + choice)
            for item in items
            for choice in item.content["choices"]
        ]
        befores = encoder.encode([before for before, _ in pairs])
        wholes = encoder.encode([before + after for before, after in pairs])
        self._windows: dict[str, tuple[Window, ...]] = {}
        encoded = iter(zip(befores, wholes, strict=True))
        for item in items:
            windows = []
            for index in range(len(item.content["choices"])):
                before, whole = next(encoded)
                windows.append(_window(encoder, before, whole, f"{item.where}: choices[{index}] of item '{item.id}'"))
            self._windows[item.id] = tuple(windows)
        self._device = context.device

    def evaluate(self, model: torch.nn.Module, items: Sequence[str]) -> Iterator[Scores]:
        windows = {item: self._windows[item] for item in items}
        for done in score_windows(model, windows, batch_tokens=self.options.batch_tokens, device=self._device):
            rows = [_score(self.data[item], np.array([part.sum() for part in parts])) for item, parts in done.items()]
            columns = np.array(rows).T
            yield Scores(tuple(done), dict(zip(self.metrics, columns, strict=True)), np.ones(len(rows)))

    def losses(self, model: torch.nn.Module, items: Sequence[str]) -> Iterator[tuple[torch.Tensor, float]]:
        for item in items:
            logs = window_sums(model, self._windows[item], self._device)
            yield logs.logsumexp(0) - logs[self.data[item].content["answer"]], 1.0


def _index_of(answer: Any, choices: Sequence[str]) -> int:
    if isinstance(answer, str):
        if answer not in choices:
            raise ValueError(f"'answer' is {answer!r}, which is none of the choices")
        return choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int):
        raise ValueError(f"'answer' is {answer!r}, expected the index of a choice, or the choice itself")
    if not 0 <= answer < len(choices):
        raise ValueError(f"'answer' is {answer}, expected 0 to {len(choices) - 1}: there are {len(choices)} choices")
    return answer


def _pair(context: str, continuation: str) -> tuple[str, str]:
    """Both texts, with the white space at the end of the context moved to the continuation."""
    before = context.rstrip()
    return before, context[len(before) :] + continuation


def _window(encoder: TextEncoder, before: Tokens, whole: Tokens, where: str) -> Window:
    """What to read and to predict for one choice, given the tokens of the context and of both."""
    targets = whole[len(before) :]
    if not len(targets):
        raise UserError(f"{where} adds no token to its context; set a delimiter, or end the context with a space")
    if len(targets) > encoder.max_tokens:
        raise UserError(f"{where} has {len(targets)} tokens, but the model reads {encoder.max_tokens} at once")
    start = encoder.bos if len(before) or encoder.bos is not None else encoder.prefix
    if start is None and not len(before):
        raise UserError(f"{where} has an empty context, and the tokenizer no token to stand for it; add a context")
    read = np.concatenate([[] if start is None else [start], before, targets]).astype(np.int64)
    return Window(read[-encoder.max_tokens - 1 : -1], targets)


def _score(item: Item, logs: NDArray[np.float64]) -> tuple[float, float, float]:
    """acc, acc_norm and nll of an item from the log-likelihoods of its choices, (n_choices,)."""
    if np.isnan(logs).any():
        return (float("nan"),) * 3
    answer, lengths = item.content["answer"], [len(choice.encode()) for choice in item.content["choices"]]
    return (
        float(np.argmax(logs) == answer),
        float(np.argmax(logs / lengths) == answer),
        float(np.logaddexp.reduce(logs) - logs[answer]),
    )


PLUGIN = MultipleChoice
