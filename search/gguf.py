"""What llama.cpp's `convert_hf_to_gguf.py` would miss in a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from search.checkpoints.reading import INDEX, WEIGHTS

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""Any of these holds the tokens; `vocab.json` needs its `merges.txt`."""


def gguf_ready(folder: Path) -> list[str]:
    """One line for everything that a conversion to GGUF needs and the folder lacks; empty if it is ready.

    Whether llama.cpp knows the architecture and the tokenizer's pre-tokenizer it says itself.
    """
    folder = Path(folder)
    config = _read(folder / "config.json")
    missing = []
    if not isinstance(config.get("architectures"), list) or not config["architectures"]:
        missing.append("config.json names no architectures; a conversion to GGUF goes by the first of them")
    if not (folder / WEIGHTS).exists() and not (folder / INDEX).exists():
        missing.append(f"there are no weights ({WEIGHTS} or {INDEX})")
    if not any((folder / name).exists() for name in VOCABULARIES):
        missing.append(
            "there is no tokenizer (tokenizer.json or tokenizer.model), which a conversion to GGUF needs; the donor's "
            "folder has none: copy one there and merge again"
        )
    elif (folder / "vocab.json").exists() and not any(
        (folder / name).exists() for name in ("merges.txt", "tokenizer.json", "tokenizer.model")
    ):
        missing.append("there is vocab.json without merges.txt; copy the donor's")
    elif not (folder / "tokenizer_config.json").exists():
        missing.append("there is no tokenizer_config.json, from which special tokens and chat template are taken")
    tokens = _tokens(folder / "tokenizer.json")
    rows = config.get("vocab_size")
    if isinstance(rows, int) and tokens > rows:
        missing.append(f"the tokenizer has {tokens} tokens, the model's vocab_size is {rows}: rows are missing")
    return missing


def _tokens(path: Path) -> int:
    """One more than the highest token of a `tokenizer.json`; 0 where it does not say."""
    content = _read(path)
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    numbers = [*vocabulary.values()] if isinstance(vocabulary, dict) else []
    if isinstance(vocabulary, list):
        numbers = [len(vocabulary) - 1]
    added = content.get("added_tokens")
    numbers += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return max((number for number in numbers if isinstance(number, int)), default=-1) + 1


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
