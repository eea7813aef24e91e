"""The card of a sample family: what was trained on what, how well it did, and the hash of every file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meiosis.samples.corpus import DOMAINS, Domain, DomainText, digest
from meiosis.samples.training import ModelShape, Phase

CARD = "card.json"
KIND: Literal["meiosis sample models: text"] = "meiosis sample models: text"
VERSION = 1
"""Raise it when a change gives other models or items for the same seed: cached families are rebuilt."""

MODELS = ("base", *DOMAINS)
POOLS = ("search", "select", "certify")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FamilyPlan(_Model):
    """How the family is trained. The default takes under three minutes on two free cores."""

    shape: ModelShape = ModelShape()
    # The base stops half way down its learning rate, as the checkpoints that people fine-tune do: each
    # specialist then gains from its own domain and from settling, and a merge keeps both. With a base
    # trained to the end, merges gained 0.03 nats over it instead of 0.15.
    base: Phase = Phase(steps=1100, batch=6, learning_rate=4e-3, final=0.5)
    # Fine-tunes of different strength, as in the wild: one scale for all of them is not the best merge.
    python: Phase = Phase(steps=260, batch=6, learning_rate=1.2e-3)
    english: Phase = Phase(steps=260, batch=6, learning_rate=2e-3)
    cpp: Phase = Phase(steps=260, batch=6, learning_rate=1.2e-3)

    def specialist(self, domain: Domain) -> Phase:
        """The fine-tuning of one specialist."""
        return {"python": self.python, "english": self.english, "cpp": self.cpp}[domain]


class SplitCard(_Model):
    """One split of one domain."""

    documents: int
    items: int = Field(description="excerpts that are scored; for training, documents")
    characters: int
    sha256: str = Field(description="over names and texts, in order")


class FamilyCard(_Model):
    """`card.json`."""

    kind: Literal["meiosis sample models: text"] = KIND
    version: int
    seed: int
    plan: FamilyPlan
    parameters: int = Field(description="of one model; tied embeddings counted once")
    splits: dict[str, dict[str, SplitCard]] = Field(description="domain -> split -> what is in it")
    losses: dict[str, dict[str, dict[str, float]]] = Field(
        description="pool -> model -> domain -> nats per token; `base` is where the specialists started"
    )
    seconds: dict[str, float]
    versions: dict[str, str]
    files: dict[str, str] = Field(description="path inside the folder -> sha256")

    def specialised(self, pool: str = "certify") -> bool:
        """Whether each specialist beats the base on its own domain and loses to it on the others."""
        losses = self.losses[pool]
        return all(
            (losses[model][domain] < losses["base"][domain]) == (model == domain)
            for model in DOMAINS
            for domain in DOMAINS
        )


def split_cards(text: DomainText) -> dict[str, SplitCard]:
    """Sizes and hashes of the splits of one domain."""
    cards = {
        "train": SplitCard(
            documents=len(text.train),
            items=len(text.train),
            characters=sum(len(document.text) for document in text.train),
            sha256=digest(text.train),
        )
    }
    for pool, items in text.items.items():
        cards[pool] = SplitCard(
            documents=len({item.document for item in items}),
            items=len(items),
            characters=sum(len(item.text) for item in items),
            sha256=digest(items),
        )
    return cards


def file_hashes(folder: Path) -> dict[str, str]:
    """Path inside the folder -> sha256, of every file but the card."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / CARD
    }


def read_card(folder: Path) -> FamilyCard | None:
    """The card in a folder; None where there is none that this version of the code can read."""
    try:
        return FamilyCard.model_validate_json((folder / CARD).read_bytes())
    except (OSError, ValidationError):
        return None


def model_readme(model: str, card: FamilyCard) -> str:
    """A short model card for one checkpoint folder."""
    trained = (
        "trained from scratch on the mixture of the three domains"
        if model == "base"
        else f"fine-tuned from `base` on the {model} domain"
    )
    losses = card.losses["certify"]
    rows = "\n".join(f"| {domain} | {losses['base'][domain]:.3f} | {losses[model][domain]:.3f} |" for domain in DOMAINS)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [meiosis-sample]
---

# {model}

A sample model of Meiosis: LlamaForCausalLM, {card.parameters:,} parameters, float32, {trained}. It exists to
be merged, not to be used. Domains: python (standard library source), english (topics of Python's
`help()`), cpp (headers that torch installs).

| domain | base, nats per token | {model}, nats per token |
|---|---|---|
{rows}

Mean over the certify items, from documents that no training has seen.
Remake: `meiosis samples text DIR --seed {card.seed}`.
"""
