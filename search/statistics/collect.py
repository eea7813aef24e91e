"""One model, a few items, one file of statistics: what `meiosis statistics` does."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from evaluators.base import Context
from evaluators.item_files import Item, Reader, text_in
from search.checkpoints.fingerprint import fingerprint, refuse_non_finite
from search.checkpoints.reading import Checkpoint, open_checkpoint
from search.devices import usable_device
from search.errors import CheckpointError, UserError

if TYPE_CHECKING:
    import torch

    from evaluators.likelihood import Window
    from search.statistics.collectors import Collector

Kind = Literal["fisher", "gram"]

REPORT_SECONDS = 5.0
"""Between two lines of progress."""


@dataclass(frozen=True)
class Collected:
    """What was written: to where, how many tensors, from how many items and predicted tokens."""

    path: Path
    tensors: int
    items: int
    tokens: int
    sha256: str


def collect_statistics(
    model: str,
    data: Path,
    out: Path,
    *,
    kinds: Sequence[Kind],
    items: int | None = None,
    field: str = "text",
    max_tokens: int | None = None,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16"] = "float32",
    overwrite: bool = False,
    report: Callable[[str], None] = lambda _: None,
) -> Collected:
    """Let a causal language model read items and write what is seen of it.

    Args:
        model: checkpoint folder or hub id; one stored in fp8 runs in `dtype`, as it is merged.
        data: texts, a file or folder as for the evaluator `perplexity`.
        out: file to write; there whole or not at all.
        kinds: what to collect; see `search.merge.statistics`.
        items: at most so many, chosen by their content, whatever their order in the file; None for all.
        field: key of the text in JSONL lines.
        max_tokens: as for `perplexity`: longer texts are read in windows.
        device: where the model runs.
        dtype: what it runs in; sums are float32. The bits of the result depend on device and threads as those
            of any forward pass do.
        overwrite: whether `out` may be a file that this function wrote before.
        report: called with a line now and then.

    Raises:
        UserError: model, items and device do not go together, or `out` cannot be written.
    """
    from search.merge.statistics import FORMAT, check_target, write_statistics

    check_target(out, overwrite)
    where = usable_device(device)
    checkpoint = open_checkpoint(model)
    if checkpoint.kind == "adapter":
        raise CheckpointError(
            f"{checkpoint.folder}: is a LoRA adapter, expected a whole model; write it as one with `meiosis merge` and "
            "the operator passthrough, and name that model in recipes too"
        )
    chosen = _choose(data, field, items)
    windows = _windows(checkpoint, chosen, where, max_tokens, data)
    print_ = fingerprint(checkpoint, report=report)
    refuse_non_finite(model, print_)
    found, tokens = _collect(checkpoint, windows, kinds, where, dtype, report)
    for name, tensor in found.items():
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{model}: {name} is not finite after {len(chosen)} items; try --dtype float32")
    metadata = {
        FORMAT: "1",
        "kinds": ",".join(kinds),
        "model_sha256": print_.sha256,
        "data_sha256": hashlib.sha256(json.dumps([[i.id, i.content_sha256] for i in chosen]).encode()).hexdigest(),
        "items": str(len(chosen)),
        "tokens": str(tokens),
        "dtype": dtype,
    }
    return Collected(out, len(found), len(chosen), tokens, write_statistics(out, found, metadata))


def _choose(data: Path, field: str, limit: int | None) -> list[Item]:
    """The items in an order that their content fixes, and so no more of one document than chance wants."""

    def parse(record: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"text": text_in(record, field)}

    found = Reader(parse, reads_text=True, separator=None)(data, "")
    return sorted(found, key=lambda item: (item.content_sha256, item.id))[:limit]


def _windows(
    checkpoint: Checkpoint, items: Sequence[Item], device: str, max_tokens: int | None, data: Path
) -> list[tuple[str, tuple[Window, ...]]]:
    """Every item with what the model reads of it at once."""
    import numpy as np

    from evaluators.language.perplexity import windows_of
    from evaluators.tokens import CAUSAL_ARCHITECTURES, TextEncoder, TextOptions

    if not (checkpoint.architecture or "").endswith(CAUSAL_ARCHITECTURES):
        raise CheckpointError(
            f"{checkpoint.folder}: is a '{checkpoint.architecture}', expected a model that predicts the next token of "
            f"a text: an architecture that ends in {' or '.join(CAUSAL_ARCHITECTURES)}"
        )
    encoder = TextEncoder(Context(checkpoint.folder, device), TextOptions(data=data, max_tokens=max_tokens))
    found = []
    for item, tokens in zip(items, encoder.encode([item.content["text"] for item in items]), strict=True):
        read = tokens if encoder.bos is None else np.concatenate([[encoder.bos], tokens])
        if len(read) < 2:
            raise UserError(
                f"{item.where}: item '{item.id}' is {len(tokens)} token with the tokenizer of {checkpoint.folder}, "
                "and the first is not predicted; remove the item"
            )
        found.append((item.id, windows_of(read, encoder.max_tokens, encoder.max_tokens)))
    return found


def _collect(
    checkpoint: Checkpoint,
    windows: Sequence[tuple[str, tuple[Window, ...]]],
    kinds: Sequence[Kind],
    device: str,
    dtype: str,
    report: Callable[[str], None],
) -> tuple[dict[str, torch.Tensor], int]:
    """The tensors of all kinds, and how many tokens were predicted."""
    import torch

    from evaluators.likelihood import window_losses
    from search.checkpoints.compatibility import view_of
    from search.checkpoints.view import file_view
    from search.merge.live import Instead, build_live_model
    from search.sources import changes
    from search.statistics.collectors import FisherCollector, GramCollector

    view = view_of(checkpoint)
    own = view.tensors == file_view(checkpoint).tensors
    instead = None if own else Instead(view.open(), changes(checkpoint.config, view.config))
    live = build_live_model(checkpoint.folder, device=device, dtype=dtype, instead=instead)
    collectors: list[Collector] = []
    for kind in kinds:
        make = FisherCollector if kind == "fisher" else GramCollector
        collectors.append(make(live, view.tensors))
    tokens, told = 0, time.monotonic()
    with torch.set_grad_enabled(any(collector.needs_gradients for collector in collectors)):
        for done, (item, parts) in enumerate(windows, 1):
            for window in parts:  # one at a time: padding would be seen as input
                ((loss, weight),) = window_losses(
                    live.model, {item: [window]}, batch_tokens=len(window.tokens), device=device
                )
                tokens += int(weight)
                for collector in collectors:
                    collector.read_window(loss)
            for collector in collectors:
                collector.read_item()
            if time.monotonic() - told > REPORT_SECONDS:
                told = time.monotonic()
                report(f"read {done} of {len(windows)} items")
    found: dict[str, torch.Tensor] = {}
    for collector in collectors:
        found |= collector.tensors()
    return found, tokens
