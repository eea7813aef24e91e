"""What the output's vocabulary changes beside tensors: tokenizer files, and ids in configs."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from search.checkpoints.header import quoted
from search.errors import CheckpointError
from search.vocabulary.tokenizer import TOKENIZER_FILES, TOKENIZER_JSON, Tokens

_KEEP = (TOKENIZER_JSON, "tokenizer_config.json", "special_tokens_map.json", "chat_template*")
"""Of a tokenizer's files, those that still hold when tokens were added to `tokenizer.json`."""

SUFFIXES = (".json", ".txt", ".model", ".jinja", ".spm", ".codes", ".tiktoken")
"""No code, no pickle."""


@dataclass(frozen=True)
class TokenizerFiles:
    """Files that replace the donor's, and files of the donor that the output must not have."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    without: tuple[str, ...] = ()


def tokenizer_files(
    ids: Mapping[str, int], tokenizers: Mapping[str, tuple[Path, Tokens]], first: str, donor: Path
) -> TokenizerFiles:
    """The tokenizer of the output.

    Args:
        ids: token -> id, of the output.
        tokenizers: model name -> folder and tokens, in the order of the models.
        first: the model whose ids they keep.
        donor: the folder whose files are copied where nothing else is said.

    Raises:
        CheckpointError: tokens have to be added to a tokenizer that does not take them.
    """
    folder, tokens = tokenizers[first]
    added = ids.keys() - tokens.ids.keys()
    own = {path.name: path for path in _files_of(folder)}
    theirs = {path.name for path in _files_of(donor)}
    if not added:
        if folder == donor:
            return TokenizerFiles()
        files = {name: path.read_bytes() for name, path in own.items()}
        return TokenizerFiles(files, tuple(sorted(theirs - files.keys())))
    if TOKENIZER_JSON not in own:
        raise CheckpointError(
            f"{folder}: tokens of other models are to be added to its tokenizer, which takes a {TOKENIZER_JSON}; "
            "save it with AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        )
    kept = {n: path.read_bytes() for n, path in own.items() if any(fnmatchcase(n, pattern) for pattern in _KEEP)}
    data = json.loads(kept[TOKENIZER_JSON])
    entries = _add(data, ids, tokenizers, first)
    kept[TOKENIZER_JSON] = json.dumps(data, ensure_ascii=False, indent=2).encode()
    _verify(kept[TOKENIZER_JSON], ids, folder)
    if "tokenizer_config.json" in kept:
        config = json.loads(kept["tokenizer_config.json"])
        if isinstance(known := config.get("added_tokens_decoder"), dict):
            known |= {str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in entries}
            kept["tokenizer_config.json"] = json.dumps(config, ensure_ascii=False, indent=2).encode()
    return TokenizerFiles(kept, tuple(sorted((theirs | own.keys()) - kept.keys())))


def _files_of(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        named = any(fnmatchcase(path.name, pattern) for pattern in TOKENIZER_FILES)
        if named and path.is_file() and path.suffix in SUFFIXES:
            yield path


def _add(
    data: dict[str, Any], ids: Mapping[str, int], tokenizers: Mapping[str, tuple[Path, Tokens]], first: str
) -> list[dict[str, Any]]:
    """Write the tokens that `first` lacks into its `tokenizer.json`; returns the entries of the added ones."""
    folder, tokens = tokenizers[first]
    entries: list[dict[str, Any]] = []
    plain: dict[str, int] = {}
    for token in sorted(ids.keys() - tokens.ids.keys(), key=lambda token: ids[token]):
        origin = next(((path, t) for path, t in tokenizers.values() if token in t.ids), None)
        if origin is not None and token not in origin[1].added:
            if origin[1].kind != tokens.kind or tokens.kind == "Unigram":
                raise CheckpointError(
                    f"{folder}: its tokenizer ({tokens.kind or 'unknown kind'}) cannot take {quoted(token)} from the "
                    f"one in {origin[0]} ({origin[1].kind or 'unknown kind'}); keep the tokens of one model "
                    "(vocabulary.tokens_of)"
                )
            plain[token] = ids[token]
            continue
        known = dict(origin[1].added[token]) if origin is not None else {}
        usual = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        entries.append({"id": ids[token], "content": token, **usual, **known} | {"id": ids[token]})
    data["added_tokens"] = [*(data.get("added_tokens") or []), *entries]
    vocab = data["model"]["vocab"]
    if plain and isinstance(vocab, dict):
        # A tokenizer numbers added tokens that its model does not know after those it does.
        vocab |= plain | {entry["content"]: entry["id"] for entry in data["added_tokens"]}
    return entries


def _verify(content: bytes, ids: Mapping[str, int], folder: Path) -> None:
    """Load what was written and look up every token."""
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_str(content.decode()).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises nothing more specific
        raise CheckpointError(
            f"{folder}: its tokenizer does not load with the tokens of the other models ({error}); keep the tokens of "
            "one model (vocabulary.tokens_of)"
        ) from error
    wrong = sorted(token for token, number in ids.items() if found.get(token) != number)
    if wrong:
        raise CheckpointError(
            f"{folder}: its tokenizer would give {quoted(wrong[0])} the id {found.get(wrong[0])} instead of "
            f"{ids[wrong[0]]}; keep the tokens of one model (vocabulary.tokens_of)"
        )


def changed_ids(config: Mapping[str, Any], before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, Any]:
    """The keys of a config that name tokens by number (`eos_token_id`), for tokens that got other numbers."""
    names = {number: token for token, number in before.items()}

    def moved(number: Any) -> Any:
        if isinstance(number, list):
            return [moved(each) for each in number]
        token = names.get(number) if isinstance(number, int) and not isinstance(number, bool) else None
        return after.get(token, number) if token is not None else number

    changes: dict[str, Any] = {}
    for key, value in config.items():
        if key.endswith("_token_id") and (new := moved(copy.copy(value))) != value:
            changes[key] = new
        elif key == "text_config" and isinstance(value, dict) and (inner := changed_ids(value, before, after)):
            changes[key] = {**value, **inner}
    return changes
