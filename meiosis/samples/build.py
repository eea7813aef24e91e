"""Training a text family into an empty folder, in a process of its own (`python -c`, see `text.py`).

It sets torch's thread count and global seed, which is why it never runs inside the caller's process.
"""

from __future__ import annotations

import copy
import json
import platform
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from evaluators.base import ITEM_POOLS
from meiosis.samples.card import (
    CARD,
    MODELS,
    VERSION,
    FamilyCard,
    FamilyPlan,
    file_hashes,
    model_readme,
    split_cards,
)
from meiosis.samples.corpus import DOMAINS, Domain, DomainText, read_corpus
from meiosis.samples.training import (
    Report,
    Windows,
    batches,
    losses_of,
    new_model,
    stream,
    train,
    train_tokenizer,
)

TOKENIZER_CHARACTERS = 400_000
"""Per domain, so that each has the same say in the vocabulary."""


def build_family(folder: Path, *, seed: int, threads: int, plan: FamilyPlan, report: Report) -> None:
    """Train base and specialists and write everything, the card last.

    Args:
        folder: exists and is empty.
        threads: how many pieces of work run at once. The result does not depend on it.
    """
    import torch

    torch.set_num_threads(1)
    clock = _Clock()
    corpus = read_corpus(seed)
    sample = [part for text in corpus.values() for part in _sample(text)]
    tokenizer = train_tokenizer(sample, plan.shape.vocabulary)
    streams = {domain: stream(text.train, tokenizer) for domain, text in corpus.items()}
    clock.lap("corpus")
    report(
        "corpus: "
        + ", ".join(f"{domain} {len(tokens) // 1000}k tokens" for domain, tokens in streams.items())
        + f" to train on, {clock.seconds['corpus']:.0f} s"
    )

    def windows(domain: Domain, purpose: int) -> Windows:
        generator = torch.Generator().manual_seed(1_000_003 * seed + 101 * purpose + DOMAINS.index(domain))
        return Windows(streams[domain], plan.shape.window, tokenizer.bos_token_id, generator)

    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        base = new_model(plan.shape, tokenizer, seed)
        mixture = batches([windows(domain, 0) for domain in DOMAINS], plan.base.batch)
        train(base, mixture, plan.base, name="base", report=report, pool=pool)
        clock.lap("base")

    models: dict[str, Any] = {"base": base}
    for domain in DOMAINS:
        models[domain] = copy.deepcopy(base)

    def specialise(domain: Domain) -> None:
        phase = plan.specialist(domain)
        data = batches([windows(domain, 1)], phase.batch)
        train(models[domain], data, phase, name=domain, report=report)

    # All three at once on any number of cores but one: the system shares two cores out evenly, where
    # two at a time would leave one core idle during the third.
    at_once = len(DOMAINS) if threads > 1 else 1
    with ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(specialise, DOMAINS))
    clock.lap("specialists")

    for model in models.values():
        model.eval()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        losses = {
            name: losses_of(models, tokenizer, {d: text.items[name] for d, text in corpus.items()}, pool)
            for name in ITEM_POOLS
        }
    clock.lap("evaluate")

    card = FamilyCard(
        version=VERSION,
        seed=seed,
        plan=plan,
        parameters=sum(parameter.numel() for parameter in base.parameters()),
        splits={domain: split_cards(text) for domain, text in corpus.items()},
        losses=losses,
        seconds=clock.total(),
        versions={
            "python": platform.python_version(),
            "machine": platform.machine(),
            **{name: version(name) for name in ("torch", "transformers", "tokenizers", "safetensors")},
        },
        files={},
    )
    _write(folder, models, tokenizer, corpus, card)


class _Clock:
    """Seconds per named stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = self._last = time.monotonic()

    def lap(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage] = round(now - self._last, 2)
        self._last = now

    def total(self) -> dict[str, float]:
        return {**self.seconds, "total": round(time.monotonic() - self._start, 2)}


def _sample(text: DomainText) -> list[str]:
    """Training documents for the tokenizer, up to `TOKENIZER_CHARACTERS`."""
    parts: list[str] = []
    left = TOKENIZER_CHARACTERS
    for document in text.train:
        parts.append(document.text[: min(left, 20_000)])
        left -= len(parts[-1])
        if left <= 0:
            break
    return parts


def _write(
    folder: Path,
    models: Mapping[str, Any],
    tokenizer: Any,
    corpus: Mapping[Domain, DomainText],
    card: FamilyCard,
) -> None:
    for name in MODELS:
        models[name].save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        (folder / name / "README.md").write_text(model_readme(name, card), encoding="utf-8")
    for domain, text in corpus.items():
        (folder / "data" / domain).mkdir(parents=True)
        for pool, items in text.items.items():
            lines = [json.dumps({"id": i.id, "document": i.document, "text": i.text}) + "\n" for i in items]
            (folder / "data" / domain / f"{pool}.jsonl").write_text("".join(lines), encoding="utf-8")
    # safetensors makes its files readable by the owner only; the others follow the umask.
    mode = (folder / "base" / "README.md").stat().st_mode & 0o777
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)
    final = card.model_copy(update={"files": file_hashes(folder)})
    (folder / CARD).write_text(final.model_dump_json(indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Read the order from stdin (one JSON line), report on stdout."""
    order = json.loads(sys.stdin.readline())
    build_family(
        Path(order["folder"]),
        seed=order["seed"],
        threads=order["threads"],
        plan=FamilyPlan.model_validate(order["plan"]),
        # Raises BrokenPipeError, and so ends the training, when the one who ordered it is gone.
        # Two specialists report at once, and what `print` writes in two parts could be torn apart.
        report=lambda line: print(line + "\n", end="", flush=True),
    )
