"""Labelled images from .npz files and from folders of pictures, as items; needs no torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evaluators.errors import UserError, nearest
from evaluators.item_files import Item
from evaluators.npz import read_arrays

Image = NDArray[np.uint8]
"""(height, width, channels) with 1 channel (gray) or 3 (red, green, blue)."""

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"})


class ImageReader:
    """Reads files and folders into items and keeps the images.

    An item's content is `{"image": hash of the pixels, "label": number}`; its document is the hash, so the same
    picture cannot be in two pools, whatever its label.

    Args:
        classes: names of the sub-folders of folders of pictures, by label; empty for all there are, sorted.
        exclude: patterns of pictures in folders to leave out, by name or path inside the folder.

    Attributes:
        images: item -> its image.
    """

    def __init__(self, classes: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
        self.images: dict[str, Image] = {}
        self._classes, self._exclude, self._unused = tuple(classes), tuple(exclude), list(exclude)
        self._first: Path | None = None

    def __call__(self, path: Path, prefix: str) -> list[Item]:
        """The items of an .npz file, or of a folder with a sub-folder of pictures for every class."""
        if path.is_dir():
            return self._folder(path, prefix)
        if not path.is_file():
            raise UserError(f"{path}: no such file or folder; expected an .npz file or a folder of classes")
        return self._npz(path, prefix + path.name)

    def refuse_unused(self) -> None:
        """Raise `UserError` if a pattern of `exclude` met no picture."""
        if self._unused:
            raise UserError(f"exclude: no picture of the data matches '{self._unused[0]}'; correct it or remove it")

    def _npz(self, path: Path, name: str) -> list[Item]:
        x, y = read_arrays(path, ("x", "y"), "images 'x' and labels 'y'")
        if x.dtype != np.uint8:
            raise UserError(f"{path}: images 'x' are {x.dtype}, expected uint8 from 0 to 255; convert them")
        if x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] not in (1, 3)) or 0 in x.shape[1:]:
            raise UserError(
                f"{path}: images 'x' have shape {x.shape}, expected (n, height, width), (n, height, width, 1) or "
                "(n, height, width, 3)"
            )
        if not np.issubdtype(y.dtype, np.integer) or y.ndim != 1:
            raise UserError(
                f"{path}: labels 'y' are {y.dtype} of shape {y.shape}, expected whole numbers of shape (n,)"
            )
        if len(x) != len(y):
            raise UserError(f"{path}: {len(x)} images and {len(y)} labels; expected as many of both")
        if not len(x):
            raise UserError(f"{path}: no images in it, expected at least one")
        if y.min() < 0:
            raise UserError(f"{path}: label {y.min()} of image {int(y.argmin())} is negative; labels count from 0")
        images = x if x.ndim == 4 else x[..., None]
        return [
            self._item(f"{name}:{index}", f"{path}, image {index}", image, int(label))
            for index, (image, label) in enumerate(zip(images, y, strict=True))
        ]

    def _folder(self, folder: Path, prefix: str) -> list[Item]:
        found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        if not found:
            raise UserError(f"{folder}: no sub-folders in it, expected one for every class, with pictures")
        if not self._classes:
            self._classes, self._first = tuple(found), folder
        for name in found:
            if name not in self._classes:
                place = f"{self._first} has none" if self._first else "'classes' does not name it"
                raise UserError(
                    f"{folder}: has a class '{name}' and {place}{nearest(name, self._classes)}; labels would be "
                    "mixed up: name all of them under 'classes'"
                )
        items = []
        for name in found:
            label = self._classes.index(name)
            for file in self._pictures(folder, name):
                inside = file.relative_to(folder).as_posix()
                items.append(self._item(prefix + inside, str(file), _picture(file), label))
        if not items:
            raise UserError(f"{folder}: no pictures (.png, .jpg, ...) in its sub-folders")
        return items

    def _pictures(self, folder: Path, name: str) -> list[Path]:
        files = []
        for root, folders, names in os.walk(folder / name):
            folders[:] = sorted(entry for entry in folders if not entry.startswith("."))
            files += [Path(root, file) for file in names if Path(file).suffix.lower() in PICTURE_SUFFIXES]
        return sorted(file for file in files if not self._excludes(file.relative_to(folder).as_posix()))

    def _excludes(self, name: str) -> bool:
        met = [p for p in self._exclude if fnmatchcase(name, p) or fnmatchcase(name.rpartition("/")[2], p)]
        self._unused = [pattern for pattern in self._unused if pattern not in met]
        return bool(met)

    def _item(self, id_: str, where: str, image: Image, label: int) -> Item:
        pixels = hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()).hexdigest()
        self.images[id_] = image
        return Item(id_, pixels, where, {"image": pixels, "label": label})


def _picture(file: Path) -> Image:
    try:
        import PIL.Image
    except ImportError as error:
        raise UserError("folders of pictures need Pillow: pip install pillow; or give an .npz file") from error
    try:
        with PIL.Image.open(file) as picture:
            gray = picture.mode in ("1", "L", "LA")
            array = np.asarray(picture.convert("L" if gray else "RGB"))
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise UserError(f"{file}: not a readable picture, maybe it was cut short; mend or remove it") from error
    return array if array.ndim == 3 else array[..., None]
