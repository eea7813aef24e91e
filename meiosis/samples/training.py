"""Training of small causal language models on the CPU, to the same bits whatever the thread count.

Work is cut into pieces that never depend on the number of threads (half batches of the base, whole
specialists), each piece runs on one torch thread, and sums are taken in a fixed order. Python threads
carry the pieces: torch lets go of the interpreter lock inside its kernels, and for matrices this small
two such threads double the throughput, while two threads inside a kernel gain little on free cores
and stall for whole time slices on busy ones.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from meiosis.samples.corpus import Document, Item

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
Report = Callable[[str], None]


class Phase(BaseModel):
    """Length and speed of one training run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(ge=1)
    batch: int = Field(ge=2, description="windows per step")
    learning_rate: float = Field(gt=0, description="peak, of AdamW")
    final: float = Field(0.0, ge=0, le=1, description="learning rate at the end, as a part of the peak")


class ModelShape(BaseModel):
    """Size of the models."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vocabulary: int = Field(1024, ge=300)
    hidden: int = Field(128, ge=8)
    layers: int = Field(4, ge=1)
    heads: int = Field(2, ge=1)
    mlp: int = Field(192, ge=8)
    window: int = Field(160, ge=16, description="training context in tokens")


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer (`PreTrainedTokenizerFast`) that puts `<s>` before every text.

    Any text survives encoding and decoding. Ids 0, 1, 2 are `<pad>`, `<s>`, `</s>`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def new_model(shape: ModelShape, tokenizer: Any, seed: int) -> Any:
    """A freshly initialised `LlamaForCausalLM`. Sets torch's global seed: for processes of our own."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=2 * shape.window,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
        dtype="float32",
    )
    return LlamaForCausalLM(config).train()


def stream(documents: Sequence[Document], tokenizer: Any) -> Tensor:
    """(n,) int64: the tokens of all documents, each closed by `</s>`."""
    import torch

    encoded = tokenizer.backend_tokenizer.encode_batch([d.text for d in documents], add_special_tokens=False)
    return torch.tensor([token for one in encoded for token in (*one.ids, tokenizer.eos_token_id)])


@dataclass
class Windows:
    """Training windows out of one stream, endlessly: `<s>` and `length - 1` consecutive tokens.

    An epoch covers the stream once without overlap, from a random phase and in random order.
    """

    tokens: Tensor
    length: int
    bos: int
    generator: torch.Generator

    def __iter__(self) -> Iterator[Tensor]:
        import torch

        width = self.length - 1
        count = (len(self.tokens) - width) // width
        if count < 1:
            raise ValueError(f"{len(self.tokens)} tokens are too few for windows of {self.length}")
        first = torch.tensor([self.bos])
        while True:
            phase = int(torch.randint(width, (1,), generator=self.generator))
            for index in torch.randperm(count, generator=self.generator).tolist():
                start = phase + index * width
                yield torch.cat((first, self.tokens[start : start + width]))


def batches(sources: Sequence[Windows], size: int) -> Iterator[Tensor]:
    """(size, length) batches that take their windows from the sources in turn."""
    import torch

    turns = [iter(source) for source in sources]
    turn = 0
    while True:
        rows = []
        for _ in range(size):
            rows.append(next(turns[turn % len(turns)]))
            turn += 1
        yield torch.stack(rows)


def train(
    model: Any,
    data: Iterator[Tensor],
    phase: Phase,
    *,
    name: str,
    report: Report,
    pool: ThreadPoolExecutor | None = None,
) -> None:
    """Train a model in place with AdamW, a linear warm-up and a cosine decay.

    Args:
        model: in training mode.
        data: (batch, window) token batches.
        name: of the model, for the progress lines.
        pool: threads that each run one half of a batch; None: both halves run here, to the same bits.
    """
    import torch

    twin = _twin(model)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        fused=True,
    )
    began = time.monotonic()
    warmup = max(1, min(phase.steps // 10, 50))
    for step in range(phase.steps):
        progress = max(0.0, (step - warmup) / max(1, phase.steps - warmup))
        decay = phase.final + (1 - phase.final) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = phase.learning_rate * min((step + 1) / warmup, decay)
        halves = next(data).chunk(2)
        if pool is None:
            losses = [_backward(half, batch) for half, batch in zip((model, twin), halves, strict=True)]
        else:
            losses = list(pool.map(_backward, (model, twin), halves))
        with torch.no_grad():
            for mine, other in zip(parameters, twin.parameters(), strict=True):
                mine.grad.add_(other.grad)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        twin.zero_grad(set_to_none=False)
        if (step + 1) % 50 == 0 or step + 1 == phase.steps:
            seconds = time.monotonic() - began
            report(f"{name}: step {step + 1}/{phase.steps}, loss {sum(losses):.2f}, {seconds:.0f} s")


def _twin(model: Any) -> Any:
    """A second module on the same weights, with gradients of its own."""
    twin = copy.deepcopy(model)
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        other.data = mine.data
    return twin


def _backward(model: Any, tokens: Tensor) -> float:
    """Add the gradient of half the mean NLL of half a batch, `tokens` (windows, length); return that half."""
    from torch.nn.functional import cross_entropy

    logits = model(input_ids=tokens, use_cache=False).logits
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()) / 2
    loss.backward()
    return float(loss.detach())


def nll_per_token(model: Any, tokenizer: Any, items: Sequence[Item], batch: int = 16) -> float:
    """Mean negative log-likelihood in nats per token of the items, each read after `<s>`."""
    import torch
    from torch.nn.functional import cross_entropy

    encoded = sorted((tokenizer(item.text)["input_ids"] for item in items), key=len)
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(encoded), batch):
            rows = [torch.tensor(ids) for ids in encoded[start : start + batch]]
            tokens = torch.nn.utils.rnn.pad_sequence(rows, True, tokenizer.pad_token_id)
            targets = torch.nn.utils.rnn.pad_sequence(rows, True, -100)[:, 1:]
            # Causal attention: what is padded on the right cannot reach the tokens that count.
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
            summed = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
            total += float(summed)
            count += sum(len(ids) - 1 for ids in encoded[start : start + batch])
    return total / count


def losses_of(
    models: Mapping[str, Any], tokenizer: Any, items: Mapping[str, Sequence[Item]], pool: ThreadPoolExecutor
) -> dict[str, dict[str, float]]:
    """Model name -> key of `items` -> nats per token."""
    pairs = [(model, key) for model in models for key in items]
    values = pool.map(lambda pair: nll_per_token(models[pair[0]], tokenizer, items[pair[1]]), pairs)
    result: dict[str, dict[str, float]] = {model: {} for model in models}
    for (model, key), value in zip(pairs, values, strict=True):
        result[model][key] = value
    return result
