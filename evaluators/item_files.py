"""One item of a data set, and how files are read into items, with messages that name file and line."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from evaluators.errors import UserError

JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})

# fmt: off
TEXT_SUFFIXES = frozenset({
    ".txt", ".md", ".rst", ".tex", ".html", ".py", ".pyi", ".sh", ".sql", ".c", ".h", ".cc", ".cpp", ".cxx",
    ".hh", ".hpp", ".cu", ".cuh", ".java", ".kt", ".scala", ".js", ".jsx", ".ts", ".tsx", ".css", ".go",
    ".rs", ".rb", ".php", ".lua", ".r", ".jl", ".cs", ".swift", ".hs", ".ml", ".clj", ".ex", ".pl", ".lean",
})
# fmt: on
"""What counts as text in a folder; a file that is named itself may have any suffix."""

Parse = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Turns a JSON object into the checked content of an item; raises `ValueError` with the reason."""


@dataclass(frozen=True)
class Item:
    """One thing to score.

    Attributes:
        id: unique over the pools: the `id` of the JSON line, or made from the file's name.
        document: what it was taken from: the `document` of the line, or the hash of the content.
        where: file and line, for messages.
        content: what the evaluator's `parse` made of it.
    """

    id: str
    document: str
    where: str
    content: Mapping[str, Any]

    @cached_property
    def content_sha256(self) -> str:
        return _content_sha256(self.content)


