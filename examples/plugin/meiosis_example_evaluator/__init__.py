"""How much a model repeats itself when it writes: distinct n-grams of greedy continuations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from evaluators.base import Context, Metric, Scores
from evaluators.items import DataOptions, ItemEvaluator, text_in

if TYPE_CHECKING:
    import torch


class DistinctNgramsOptions(DataOptions):
    """What may stand beside `use: distinct_ngrams`; where the items are is inherited."""

    n: int = Field(2, ge=1, description="tokens per n-gram")
    new_tokens: int = Field(32, ge=2, description="tokens to generate after each prompt")


class DistinctNgrams(ItemEvaluator):
    """Share of the n-grams of a continuation that differ; 1 is no repetition, near 0 is a loop."""

    metrics: Mapping[str, Metric] = {
        "distinct": Metric("maximize", low=0, high=1, help="different n-grams / n-grams of a continuation"),
    }
    Options = DistinctNgramsOptions
    help = "How much greedy continuations of prompts repeat themselves."
    source = "Li et al. 2016, https://arxiv.org/abs/1510.03055"
    architectures = ("ForCausalLM", "LMHeadModel")
    options: DistinctNgramsOptions

    def parse(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"prompt": text_in(record, "prompt")}

    def prepare(self, context: Context) -> None:
        from evaluators.tokens import load_tokenizer

        tokenizer = load_tokenizer(context.model_folder)
        self._prompts = {
            item.id: tokenizer(item.content["prompt"], return_tensors="pt")["input_ids"].to(context.device)
            for item in self.data
        }

    def evaluate(self, model: torch.nn.Module, items: Sequence[str]) -> Iterator[Scores]:
        for item in items:
            value = distinct(self._continue(model, item), self.options.n)
            yield Scores((item,), {"distinct": np.array([value])}, np.ones(1))

    def _continue(self, model: Any, item: str) -> list[int]:
        """The tokens that follow a prompt, the most likely one each time."""
        prompt, count = self._prompts[item], self.options.new_tokens
        written = model.generate(
            prompt,
            attention_mask=prompt.new_ones(prompt.shape),
            do_sample=False,
            num_beams=1,
            min_new_tokens=count,
            max_new_tokens=count,
            pad_token_id=0,
        )
        tokens: list[int] = written[0, prompt.shape[1] :].tolist()
        return tokens


def distinct(tokens: Sequence[int], n: int) -> float:
    """Different n-grams divided by n-grams; 1 where there are none."""
    ngrams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 1.0
