"""Builds the target tensors of a recycled BERT one by one: taken from the source, or initialised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from search.errors import UserError
from search.recycling.bert_source import BertSource
from search.recycling.mapping import Part, Read
from search.recycling.vocabulary import Transfer, VocabularyMethod
from search.seeds import derive_seed

if TYPE_CHECKING:
    from torch import Tensor

Target = Literal["gpt2", "megatron-bert-causal", "bert-causal"]
Component = Literal["embeddings", "attention", "mlp", "norms", "head"]
PositionMode = Literal["tile", "interpolate"]
NormOrder = Literal["shifted", "same-index"]
COMPONENTS: tuple[Component, ...] = get_args(Component)

WORD = "embeddings.word_embeddings.weight"
POSITION = "embeddings.position_embeddings.weight"
TYPE = "embeddings.token_type_embeddings.weight"


@dataclass(frozen=True)
class BertOptions:
    """How a BERT becomes a decoder.

    Attributes:
        to: architecture of the result.
        tokenizer: folder of another tokenizer, whose vocabulary the result gets; None: that of the source.
        vocabulary: where the embeddings of tokens come from that only the other tokenizer has.
        positions: how many the result has; None: as many as the source.
        position_mode: how more positions are made: the table again from its start (the first positions stay as
            they were), or stretched linearly (all distances change).
        norm_order: `shifted` gives every sub-layer the norm that fed it; `same-index` takes the norms of layer l
            for layer l.
        scale_input: multiply the input embeddings so that their mean standard deviation over the hidden units is
            1, as after BERT's norm, and divide the last norm so that the tied output stays as it was.
        keep_head: whether the MLM head is kept; None: where the target has a place for it.
        components: what is recycled; the rest is initialised.
        seed: of everything that is initialised or drawn.
    """

    to: Target = "gpt2"
    tokenizer: Path | None = None
    vocabulary: VocabularyMethod = "mean"
    positions: int | None = None
    position_mode: PositionMode = "tile"
    norm_order: NormOrder = "shifted"
    scale_input: bool = False
    keep_head: bool | None = None
    components: frozenset[Component] = frozenset(COMPONENTS)
    seed: int = 0


class Mapper:
    """Collects the parts of the target.

    Args:
        bert: the source.
        options: what is recycled, and how.
        transfer: to another vocabulary; None: the source's stays.
        scale: of the input embeddings.
    """

    def __init__(self, bert: BertSource, options: BertOptions, transfer: Transfer | None, scale: float) -> None:
        self.bert, self.options, self.transfer, self.scale = bert, options, transfer, scale
        self.parts: list[Part] = []
        self.left_out: dict[str, str] = {}
        self.vocabulary = bert.vocabulary if transfer is None else len(transfer.rows)
        self.positions = options.positions or bert.positions

    def add(
        self,
        name: str,
        shape: tuple[int, ...],
        component: Component,
        operation: str,
        sources: Sequence[str],
        make: Callable[[Read], Tensor],
        note: str = "",
        *,
        initial: float | Literal["normal", "residual"] = "normal",
        factor: float = 1.0,
    ) -> None:
        """One tensor: made of `sources` (common names), or initialised if its component is not recycled.

        Args:
            name, shape: of the target tensor.
            component: the part of the model that it belongs to.
            operation: in words, for the report.
            make: gets a function that reads by common names.
            initial: value of all elements, "normal" for N(0, initializer_range of the source's config),
                "residual" for that over the square root of the number of residual sub-layers (Radford 2019).
            factor: multiplies what is made or initialised.
        """
        names = self.bert.names
        if component in self.options.components and all(source in names for source in sources):
            self.parts.append(
                Part(
                    name,
                    shape,
                    operation,
                    tuple(names[source] for source in sources),
                    lambda read: _times(make(lambda source: read(names[source])), factor),
                    note,
                )
            )
            return
        for source in sources:
            if source in names:
                self.left_out[names[source]] = f"{component} was left out (--parts, --no-head)"
        std = self.bert.initial_std / ((2 * self.bert.layers) ** 0.5 if initial == "residual" else 1.0)
        how = f"initialised N(0, {std:.3g})" if isinstance(initial, str) else f"initialised {initial * factor:g}"
        seed = derive_seed(self.options.seed, "recycle", name)

        def initialise(_: Read) -> Tensor:
            import torch

            if isinstance(initial, str):
                return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * (std * factor)
            return torch.full(shape, initial * factor)

        self.parts.append(Part(name, shape, how, (), initialise, note if factor != 1.0 else ""))

    def copy(self, name: str, source: str, component: Component, **more: float | str) -> None:
        """A tensor as it is; biases start at 0 and the weights of norms at 1 where they are not recycled."""
        initial: float | Literal["normal", "residual"] = "normal"
        if source.endswith(".bias"):
            initial = 0.0
        elif source.endswith("LayerNorm.weight"):
            initial = 1.0
        factor = float(more.get("factor", 1.0))
        operation = "copied" if factor == 1.0 else "scaled"
        shape = self.bert.shape(source) if source in self.bert.names else (self.bert.hidden,)
        self.add(
            name,
            shape,
            component,
            operation,
            (source,),
            lambda read: read(source),
            str(more.get("note", "")),
            initial=initial,
            factor=factor,
        )

    def words(self, name: str) -> None:
        """The word embeddings, in the target's vocabulary and scaled for the input."""
        transfer, shape = self.transfer, (self.vocabulary, self.bert.hidden)
        operation = "copied" if transfer is None else "transferred to the other vocabulary"
        note = "" if transfer is None else ", ".join(f"{n} {what}" for what, n in transfer.counts.items() if n)
        self.add(
            name,
            shape,
            "embeddings",
            operation + ("" if self.scale == 1.0 else ", scaled"),
            (WORD,),
            lambda read: read(WORD) if transfer is None else transfer.apply(read(WORD)),
            _joined(note, self.scale_note()),
            factor=self.scale,
        )

    def table(self, name: str, *, fold_type: bool) -> None:
        """The position embeddings, resized; with `fold_type` the embedding of segment 0 is added to each."""
        bert, count, mode = self.bert, self.positions, self.options.position_mode

        def make(read: Read) -> Tensor:
            table = read(POSITION)
            return resized(table + read(TYPE)[0] if fold_type else table, count, mode)

        operation, note = "copied", ""
        if count != bert.positions:
            operation = "cut" if count < bert.positions else f"extended ({mode})"
            note = f"{bert.positions} positions in the source"
        if fold_type:
            operation += ", segment 0 folded in"
            note = _joined(note, "the embeddings of other segments are dropped: GPT-2 has no segments")
        sources = (POSITION, TYPE) if fold_type else (POSITION,)
        self.add(
            name,
            (count, bert.hidden),
            "embeddings",
            operation + ("" if self.scale == 1.0 else ", scaled"),
            sources,
            make,
            _joined(note, self.scale_note()),
            factor=self.scale,
        )

    def scale_note(self) -> str:
        """What was done to the input embeddings."""
        return "" if self.scale == 1.0 else f"times {self.scale:.4g}: unit input"

    def unscale(self) -> dict[str, float | str]:
        """For the last norm before the tied output: what undoes the scale of the word embeddings there."""
        if self.scale == 1.0:
            return {}
        return {"factor": 1 / self.scale, "note": f"divided by {self.scale:.4g}: the tied output stays as it was"}


def resized(table: Tensor, count: int, mode: PositionMode) -> Tensor:
    """(count, hidden) position embeddings from (positions, hidden); fewer are always the first ones."""
    import torch

    if count <= len(table):
        return table[:count]
    if mode == "tile":
        return table[torch.arange(count) % len(table)]
    grid = torch.arange(count, dtype=table.dtype) * ((len(table) - 1) / (count - 1))
    low = grid.floor().long().clamp(max=max(len(table) - 2, 0))
    high = (low + 1).clamp(max=len(table) - 1)
    part = (grid - low)[:, None]
    return table[low] * (1 - part) + table[high] * part


def input_std(words: Tensor, positions: Tensor) -> float:
    """Root mean square over all tokens and positions of the standard deviation over the hidden units.

    Args:
        words: (vocabulary, hidden).
        positions: (positions, hidden), with the embedding of segment 0.

    Raises:
        UserError: the embeddings are all equal or not finite.
    """
    words, positions = words.double(), positions.double()
    words, positions = words - words.mean(1, keepdim=True), positions - positions.mean(1, keepdim=True)
    cross = 2 * (words.mean(0) * positions.mean(0)).mean()
    variance = float((words**2).mean() + (positions**2).mean() + cross)
    if not 0 < variance < float("inf"):
        raise UserError(f"the input embeddings have the variance {variance}, so their scale cannot be set; leave it")
    return float(variance**0.5)


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1.0 else tensor * factor


def _joined(*notes: str) -> str:
    return "; ".join(note for note in notes if note)
