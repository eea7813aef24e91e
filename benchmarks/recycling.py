"""The tables of results/reference/recycling.md: how many steps an older model's weights save.

    python benchmarks/recycling.py                       three seeds, about 30 minutes of one core
    python benchmarks/recycling.py --seeds 0 --steps 100 a short look

A small BERT is trained with masked tokens. GPT-2 models of the same size then start from parts of it, and from
nothing. A second study grows a GPT-2 that was trained for half as long. The seed decides the initial weights, the
order of the data and the masks; every model of a seed sees the same batches. The learning rate is constant after
the warm-up, so that the loss after n steps does not depend on how many were planned. What is finished is kept in
results/recycling-study; the command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from recycling_report import markdown_table, mean_and_spread, reading, table_rows
from results_page import machine, versions
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM

from meiosis.samples.corpus import read_corpus
from meiosis.samples.training import Windows, batches, stream, train_tokenizer
from search.checkpoints.reading import open_checkpoint
from search.recycling.bert_parts import BertOptions, Component
from search.recycling.bert_plan import plan_bert
from search.recycling.growth import GrowthOptions, plan_growth
from search.recycling.mapping import Plan
from search.recycling.write import write_recycled
from search.seeds import seeded

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "results" / "reference"

INITIAL_STD = 0.08
"""Of all new weights: the usual 0.02 suits hidden sizes near 1000; here attention would stay flat for long."""

VOCABULARY, LAYERS, HIDDEN, HEADS, WINDOW, BATCH = 264, 3, 64, 4, 64, 16
RATE, BERT_RATE, WARMUP = 2e-3, 3e-3, 20
VALIDATE_EVERY, VALIDATION_WINDOWS = 20, 96
STEPS, BERT_STEPS, MASKED = 320, 2000, 0.2

NOTHING: frozenset[Component] = frozenset()
EMBEDDINGS: frozenset[Component] = frozenset({"embeddings"})
ATTENTION: frozenset[Component] = frozenset({"attention"})
MLP: frozenset[Component] = frozenset({"mlp"})
BODY: frozenset[Component] = ATTENTION | MLP | frozenset({"norms"})
SINES = "scratch, sine positions"
"""A control: the donor's positions started as sines, so without it their share would pass for knowledge."""

RECYCLED: dict[str, BertOptions] = {
    "scratch": BertOptions(components=NOTHING),
    SINES: BertOptions(components=NOTHING),
    "embeddings only": BertOptions(components=EMBEDDINGS),
    "body without embeddings": BertOptions(components=BODY),
    "attention + embeddings": BertOptions(components=EMBEDDINGS | ATTENTION),
    "MLP + embeddings": BertOptions(components=EMBEDDINGS | MLP),
    "all, norms of the same index": BertOptions(norm_order="same-index"),
    "all, norms shifted": BertOptions(),
    "all, shifted, input scaled": BertOptions(scale_input=True),
    "pre-LN with head, scratch": BertOptions(to="megatron-bert-causal", components=NOTHING),
    "pre-LN with head, all but the head": BertOptions(to="megatron-bert-causal", keep_head=False),
    "pre-LN with head, all": BertOptions(to="megatron-bert-causal"),
    "pre-LN with head, all, input scaled": BertOptions(to="megatron-bert-causal", scale_input=True),
    "BERT run causally, scratch": BertOptions(to="bert-causal", components=NOTHING),
    "BERT run causally, all": BertOptions(to="bert-causal"),
}
"""Name -> what is taken from the BERT."""

DEEP: dict[str, Any] = {"layers": 2 * LAYERS}
WIDE: dict[str, Any] = {"hidden": 2 * HIDDEN}
GROWN: dict[str, GrowthOptions | None] = {
    "deeper, scratch": None,
    "deeper, stack": GrowthOptions(**DEEP, depth="stack"),
    "deeper, interlace": GrowthOptions(**DEEP, depth="interlace"),
    "deeper, identity": GrowthOptions(**DEEP, depth="identity"),
    "wider, scratch": None,
    "wider, FPI": GrowthOptions(**WIDE),
    "wider, FPI, uneven": GrowthOptions(**WIDE, asymmetry=0.5),
    "wider, AKI": GrowthOptions(**WIDE, width="aki"),
}
"""Name -> how the small GPT-2 grows; None: the large one from nothing."""


