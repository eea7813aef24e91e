"""The tasks of the vision family: labelled pictures, made from digits and photographs. No torch."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluators.base import ITEM_POOLS
from evaluators.errors import UserError
from evaluators.npz import read_arrays

Pictures = NDArray[np.uint8]
"""(n, size, size, 3)."""
Labels = NDArray[np.int64]

ANIMALS, VEHICLES = (2, 3, 4, 5, 6, 7), (0, 1, 8, 9)
"""Classes of CIFAR-10."""

FILES = tuple(f"{folder}/{split}.npz" for folder in ("mnist", "cifar10_jpeg") for split in ("train", "test"))
"""What the folder of data holds."""

SPLITS = ("train", *ITEM_POOLS)


@dataclass(frozen=True)
class Part:
    """Pictures with labels."""

    x: Pictures
    y: Labels

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        classes: how many.
        about: what it is, for people.
        parts: split -> its pictures; a picture that two tasks are made from is in the same split of both.
    """

    classes: int
    about: str
    parts: Mapping[str, Part]


@dataclass(frozen=True)
class Pool:
    """Pictures that tasks are made from, in splits."""

    parts: Mapping[str, Part]


@dataclass(frozen=True)
class Album:
    """All data of a family.

    Attributes:
        tasks: name -> task, one fine-tune for each.
        general: name -> what the base learns.
    """

    tasks: Mapping[str, Task]
    general: Mapping[str, Task]


def make_album(data: Path | None, *, size: int, items: Mapping[str, int], train: int, seed: int) -> Album:
    """The tasks, from MNIST and CIFAR-10 in a folder, or from the digits of scikit-learn alone.

    Args:
        data: folder with `mnist/{train,test}.npz` (`x`, `y`) and `cifar10_jpeg/{train,test}.npz` (`jpeg`, `offset`,
            `label`).
        size: height and width of the pictures.
        items: pool -> most pictures of a task.
        train: most training pictures of a task.
    """
    random = np.random.default_rng(seed)
    small = _digits(size, items, train, random)
    if data is None:
        return _of_digits(small, random)
    digits = _pool(_mnist(data / "mnist", "train", size), _mnist(data / "mnist", "test", size), items, train, random)
    # Two tasks take some of the classes only.
    wider = {pool: count * 3 for pool, count in items.items()}
    jpeg = data / "cifar10_jpeg"
    photos = _pool(_cifar(jpeg, "train", size, 3 * train), _cifar(jpeg, "test", size), wider, 3 * train, random)
    return _of_digits_and_photos(digits, small, photos, items, train, random)


def _of_digits_and_photos(
    digits: Pool, small: Pool, photos: Pool, items: Mapping[str, int], train: int, random: np.random.Generator
) -> Album:
    limits = {**items, "train": train}

    def of(pool: Pool, change: Callable[[Part], Part], classes: int, about: str) -> Task:
        return Task(classes, about, {s: _first(change(pool.parts[s]), limits[s]) for s in SPLITS})

    def on_photos(split: str) -> Part:
        part, behind = _first(digits.parts[split], limits[split]), photos.parts[split].x
        places = random.integers(len(behind), size=len(part))
        return Part(np.abs(behind[places].astype(np.int16) - part.x).astype(np.uint8), part.y)

    tasks = {
        "digits": of(digits, lambda p: p, 10, "handwritten digits (MNIST)"),
        "negatives": of(digits, _negative, 10, "the same, black on white and turned by 90 degrees"),
        "overlays": Task(10, "digits over photographs", {s: on_photos(s) for s in SPLITS}),
        "scans": of(small, lambda p: p, 10, "digits of 8 x 8 pixels (scikit-learn)"),
        "animals": of(photos, lambda p: _classes(p, ANIMALS), 6, "photographs of animals (CIFAR-10)"),
        "vehicles": of(photos, lambda p: _classes(p, VEHICLES), 4, "photographs of vehicles (CIFAR-10)"),
        "edges": of(photos, _edges, 10, "edges of photographs (CIFAR-10)"),
        "turns": of(photos, lambda p: _turned(p, random), 4, "by which angle a photograph is turned"),
    }
    general = {
        "digits": Task(10, "digits", {"train": digits.parts["train"]}),
        "photos": Task(10, "photographs", {"train": photos.parts["train"]}),
    }
    return Album(tasks, general)


