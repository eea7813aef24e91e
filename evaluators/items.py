"""Items of a data set in three disjoint pools, split by document; the base of evaluators that read files.

Imports no torch and is quick: it is what `meiosis plan` runs.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Field, StringConstraints, Tag, model_validator

from evaluators.base import ITEM_POOLS, ConfigPath, Evaluator, ItemPool, Options
from evaluators.errors import UserError
from evaluators.item_files import Item, Parse, Reader, checked_text, text_in

__all__ = [
    "Data",
    "DataOptions",
    "Item",
    "ItemEvaluator",
    "Items",
    "PoolOptions",
    "PoolPaths",
    "Split",
    "checked_text",
    "pooled_items",
    "read_items",
    "text_in",
]


class PoolPaths(Options):
    """A file or folder for every pool."""

    search: ConfigPath = Field(description="items that drive the search")
    select: ConfigPath = Field(description="items that choose among the finalists")
    certify: ConfigPath = Field(description="items for the number that is reported")


class Split(Options):
    """Shares of the documents; the three add up to 1."""

    search: float = Field(0.5, gt=0, lt=1, description="share of the documents that drives the search")
    select: float = Field(0.2, gt=0, lt=1, description="share that chooses among the finalists")
    certify: float = Field(0.3, gt=0, lt=1, description="share for the number that is reported")

    @model_validator(mode="after")
    def _whole(self) -> Split:
        total = self.search + self.select + self.certify
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the shares of search, select and certify add up to {total:g}, expected 1")
        return self

    def pool_of(self, document: str) -> ItemPool:
        """The pool of a document. Depends on its name only, so other documents may come and go."""
        share = _hash_number("pool", document) / 2**64
        if share < self.search:
            return "search"
        return "select" if share < self.search + self.select else "certify"


Data = Annotated[
    Annotated[ConfigPath, Tag("path")] | Annotated[PoolPaths, Tag("pools")],
    Discriminator(lambda value: "pools" if isinstance(value, (dict, PoolPaths)) else "path"),
]
"""Type of the option that says where the items are."""


class PoolOptions(Options):
    """How items come into pools, for options with an optional key `data`."""

    split: Split | None = Field(
        None, description="shares of the documents in search, select and certify (default 0.5, 0.2, 0.3)"
    )
    limit: int | None = Field(None, ge=1, description="at most so many items per pool, a fixed random choice")
    exclude: tuple[Annotated[str, StringConstraints(min_length=1)], ...] = Field(
        (), description="files of folders to leave out, by name or path inside the folder, such as *.bak or drafts/*"
    )

    @model_validator(mode="after")
    def _split_needs_one_path(self) -> PoolOptions:
        if self.split is not None and isinstance(getattr(self, "data", None), PoolPaths):
            raise ValueError("split has no effect when data names a path for every pool; remove one of them")
        return self


class DataOptions(PoolOptions):
    """Options of evaluators that read items."""

    data: Data = Field(
        description="file or folder, split into pools by document; or {search: .., select: .., certify: ..}"
    )


class Items:
    """The items of the three pools, in an order that is random but fixed by their content.

    Args:
        pools: pool -> all its items. Already disjoint.
        limit: how many of each pool to keep, the first ones in that order.
    """

    def __init__(self, pools: Mapping[ItemPool, Sequence[Item]], limit: int | None = None) -> None:
        self._pools = {
            pool: sorted(pools[pool], key=lambda i: (_hash_number("order", i.content_sha256), i.id))[:limit]
            for pool in ITEM_POOLS
        }
        self._by_id = {item.id: item for items in self._pools.values() for item in items}

    def __getitem__(self, item: str) -> Item:
        return self._by_id[item]

    def __iter__(self) -> Iterator[Item]:
        return iter(self._by_id.values())

    def ids(self, pool: ItemPool) -> tuple[str, ...]:
        return tuple(item.id for item in self._pools[pool])

    def sha256(self) -> str:
        """Hash of ids, documents and contents of all pools."""
        rows = [[p, i.id, i.document, i.content_sha256] for p, items in self._pools.items() for i in items]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


class ItemEvaluator(Evaluator):
    """An evaluator whose options say where its items are (`DataOptions`).

    A subclass defines `parse`, `prepare` and `evaluate`; what `parse` returned is `self.data[id].content`.

    Class attributes:
        reads_text: whether text files make items with the content `{"text": ...}`.
    """

    reads_text: ClassVar[bool] = False

    @cached_property
    def data(self) -> Items:
        """All items, read when first needed.

        Raises:
            UserError: a file is missing, a line is wrong, a pool is empty or not disjoint from another.
        """
        options = self.options
        return read_items(
            options.data,
            self.parse,
            split=options.split,
            limit=options.limit,
            reads_text=self.reads_text,
            separator=getattr(options, "separator", None),
            exclude=getattr(options, "exclude", ()),
        )

    @abstractmethod
    def parse(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """The checked content of a JSON line: plain data with what is scored and nothing else.

        Raises:
            ValueError: what is wrong with the line; file and line are added by the caller.
        """

    def check(self) -> None:
        _ = self.data

    def items(self, pool: ItemPool) -> Sequence[str]:
        return self.data.ids(pool)

    def document_of(self, item: str) -> str:
        return self.data[item].document

    def data_sha256(self) -> str:
        return self.data.sha256()


def read_items(
    data: Path | PoolPaths,
    parse: Parse,
    *,
    split: Split | None = None,
    limit: int | None = None,
    reads_text: bool = False,
    separator: str | None = None,
    exclude: Sequence[str] = (),
) -> Items:
    """The items at a path or at three, in disjoint pools.

    A single path is split by document: all items with the same `document` or, where lines do not say
    one, all items with the same content.

    Args:
        data: where they are.
        parse: makes the content of an item from a JSON object.
        split: shares of the documents, for a single path.
        limit: most items per pool.
        reads_text: whether text files are read too, as contents `{"text": ...}`.
        separator: what stands between the texts of a text file; None for one text per file.
        exclude: patterns of the files of folders that are not read.

    Raises:
        UserError: file and line, what is wrong, and the way out.
    """
    read = Reader(parse, reads_text, separator, exclude)
    more = "(a text file is one, unless 'separator' divides it)"
    items = pooled_items(data, read, split=split, limit=limit, more=more)
    read.refuse_unused()
    return items


def pooled_items(
    data: Path | PoolPaths,
    read: Callable[[Path, str], Sequence[Item]],
    *,
    split: Split | None = None,
    limit: int | None = None,
    more: str = "",
) -> Items:
    """The items that `read` finds at a path or at three, in disjoint pools; see `read_items`.

    Args:
        read: gives the items of a file or folder; ids that it makes up start with the prefix it is given.
        more: what a message about too few documents says of them.
    """
    pools: dict[ItemPool, list[Item]] = {pool: [] for pool in ITEM_POOLS}
    if isinstance(data, PoolPaths):
        for pool in ITEM_POOLS:
            pools[pool] = list(read(getattr(data, pool), f"{pool}/"))
    else:
        split = split or Split()
        for item in read(data, ""):
            pools[split.pool_of(item.document)].append(item)
        _refuse_empty(pools, data, split, more)
    _refuse_overlap(pools)
    return Items(pools, limit)


def _refuse_empty(pools: Mapping[ItemPool, Sequence[Item]], path: Path, split: Split, more: str) -> None:
    documents = {item.document for items in pools.values() for item in items}
    for pool, items in pools.items():
        if not items:
            few = "1 document" if len(documents) == 1 else f"{len(documents)} documents"
            raise UserError(
                f"{path}: {few}, and none falls into the {pool} pool (share {getattr(split, pool):g}); give "
                f"more documents{more and ' ' + more}, other shares under "
                "'split', or a path for every pool: {search: .., select: .., certify: ..}"
            )


def _refuse_overlap(pools: Mapping[ItemPool, Sequence[Item]]) -> None:
    contents: dict[str, tuple[ItemPool, Item]] = {}
    documents: dict[str, tuple[ItemPool, Item]] = {}
    for pool, items in pools.items():
        for item in items:
            other_pool, other = contents.setdefault(item.content_sha256, (pool, item))
            if other_pool != pool:
                raise UserError(
                    f"{item.where}: the same content as {other.where}, but one is a {pool} and the other a "
                    f"{other_pool} item; remove one of them"
                )
            other_pool, other = documents.setdefault(item.document, (pool, item))
            if other_pool != pool:
                raise UserError(
                    f"{item.where}: document '{item.document}' is in the {pool} and ({other.where}) in the "
                    f"{other_pool} pool; keep all of a document in one pool"
                )
    everything = [item for items in pools.values() for item in items]
    for id_, count in Counter(item.id for item in everything).items():
        if count > 1:
            first, second, *_ = (item.where for item in everything if item.id == id_)
            raise UserError(f"{second}: id '{id_}' is also that of {first}; give every item its own id")


def _hash_number(purpose: str, text: str) -> int:
    """64 bits that depend on the text and on what they are for."""
    return int.from_bytes(hashlib.sha256(f"{purpose}\0{text}".encode()).digest()[:8], "big")
