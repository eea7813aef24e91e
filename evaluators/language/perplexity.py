"""How well a causal language model predicts texts: negative log-likelihood per token, and perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, model_validator

from evaluators.base import Context, Metric, Scores
from evaluators.errors import UserError
from evaluators.items import ItemEvaluator, text_in
from evaluators.likelihood import Window, score_windows, window_losses
from evaluators.tokens import CAUSAL_ARCHITECTURES, TextEncoder, TextOptions, Tokens

if TYPE_CHECKING:
    import torch


class PerplexityOptions(TextOptions):
    """Options of `perplexity`."""

    field: str = Field("text", min_length=1, description="key of the text in JSONL lines")
    separator: str | None = Field(
        None,
        min_length=1,
        description="what stands between the texts of a text file (default: a file is one text)",
    )
    stride: int | None = Field(
        None,
        ge=1,
        description="tokens from one window of a long text to the next (default max_tokens: no overlap); "
        "smaller is slower, and gives every token at least max_tokens - stride + 1 tokens of context",
    )

    @model_validator(mode="after")
    def _stride_fits(self) -> PerplexityOptions:
        if self.stride and self.max_tokens and self.stride > self.max_tokens:
            raise ValueError(
                f"stride is {self.stride}, more than max_tokens ({self.max_tokens}): tokens between windows "
                "would not be scored"
            )
        return self


class Perplexity(ItemEvaluator):
    """Mean negative log-likelihood per token; an item weighs as much as it has scored tokens.

    The first token of a text has nothing before it and is not scored, unless texts start with a
    beginning-of-sequence token. Every other token is scored exactly once (see `windows_of`).
    """

    metrics: Mapping[str, Metric] = {
        "nll": Metric("minimize", unit="nats/token", low=0, help="negative log-likelihood per token"),
        "perplexity": Metric("minimize", low=1, help="exp(nll) over all tokens of the pool", per_item=False),
    }
    Options = PerplexityOptions
    help = "How well the model predicts texts: token-weighted negative log-likelihood."
    source = "Jelinek 1977, https://doi.org/10.1121/1.2016299"
    architectures = CAUSAL_ARCHITECTURES
    loss_metric = "nll"
    plain_forward = True
    reads_text = True
    options: PerplexityOptions

    def parse(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"text": text_in(record, self.options.field)}

    def prepare(self, context: Context) -> None:
        encoder = TextEncoder(context, self.options)
        stride = self.options.stride or encoder.max_tokens
        if stride > encoder.max_tokens:
            raise UserError(
                f"stride is {stride}, more than max_tokens ({encoder.max_tokens} for this model): tokens "
                f"between windows would not be scored; set stride to at most {encoder.max_tokens}"
            )
        items = list(self.data)
        self._windows: dict[str, tuple[Window, ...]] = {}
        for item, tokens in zip(items, encoder.encode([item.content["text"] for item in items]), strict=True):
            read = tokens if encoder.bos is None else np.concatenate([[encoder.bos], tokens])
            if len(read) < 2:
                raise UserError(
                    f"{item.where}: item '{item.id}' is {len(tokens)} token with the tokenizer of "
                    f"{context.model_folder}, and the first is not scored; remove the item or set add_bos"
                )
            self._windows[item.id] = windows_of(read, encoder.max_tokens, stride)
        self._device = context.device

    def evaluate(self, model: torch.nn.Module, items: Sequence[str]) -> Iterator[Scores]:
        windows = {item: self._windows[item] for item in items}
        for done in score_windows(model, windows, batch_tokens=self.options.batch_tokens, device=self._device):
            per_item = [np.concatenate(parts) for parts in done.values()]
            yield Scores(
                items=tuple(done),
                values={"nll": np.array([-token_logs.mean() for token_logs in per_item])},
                weights=np.array([len(token_logs) for token_logs in per_item], np.float64),
            )

    def losses(self, model: torch.nn.Module, items: Sequence[str]) -> Iterator[tuple[torch.Tensor, float]]:
        windows = {item: self._windows[item] for item in items}
        yield from window_losses(model, windows, batch_tokens=self.options.batch_tokens, device=self._device)

    def aggregate(self, scores: Scores) -> dict[str, float]:
        means = super().aggregate(scores)
        try:
            perplexity = math.exp(means["nll"])
        except OverflowError:
            perplexity = math.inf
        return {**means, "perplexity": perplexity}


def windows_of(tokens: Tokens, max_tokens: int, stride: int) -> tuple[Window, ...]:
    """Windows that together predict every token but the first exactly once.

    Window k reads the tokens k * stride ... k * stride + max_tokens - 1 and is scored on the tokens that
    follow those it read and that no earlier window was scored on. With stride = max_tokens windows do
    not overlap. With a smaller stride every window but the first is scored on its last `stride`
    predictions only, each of which has max_tokens - stride + 1 to max_tokens tokens before it. This is the
    sliding window of the perplexity guide of Hugging Face, whose max_length counts the last target too
    and is thus max_tokens + 1.

    Args:
        tokens: (n,) with n >= 2.
        max_tokens: most tokens that are read at once.
        stride: between 1 and max_tokens.
    """
    windows = []
    scored = 0  # the targets are tokens[1:]; so many of them are done
    for start in range(0, len(tokens) - 1, stride):
        stop = min(start + max_tokens, len(tokens) - 1)
        windows.append(Window(tokens[start:stop], tokens[1 + scored : 1 + stop]))
        scored = stop
        if stop == len(tokens) - 1:
            break
    return tuple(windows)


PLUGIN = Perplexity