def _of_digits(digits: Pool, random: np.random.Generator) -> Album:
    def of(change: Callable[[Part], Part], classes: int, about: str) -> Task:
        return Task(classes, about, {split: change(digits.parts[split]) for split in SPLITS})

    tasks = {
        "scans": of(lambda p: p, 10, "digits of 8 x 8 pixels (scikit-learn)"),
        "negatives": of(_negative, 10, "the same, black on white and turned by 90 degrees"),
        "striped": of(lambda p: _striped(p, random), 10, "digits over stripes"),
        "edges": of(_edges, 10, "edges of digits"),
        "noisy": of(lambda p: _noisy(p, random), 10, "digits under noise"),
        "turns": of(lambda p: _turned(p, random), 4, "by which angle a digit is turned"),
        "parity": of(lambda p: Part(p.x[:, ::-1].copy(), p.y % 2), 2, "whether a mirrored digit is odd"),
        "pairs": of(lambda p: _pairs(p, random), 10, "the left one of two digits"),
    }
    train = digits.parts["train"]
    general = {
        "digits": Task(10, "digits", {"train": train}),
        "turns": Task(4, "turned digits", {"train": _turned(train, random)}),
    }
    return Album(tasks, general)


def _first(part: Part, count: int) -> Part:
    return Part(part.x[:count], part.y[:count])


def _classes(part: Part, classes: tuple[int, ...]) -> Part:
    rows = np.isin(part.y, classes)
    return Part(part.x[rows], np.searchsorted(classes, part.y[rows]).astype(np.int64))


def _negative(part: Part) -> Part:
    return Part(255 - np.rot90(part.x, axes=(1, 2)), part.y)


def _edges(part: Part) -> Part:
    """Length of the gradient of the brightness (Sobel), in all three channels."""
    gray = np.pad(part.x.astype(np.float32).mean(3), ((0, 0), (1, 1), (1, 1)), mode="edge")
    smooth_rows = gray[:, :-2] + 2 * gray[:, 1:-1] + gray[:, 2:]
    smooth_columns = gray[:, :, :-2] + 2 * gray[:, :, 1:-1] + gray[:, :, 2:]
    across = smooth_rows[:, :, 2:] - smooth_rows[:, :, :-2]
    down = smooth_columns[:, 2:] - smooth_columns[:, :-2]
    edges = np.clip(np.hypot(across, down) / 2, 0, 255).astype(np.uint8)
    return Part(np.repeat(edges[..., None], 3, axis=3), part.y)


def _turned(part: Part, random: np.random.Generator) -> Part:
    turns: Labels = np.asarray(random.integers(4, size=len(part)), np.int64)
    x = part.x.copy()
    for turn in range(1, 4):
        x[turns == turn] = np.rot90(part.x[turns == turn], turn, axes=(1, 2))
    return Part(x, turns)