class Data:
    """Text of the sample family: English and Python, byte-level BPE, one token more for the mask."""

    def __init__(self) -> None:
        corpus = read_corpus(0)
        train = [document for domain in ("english", "python") for document in corpus[domain].train]
        self.tokenizer = train_tokenizer([d.text[:4000] for d in train[::4]], VOCABULARY)
        self.streams = [stream(corpus[domain].train, self.tokenizer) for domain in ("english", "python")]
        self.mask = len(self.tokenizer)
        self.size = len(self.tokenizer) + 1
        rows = []
        for domain in ("english", "python"):
            ids = [self.tokenizer(item.text)["input_ids"][:WINDOW] for item in corpus[domain].items["certify"]]
            rows += [row for row in ids if len(row) == WINDOW][: VALIDATION_WINDOWS // 2]
        self.validation = torch.tensor(rows)

    def batches(self, seed: int, purpose: int) -> Iterator[Tensor]:
        """(BATCH, WINDOW) tokens, half of them English."""
        bos = self.tokenizer.bos_token_id
        generators = [torch.Generator().manual_seed(1_000_003 * seed + 101 * purpose + i) for i in range(2)]
        return batches([Windows(s, WINDOW, bos, g) for s, g in zip(self.streams, generators, strict=True)], BATCH)


def causal_loss(model: Any, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def masked_loss(data: Data, generator: torch.Generator) -> Callable[[Any, Tensor], Tensor]:
    """BERT's loss (Devlin 2018): of the chosen tokens, 80 % are masked, 10 % replaced, 10 % left."""

    def loss(model: Any, tokens: Tensor) -> Tensor:
        draw, kind = (torch.rand(tokens.shape, generator=generator) for _ in range(2))
        chosen = draw < MASKED
        chosen[:, 0] = False
        others = torch.randint(3, data.mask, tokens.shape, generator=generator)
        seen = torch.where(chosen & (kind < 0.8), data.mask, torch.where(chosen & (kind > 0.9), others, tokens))
        return cross_entropy(model(input_ids=seen).logits[chosen], tokens[chosen])

    return loss


def train(
    model: Any,
    data: Iterator[Tensor],
    steps: int,
    loss_of: Callable[[Any, Tensor], Tensor],
    validate: Callable[[Any], float] | None = None,
    at_step: Callable[[int], None] = lambda _: None,
    rate: float = RATE,
) -> tuple[list[float], float]:
    """Losses at steps 0, VALIDATE_EVERY, 2 VALIDATE_EVERY, ..., and CPU seconds of the training alone."""
    torch.set_num_threads(1)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        fused=True,
    )
    losses, seconds = [], 0.0
    for step in range(steps + 1):
        if validate is not None and step % VALIDATE_EVERY == 0:
            losses.append(validate(model))
        at_step(step)
        if step == steps:
            break
        began = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / WARMUP)
        model.train()
        loss_of(model, next(data)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.process_time() - began
    return losses, seconds


def validation(data: Data) -> Callable[[Any], float]:
    def validate(model: Any) -> float:
        model.eval()
        with torch.no_grad():
            return float(causal_loss(model, data.validation))

    return validate


def new_bert(data: Data, seed: int) -> Any:
    """A BERT whose positions start as sines: random ones keep a small model at the unigram loss for long."""
    config = BertConfig(
        vocab_size=data.size,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * HIDDEN,
        max_position_embeddings=WINDOW,
        initializer_range=INITIAL_STD,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        bos_token_id=data.tokenizer.bos_token_id,
        eos_token_id=data.tokenizer.eos_token_id,
        pad_token_id=data.tokenizer.pad_token_id,
    )
    with seeded(seed):
        model = BertForMaskedLM(config)
    model.bert.embeddings.position_embeddings.weight.data.copy_(sines())
    return model


def sines() -> Tensor:
    """(WINDOW, HIDDEN) positions (Vaswani 2017), as large as the other embeddings: at size 1 they drown words."""
    angle = torch.arange(WINDOW)[:, None] / 10000 ** (torch.arange(0, HIDDEN, 2) / HIDDEN)
    return torch.stack((angle.sin(), angle.cos()), dim=2).flatten(1) * INITIAL_STD * math.sqrt(2)


def load(plan: Plan, folder: Path) -> Any:
    """The model of a plan, through the checkpoint that a user would get."""
    write_recycled(plan, folder, overwrite=True)
    return AutoModelForCausalLM.from_pretrained(folder)


class Study:
    """Runs what is not yet in the file, a line for every trained model."""

    def __init__(self, folder: Path, steps: int, bert_steps: int) -> None:
        self.folder, self.steps, self.bert_steps = folder, steps, bert_steps
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "cells.jsonl"
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.cells: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self.data = Data()

    def done(self, seed: int, name: str) -> bool:
        return any((cell["seed"], cell["model"]) == (seed, name) for cell in self.cells)

    def keep(self, seed: int, name: str, losses: list[float], seconds: float, model: Any) -> None:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        cell = {"seed": seed, "model": name, "seconds": seconds, "parameters": parameters, "losses": losses}
        with self.file.open("a") as file:
            file.write(json.dumps(cell) + "\n")
        self.cells.append(cell)
        final = f", {losses[0]:.3f} -> {losses[-1]:.3f}" if losses else ""
        print(f"seed {seed}: {name}: {seconds:.0f} CPU s{final}", flush=True)

    def run_seed(self, seed: int) -> None:
        folder = self.folder / f"seed-{seed}"
        self._bert(seed, folder / "bert")
        bert = open_checkpoint(folder / "bert")
        for name, options in RECYCLED.items():
            if self.done(seed, name):
                continue
            model = load(plan_bert(bert, replace(options, seed=seed)), folder / "start")
            if name == SINES:
                model.transformer.wpe.weight.data.copy_(sines())

            def save_small(step: int, model: Any = model, name: str = name) -> None:
                if name == "scratch" and step == self.steps // 2:
                    model.save_pretrained(folder / "small")

            self._train(seed, name, model, save_small)
        small = open_checkpoint(folder / "small")
        for name, growth in GROWN.items():
            if self.done(seed, name):
                continue
            if growth is None:
                large = plan_growth(small, GrowthOptions(**(DEEP if name.startswith("deeper") else WIDE)))
                config = load(large, folder / "start").config
                with seeded(seed):
                    model = AutoModelForCausalLM.from_config(config)
            else:
                model = load(plan_growth(small, replace(growth, seed=seed)), folder / "start")
            self._train(seed, name, model)

    def _bert(self, seed: int, folder: Path) -> None:
        if self.done(seed, "BERT"):
            return
        model = new_bert(self.data, seed)
        loss = masked_loss(self.data, torch.Generator().manual_seed(seed))
        held_out = self.data.validation

        def validate(model: Any) -> float:
            masks = masked_loss(self.data, torch.Generator().manual_seed(0))
            model.eval()
            with torch.no_grad():
                return float(masks(model, held_out))

        losses, seconds = train(model, self.data.batches(seed, 1), self.bert_steps, loss, validate, rate=BERT_RATE)
        model.save_pretrained(folder)
        self.keep(seed, "BERT", losses, seconds, model)

    def _train(self, seed: int, name: str, model: Any, at_step: Callable[[int], None] = lambda _: None) -> None:
        batches_ = self.data.batches(seed, 2)
        losses, seconds = train(model, batches_, self.steps, causal_loss, validation(self.data), at_step)
        self.keep(seed, name, losses, seconds, model)


def markdown(
    study: Study,
    recycled: list[dict[str, Any]],
    against_sines: list[dict[str, Any]],
    grown: list[dict[str, Any]],
    command: str,
) -> str:
    seeds = sorted({cell["seed"] for cell in study.cells})
    berts = [cell for cell in study.cells if cell["model"] == "BERT"]
    masked = mean_and_spread([cell["losses"][-1] for cell in berts], 3)
    lines = [
        "# Recycling: what an older model's weights save",
        "",
        f"English and Python text of the sample family, byte-level BPE of {VOCABULARY} tokens (nearly bytes),",
        f"{LAYERS} layers, hidden {HIDDEN}, {HEADS} heads, {BATCH} windows of {WINDOW} tokens a step, AdamW with a",
        f"constant rate of {RATE:g} after {WARMUP} steps, no dropout, new weights N(0, {INITIAL_STD:g}). Loss: nats",
        f"per token of {VALIDATION_WINDOWS} held-out windows, every {VALIDATE_EVERY} steps. Target: the final loss of",
        "the model from nothing, of the same seed. Mean ± standard deviation over the seeds; a seed changes initial",
        "weights, masks and the order of the data, and has its own donor. All models of a seed see the same batches.",
        "CPU seconds are process time of the training steps alone. Small models on one kind of text at one learning",
        "rate: what the rows say about each other is the result, not the numbers.",
        "",
        f"Command: `{command}`",
        "",
        f"Seeds {', '.join(map(str, seeds))}. One thread of {machine()}; Python "
        f"{platform.python_version()}, "
        + versions("torch", "transformers", "tokenizers")
        + ". On the CPU. Process time counts this process only.",
        "",
        "## A BERT starts a GPT-2",
        "",
        f"Donor: BERT of the same size, {study.bert_steps} steps at a rate of {BERT_RATE:g} with {100 * MASKED:.0f} %",
        f"of the tokens masked, {masked} nats per masked token, "
        f"{mean_and_spread([cell['seconds'] for cell in berts], 0)} CPU s.",
        "Target: the final loss of the first row. All but the last six rows are `GPT2LMHeadModel`. The donor's",
        "positions started as sines, which help by themselves: the second row has them untrained. The head is that of",
        "BERT's masked output (dense, GELU, norm, bias), for which GPT-2 has no place: `MegatronBertForCausalLM` is",
        "GPT-2's layout with it (pre-LN), `BertLMHeadModel` is BERT itself under a causal mask (post-LN).",
        "Both have a row from nothing, so that the head's weights are not confused with the head's shape.",
        "",
        *markdown_table(recycled),
        "",
        "Until the final loss of the first row:",
        "",
        *reading(recycled, "scratch"),
        "",
        "Until the final loss of the second row (sine positions from nothing), compared with that row:",
        "",
        *reading(against_sines, SINES),
        "",
        "## A small GPT-2 starts a larger one",
        "",
        f"Donor: the GPT-2 of the first row above after {study.steps // 2} steps. Target of the deeper (wider) ones:",
        "the final loss of the deeper (wider) GPT-2 from nothing. FPI and identity keep the donor's function, so they",
        "start at its loss; stack, interlace and AKI do not.",
        "",
        *markdown_table(grown),
        "",
        *reading([row for row in grown if row["model"] not in ("deeper, scratch", "wider, scratch")], ""),
        "",
    ]
    return "\n".join(lines)


def write(study: Study, command: str) -> str:
    """Both tables of what is finished so far."""
    recycled = table_rows(study.cells, list(RECYCLED), "scratch", "BERT", VALIDATE_EVERY)
    against_sines = table_rows(
        study.cells, [name for name in RECYCLED if name != "scratch"], SINES, "BERT", VALIDATE_EVERY
    )
    grown = [
        row
        for kind in ("deeper", "wider")
        for row in table_rows(
            study.cells,
            [name for name in GROWN if name.startswith(kind)],
            f"{kind}, scratch",
            "scratch",
            VALIDATE_EVERY,
        )
    ]
    text = markdown(study, recycled, against_sines, grown, command)
    REFERENCE.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(recycled + against_sines + grown), REFERENCE / "recycling.parquet")
    (REFERENCE / "recycling.md").write_text(text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS, help="of every GPT-2")
    parser.add_argument("--bert-steps", type=int, default=BERT_STEPS, help="of the donor")
    arguments = parser.parse_args()
    if arguments.steps % (2 * VALIDATE_EVERY) or arguments.steps < 2 * VALIDATE_EVERY:
        parser.error(f"--steps {arguments.steps}: expected a multiple of {2 * VALIDATE_EVERY}")
    name = f"{arguments.steps}-{arguments.bert_steps}"
    study = Study(ROOT / "results" / "recycling-study" / name, arguments.steps, arguments.bert_steps)
    command = " ".join(["python benchmarks/recycling.py", *sys.argv[1:]])
    for seed in arguments.seeds:
        study.run_seed(seed)
        write(study, command)
    print(write(study, command))


if __name__ == "__main__":
    main()