class Reader:
    """Reads files and folders into items.

    Args:
        parse: makes the content of an item from a JSON object.
        reads_text: whether text files are read too, as contents `{"text": ...}`.
        separator: what stands between the texts of a text file; None for one text per file.
        exclude: patterns of files in folders to leave out: `*.bak` goes by the name, `drafts/*` by the path
            inside the folder; a star may stand for slashes too.
    """

    def __init__(self, parse: Parse, reads_text: bool, separator: str | None, exclude: Sequence[str] = ()) -> None:
        self._parse, self._reads_text, self._separator = parse, reads_text, separator
        self._exclude, self._unused = tuple(exclude), list(exclude)

    def __call__(self, path: Path, prefix: str) -> list[Item]:
        """The items of a file or folder; made-up ids start with `prefix`."""
        if path.is_dir():
            items = [item for file, name in self._files(path) for item in self._inside(file, prefix, name)]
        elif path.is_file():
            items = self._file(path, prefix + path.name, blank=False)
        else:
            raise UserError(f"{path}: {'not a file or folder' if path.exists() else _no_such(path)}")
        if not items:
            raise UserError(f"{path}: no items in it, expected at least one")
        return items

    def refuse_unused(self) -> None:
        """Raise `UserError` if a pattern of `exclude` met no file: it is misspelt, and what it means is read."""
        if self._unused:
            raise UserError(f"exclude: no file of the data matches '{self._unused[0]}'; correct it or remove it")

    def _inside(self, file: Path, prefix: str, name: str) -> list[Item]:
        """The items of a file in a folder; one that cannot be read may be left out."""
        try:
            return self._file(file, prefix + name, blank=True)
        except _UnreadableError as error:
            raise UserError(f"{error}, or leave it out with exclude: ['{_literal(name)}']") from error

    def _excludes(self, name: str) -> bool:
        """Whether a file is left out, by its path inside the folder."""
        met = [p for p in self._exclude if fnmatchcase(name, p) or fnmatchcase(name.rpartition("/")[2], p)]
        self._unused = [pattern for pattern in self._unused if pattern not in met]
        return bool(met)

    def _files(self, folder: Path) -> list[tuple[Path, str]]:
        """Files of a folder that hold items, with their names inside it; hidden ones are left out."""
        wanted = JSONL_SUFFIXES | (TEXT_SUFFIXES if self._reads_text else frozenset())
        found, others = [], 0
        for root, folders, names in os.walk(folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in names:
                file = Path(root, name)
                if self._excludes(file.relative_to(folder).as_posix()):
                    continue
                if not name.startswith(".") and file.suffix.lower() in wanted:
                    found.append((file, file.relative_to(folder).as_posix()))
                else:
                    others += 1
        if not found:
            kinds = "text files (.txt, .md, .py, ...) or .jsonl files" if self._reads_text else ".jsonl files"
            raise UserError(f"{folder}: no {kinds} in this folder, {others} other files")
        return sorted(found, key=lambda pair: pair[1])

    def _file(self, path: Path, name: str, *, blank: bool) -> list[Item]:
        if not path.is_file():  # a pipe would be waited for
            what = "a link to nothing" if path.is_symlink() and not path.exists() else "not a regular file"
            raise _UnreadableError(f"{path}: {what}; remove it")
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise _UnreadableError(f"{path}: not UTF-8 text (byte {error.start}); convert it") from None
        except OSError as error:
            raise _UnreadableError(f"{path}: cannot be read: {error.strerror}; make it readable") from error
        if not self._reads_text or path.suffix.lower() in JSONL_SUFFIXES | {".json"}:
            lines = enumerate(text.split("\n"), 1)
            return [self._line(path, number, line, name) for number, line in lines if line.strip()]
        if not (text.strip() or blank):
            raise UserError(f"{path}: the file is empty")
        pieces = [text] if self._separator is None else [p.strip("\r\n") for p in text.split(self._separator)]
        texts = [piece for piece in pieces if piece.strip()]
        if self._separator is None:
            return [_item(name, None, str(path), {"text": piece}) for piece in texts]
        return [
            _item(f"{name}#{number}", None, f"{path}, text {number}", {"text": piece})
            for number, piece in enumerate(texts, 1)
        ]

    def _line(self, path: Path, number: int, line: str, name: str) -> Item:
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise UserError(f"{where}: not JSON: {reason}; expected one JSON object per line") from None
        if not isinstance(record, dict):
            raise UserError(f"{where}: {_kind(record)}, expected one JSON object per line")
        try:
            labels = {key: _label(record, key) for key in ("id", "document") if record.get(key) is not None}
            return _item(labels.get("id", f"{name}:{number}"), labels.get("document"), where, self._parse(record))
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error


class _UnreadableError(UserError):
    """A file that holds no text, whatever its name."""


def _literal(name: str) -> str:
    """A pattern for just this name, as it stands between single quotes in YAML."""
    return re.sub(r"([*?\[])", r"[\1]", name).replace("'", "''")


def _item(id_: str, document: str | None, where: str, content: Mapping[str, Any]) -> Item:
    # Without a document of its own, equal contents are one document: they cannot end in two pools.
    return Item(id_, document if document is not None else _content_sha256(content), where, content)


def _label(record: Mapping[str, Any], key: str) -> str:
    value = record[key]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return checked_text(value, f"'{key}'")


def text_in(record: Mapping[str, Any], key: str, *, empty: bool = False) -> str:
    """The text under `key`, for `parse` functions.

    Raises:
        ValueError: it is missing, no text, blank (unless `empty`), or cannot be written as UTF-8.
    """
    if key not in record:
        raise ValueError(f"no key '{key}'; the line has {', '.join(map(repr, record)) or 'no keys'}")
    return checked_text(record[key], f"'{key}'", empty=empty)


def checked_text(value: Any, name: str, *, empty: bool = False) -> str:
    """`value` if it is a text that can be scored; `name` is how messages call it."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {_kind(value)}, expected text")
    if not (empty or value.strip()):
        raise ValueError(f"{name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} has half a character (an unpaired surrogate) at position {error.start}") from None
    return value


def _no_such(path: Path) -> str:
    try:
        close = difflib.get_close_matches(path.name, sorted(os.listdir(path.parent)), n=1)
    except OSError:
        return f"no such file or folder, and no folder {path.parent} either"
    return "no such file or folder" + (f"; did you mean '{close[0]}'?" if close else "")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _content_sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
