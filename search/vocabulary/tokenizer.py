"""The tokens of a model folder, read from the files of its tokenizer without running it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from search.checkpoints.header import damage, quoted
from search.errors import CheckpointError

TOKENIZER_JSON = "tokenizer.json"

TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "spiece.model",
    "sentencepiece*.model",
    "source.spm",
    "target.spm",
    "bpe.codes",
    "*.tiktoken",
)
"""What belongs to a tokenizer, of the files that stock transformers reads."""


@dataclass(frozen=True)
class Tokens:
    """What a tokenizer knows.

    Attributes:
        ids: token -> id, of all tokens.
        added: tokens that stand beside the tokenizer's model -> their entry in `tokenizer.json`.
        kind: of its model, such as `BPE`; empty where it is not known.
    """

    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    kind: str = ""


def read_tokens(folder: Path) -> Tokens | None:
    """The tokens of a folder; None where there is no file that lists them.

    Raises:
        CheckpointError: a file cannot be read, or is not what it should be.
    """
    for name in (TOKENIZER_JSON, "vocab.json", "vocab.txt"):
        path = folder / name
        if path.is_file():
            status = path.stat()
            return _read(path, status.st_size, status.st_mtime_ns)
    return None


@lru_cache(maxsize=8)
def _read(path: Path, size: int, mtime_ns: int) -> Tokens:
    del size, mtime_ns  # they are part of the key
    try:
        if path.name == "vocab.txt":
            # Not `splitlines`: some tokens are other characters that end a line.
            lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
            ids = {token: number for number, token in enumerate(lines)}
            return Tokens(ids | _slow_added(path.parent))
        data = json.loads(path.read_text(encoding="utf-8"))
        if path.name == "vocab.json":
            return Tokens({str(token): int(number) for token, number in data.items()} | _slow_added(path.parent))
        model = data["model"]
        vocab = model["vocab"]
        if isinstance(vocab, list):  # Unigram: [token, score]
            vocab = {entry[0]: number for number, entry in enumerate(vocab)}
        added = {entry["content"]: entry for entry in data.get("added_tokens") or ()}
        ids = {**vocab, **{token: entry["id"] for token, entry in added.items()}}
        return Tokens(ids, added, str(model.get("type") or ("Unigram" if isinstance(model["vocab"], list) else "BPE")))
    except OSError as error:
        raise damage(path, f"cannot be read ({error.strerror})", "make it readable") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise damage(path, f"is not the file of a tokenizer ({type(error).__name__}: {error})") from error


def _slow_added(folder: Path) -> dict[str, int]:
    path = folder / "added_tokens.json"
    return {str(t): int(i) for t, i in json.loads(path.read_text()).items()} if path.is_file() else {}


def require_tokens(folder: Path) -> Tokens:
    """The tokens of a folder.

    Raises:
        CheckpointError: it has no file that lists them.
    """
    tokens = read_tokens(folder)
    if tokens is None:
        raise CheckpointError(
            f"{folder}: has no {TOKENIZER_JSON}, so its tokens are not known; save its tokenizer there with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        )
    return tokens


def vocabulary_conflict(theirs: Path, ours: Path) -> str | None:
    """Where the tokenizers of two folders contradict each other: a token with two ids, or an id with two
    tokens. None where they do not, or where one of them is not there. Tokens that only one has are none."""
    if theirs == ours:
        return None
    paths = theirs / TOKENIZER_JSON, ours / TOKENIZER_JSON
    if all(path.is_file() for path in paths) and _same_bytes(*paths):
        return None
    a, b = read_tokens(theirs), read_tokens(ours)
    if a is None or b is None:
        return None
    for token, number in a.ids.items():
        if (other := b.ids.get(token, number)) != number:
            return f"its tokenizer gives {quoted(token)} the id {number}, that of the base {other}"
    names = {number: token for token, number in b.ids.items()}
    for token, number in a.ids.items():
        if token not in b.ids and number in names:
            return f"its tokenizer has {quoted(token)} as id {number}, that of the base has {quoted(names[number])}"
    return None


def _same_bytes(left: Path, right: Path) -> bool:
    return left.stat().st_size == right.stat().st_size and left.read_bytes() == right.read_bytes()
