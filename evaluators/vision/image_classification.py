"""How well an image model tells classes apart: accuracy, and likelihood of the right class."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field, StringConstraints, model_validator

from evaluators.base import ConfigPath, Context, Evaluator, ItemPool, Metric, Scores
from evaluators.errors import UserError
from evaluators.image_files import ImageReader
from evaluators.image_models import (
    BACKBONES,
    Head,
    Pooling,
    applied_head,
    class_count,
    head_sha256,
    preprocessing_of,
    read_head,
)
from evaluators.items import Data, Items, PoolOptions, pooled_items
from evaluators.likelihood import scoring

if TYPE_CHECKING:
    import torch

Values = Annotated[tuple[Annotated[float, Field(allow_inf_nan=False)], ...], Field(min_length=1, max_length=3)]
Widths = Annotated[tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], Field(min_length=1, max_length=3)]


class ImageClassificationOptions(PoolOptions):
    """Options of `image_classification`."""

    data: Data = Field(
        description=".npz file (x: uint8 images, y: labels from 0) or folder with a sub-folder of pictures per class, "
        "split into pools; or {search: .., select: .., certify: ..}"
    )
    head: ConfigPath | None = Field(
        None,
        description="safetensors file with 'weight' (classes, features) and 'bias', applied to the features of a model "
        "without a head of its own (default: the model's own head)",
    )
    pool: Pooling = Field(
        "auto", description="features the head reads: pooler, cls (first token), mean (of patches); auto: pooler or cls"
    )
    classes: tuple[Annotated[str, StringConstraints(min_length=1)], ...] = Field(
        (), description="names of the sub-folders by label (default: all there are, sorted)"
    )
    image_size: int | None = Field(
        None, ge=1, description="height and width to which images are scaled (default: the model's)"
    )
    mean: Values | None = Field(
        None, description="mean that is taken off, per channel, of values from 0 to 1 (default: the model's, or 0.5)"
    )
    std: Widths | None = Field(
        None, description="what values are divided by afterwards, per channel (default: the model's, or 0.5)"
    )
    batch_size: int = Field(128, ge=1, description="images that go through the model together")

    @model_validator(mode="after")
    def _pool_needs_a_head(self) -> ImageClassificationOptions:
        if self.head is None and self.pool != "auto":
            raise ValueError(f"pool: {self.pool} says what a head from a file reads; set head, or leave pool out")
        return self


class ImageClassification(Evaluator):
    """Accuracy and negative log-likelihood on labelled images.

    The model is a classifier, or a backbone with one frozen head per task, as merges of CLIP models are measured:
    the head is no part of the merge.
    """

    metrics: Mapping[str, Metric] = {
        "accuracy": Metric("maximize", low=0, high=1, help="share of images whose most likely class is the right one"),
        "nll": Metric("minimize", unit="nats", low=0, help="-log of the likelihood of the right class"),
    }
    Options = ImageClassificationOptions
    help = "How often an image model names the right class, with its own head or one from a file."
    source = "Ilharco 2023, https://arxiv.org/abs/2212.04089 (one frozen head per task)"
    architectures: tuple[str, ...] = ("ForImageClassification", *BACKBONES)
    loss_metric = "nll"
    options: ImageClassificationOptions

    def __init__(self, options: ImageClassificationOptions) -> None:
        super().__init__(options)
        self.architectures = ("ForImageClassification",) if options.head is None else BACKBONES

    @cached_property
    def data(self) -> Items:
        """All items, read when first needed."""
        self._reader = ImageReader(self.options.classes, self.options.exclude)
        items = pooled_items(self.options.data, self._reader, split=self.options.split, limit=self.options.limit)
        self._reader.refuse_unused()
        return items

    @cached_property
    def _head(self) -> Head | None:
        return None if self.options.head is None else read_head(self.options.head)

    def check(self) -> None:
        _ = self.data
        if self._head is not None:
            self._refuse_labels(self._head.classes, f"the head {self._head.path}")

    def items(self, pool: ItemPool) -> Sequence[str]:
        return self.data.ids(pool)

    def document_of(self, item: str) -> str:
        return self.data[item].document

    def data_sha256(self) -> str:
        if self.options.head is None:
            return self.data.sha256()
        return hashlib.sha256(f"{self.data.sha256()} {head_sha256(self.options.head)}".encode()).hexdigest()

    def prepare(self, context: Context) -> None:
        if "data" in self.__dict__ and not self._reader.images:  # read, and let go of below
            del self.data
        self.check()
        if self._head is None:
            self._refuse_labels(class_count(context.model_folder), f"the model in {context.model_folder}")
        items = list(self.data)
        images = [self._reader.images[item.id] for item in items]
        given = self.options
        self._preprocessing = preprocessing_of(context.model_folder, given.image_size, given.mean, given.std, images)
        self._images = self._preprocessing.resized(images)
        self._labels = np.array([item.content["label"] for item in items], np.int64)
        self._row = {item.id: row for row, item in enumerate(items)}
        self._device = context.device
        self._reader.images.clear()  # those of the right size are kept

    def evaluate(self, model: torch.nn.Module, items: Sequence[str]) -> Iterator[Scores]:
        import torch

        for batch in self._batches(items):
            with scoring(model):
                logits, labels = self._logits(model, batch)
                nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
                right = (logits.argmax(1) == labels).float()
            # What is not a number is not wrong, it is not known.
            right = torch.where(nll.isnan(), nll, right)
            values = {"accuracy": right, "nll": nll}
            columns = {name: column.cpu().double().numpy() for name, column in values.items()}
            yield Scores(tuple(batch), columns, np.ones(len(batch)))

    def losses(self, model: torch.nn.Module, items: Sequence[str]) -> Iterator[tuple[torch.Tensor, float]]:
        import torch

        for batch in self._batches(items):
            logits, labels = self._logits(model, batch)
            yield torch.nn.functional.cross_entropy(logits, labels, reduction="sum"), len(batch)

    def _batches(self, items: Sequence[str]) -> Iterator[Sequence[str]]:
        """By the items' own order, whatever the order in which they are asked for."""
        rows = sorted(items, key=self._row.__getitem__)
        for start in range(0, len(rows), self.options.batch_size):
            yield rows[start : start + self.options.batch_size]

    def _logits(self, model: torch.nn.Module, batch: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, classes) in float32, and the labels (n,), on the same device."""
        import torch

        rows = [self._row[item] for item in batch]
        dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
        pixels = self._preprocessing.normalised(self._images[rows], self._device, dtype)
        if self._head is None:
            logits = model(pixel_values=pixels).logits.float()
        else:
            logits = applied_head(model, pixels, self._head, self.options.pool)
        return logits, torch.from_numpy(self._labels[rows]).to(logits.device)

    def _refuse_labels(self, classes: int, whose: str) -> None:
        for item in self.data:
            label = item.content["label"]
            if label >= classes:
                raise UserError(f"{item.where}: label {label}, but {whose} has {classes} classes: 0 to {classes - 1}")


PLUGIN = ImageClassification