def _striped(part: Part, random: np.random.Generator) -> Part:
    n, size = part.x.shape[:2]
    across: NDArray[np.bool_] = np.asarray(random.integers(2, size=n), np.bool_)
    phase: Labels = np.asarray(random.integers(8, size=n), np.int64)
    place: NDArray[np.int64] = np.arange(size)[None] + phase[:, None]
    stripes = (place // 4 % 2 * 150).astype(np.int16)
    behind = np.where(across[:, None, None], stripes[:, None, :], stripes[:, :, None])[..., None]
    return Part(np.abs(behind - part.x).astype(np.uint8), part.y)


def _noisy(part: Part, random: np.random.Generator) -> Part:
    noise = random.normal(0, 70, part.x.shape)
    return Part(np.clip(part.x + noise, 0, 255).astype(np.uint8), part.y)


def _pairs(part: Part, random: np.random.Generator) -> Part:
    n, size = part.x.shape[:2]
    other = part.x[random.permutation(n)]
    narrow = [pictures.reshape(n, size, size // 2, 2, 3).mean(3) for pictures in (part.x, other)]
    return Part(np.concatenate(narrow, axis=2).astype(np.uint8), part.y)


def _pool(train: Part, test: Part, items: Mapping[str, int], count: int, random: np.random.Generator) -> Pool:
    """Training pictures, and the test pictures cut into pools."""
    order = random.permutation(len(train))[:count]
    parts = {"train": Part(train.x[order], train.y[order])}
    order, start = random.permutation(len(test)), 0
    shares = _shares(items, len(test))
    for pool, wanted in shares.items():
        rows = order[start : start + wanted]
        parts[pool], start = Part(test.x[rows], test.y[rows]), start + wanted
    return Pool(parts)


def _shares(items: Mapping[str, int], available: int) -> dict[str, int]:
    """As many as asked for, or fewer of each in proportion."""
    factor = min(1.0, available / sum(items.values()))
    return {pool: int(count * factor) for pool, count in items.items()}


def _digits(size: int, items: Mapping[str, int], count: int, random: np.random.Generator) -> Pool:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("the digits are those of scikit-learn: pip install scikit-learn") from error
    found: Any = load_digits()
    # Equal pictures in two pools would be refused, and in training they would be known.
    _, distinct = np.unique(found.images.reshape(len(found.images), -1), axis=0, return_index=True)
    x = np.clip(found.images[np.sort(distinct)] * 16, 0, 255).astype(np.uint8)
    part = Part(_canvas(x.repeat(size // 8, axis=1).repeat(size // 8, axis=2), size), found.target[np.sort(distinct)])
    order = random.permutation(len(part))
    half = min(count, len(part) // 2)
    train, test = order[:half], order[half:]
    return _pool(Part(part.x[train], part.y[train]), Part(part.x[test], part.y[test]), items, count, random)


def _mnist(folder: Path, split: str, size: int) -> Part:
    x, y = read_arrays(folder / f"{split}.npz", ("x", "y"), "images 'x' and labels 'y'")
    return Part(_canvas(x, size), y.astype(np.int64))


def _cifar(folder: Path, split: str, size: int, count: int | None = None) -> Part:
    """So many photographs of every class alike, the first ones: in the file they may lie class by class."""
    import PIL.Image

    bytes_, offset, labels = read_arrays(
        folder / f"{split}.npz", ("jpeg", "offset", "label"), "'jpeg' bytes, their 'offset' and 'label'"
    )
    jpeg, rows = bytes_.tobytes(), np.arange(len(labels))
    if count is not None and count < len(labels):
        rank = np.empty(len(labels), np.int64)  # of a photograph among those of its class
        for label in np.unique(labels):
            rank[labels == label] = np.arange((labels == label).sum())
        rows = np.sort(np.argsort(rank, kind="stable")[:count])
    y = labels[rows].astype(np.int64)
    x = np.empty((len(y), size, size, 3), np.uint8)
    for index, row in enumerate(rows):
        with PIL.Image.open(io.BytesIO(jpeg[offset[row] : offset[row + 1]])) as picture:
            x[index] = np.asarray(picture.convert("RGB").resize((size, size), PIL.Image.Resampling.BILINEAR))
    return Part(x, y)


def _canvas(gray: NDArray[np.uint8], size: int) -> Pictures:
    """Gray pictures in the middle of black ones, in three channels; larger ones lose their border."""
    height = gray.shape[1]
    if height > size:
        cut = (height - size) // 2
        gray = gray[:, cut : cut + size, cut : cut + size]
    else:
        before, after = (size - height) // 2, size - height - (size - height) // 2
        gray = np.pad(gray, ((0, 0), (before, after), (before, after)))
    return np.repeat(gray[..., None], 3, axis=3)
