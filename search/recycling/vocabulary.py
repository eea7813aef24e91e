"""Embeddings for another vocabulary: every target token gets a weighted mean of source tokens' rows.

A token that both vocabularies have keeps its row. For the others there are two ways: the mean over the source
tokens that spell it (the plain baseline), or the softmax-weighted mean over the source tokens nearest to it
(Minixhofer 2022, WECHSEL, https://arxiv.org/abs/2112.06598: k = 10, temperature 0.1; Dobler 2023, FOCUS,
https://arxiv.org/abs/2305.14481). The papers measure nearness with word vectors trained elsewhere; here it is
the cosine between counts of character n-grams, which needs no other data and knows spelling only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from search.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

VocabularyMethod = Literal["mean", "nearest", "random"]

NEIGHBOURS, TEMPERATURE, LONGEST_NGRAM = 10, 0.1, 3

_ROLES = ("bos_token", "cls_token", "eos_token", "sep_token", "pad_token", "unk_token", "mask_token")
_TWINS = {"bos_token": "cls_token", "cls_token": "bos_token", "eos_token": "sep_token", "sep_token": "eos_token"}

Surface = tuple[str, bool]
"""The text of a token and whether a word starts with it."""


@dataclass(frozen=True)
class Transfer:
    """How the rows of the target vocabulary are made.

    Attributes:
        rows: per target token the source rows and their weights (sum 1); None: drawn.
        counts: how many tokens were copied, averaged, matched to neighbours, drawn.
        seed: of what is drawn.
    """

    rows: tuple[tuple[tuple[int, float], ...] | None, ...]
    counts: Mapping[str, int]
    seed: int

    def apply(self, source: Tensor) -> Tensor:
        """(target tokens, ...) rows from (source tokens, ...) rows.

        Drawn rows are N(mean, std) of the source's, per column and in the order of the tokens; a vector (the
        output bias) gives them its mean instead, so that no token is favoured by chance.
        """
        import torch

        target = torch.empty((len(self.rows), *source.shape[1:]), dtype=source.dtype)
        generator = torch.Generator().manual_seed(self.seed)
        mean = source.mean(0)
        std = source.std(0, correction=0)
        for index, row in enumerate(self.rows):
            if row is None:
                noise = torch.randn(source.shape[1:], generator=generator) if source.ndim > 1 else 0.0
                target[index] = mean + std * noise
            elif len(row) == 1:
                target[index] = source[row[0][0]]  # bit for bit
            else:
                weights = torch.tensor([weight for _, weight in row], dtype=source.dtype)
                target[index] = weights @ source[[token for token, _ in row]]
        return target


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, without remote code.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder, expected one with a tokenizer (tokenizer.json or vocab.txt)")
    if not has_tokenizer(folder):
        raise UserError(f"{folder}: holds no tokenizer, expected tokenizer.json or vocab.txt; save the tokenizer there")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # what transformers raises for a bad tokenizer has no common class
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{folder}: its tokenizer cannot be read: {reason}; save the tokenizer again") from error


def has_tokenizer(folder: Path) -> bool:
    """Whether the files of a tokenizer lie in a folder."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model"))


def plan_transfer(source: Any, target: Any, method: VocabularyMethod, seed: int, rows: int) -> Transfer:
    """Decide for every token of the target tokenizer where its row comes from.

    Tokens are the same if they have the same text and position in the word, whatever each tokenizer writes for
    it (`##ing`, `ing`, `Ġthe`), as the source's normaliser sees it (an uncased source has `the` for `The`).
    Special tokens match by their role; [CLS] serves as beginning and [SEP] as end of a text.

    Args:
        source, target: tokenizers of transformers.
        method: for tokens that the source does not have; "random" draws them all.
        seed: of what is drawn.
        rows: of the source's embedding; tokens beyond them count as missing.
    """
    source_tokens = {token: index for token, index in source.get_vocab().items() if index < rows}
    special = set(source.all_special_tokens)
    known: dict[Surface, int] = {}
    for (token, index), surface in zip(source_tokens.items(), _surfaces(source, list(source_tokens)), strict=True):
        if token not in special and surface[0]:
            known[surface] = min(index, known.get(surface, index))
    by_role = _special_matches(source, target, source_tokens)
    target_special = set(target.all_special_tokens)
    tokens = [""] * len(target)
    for token, index in target.get_vocab().items():
        if index < len(tokens):
            tokens[index] = token
    normalise = _normaliser(source)
    surfaces = _surfaces(target, tokens)
    result: list[tuple[tuple[int, float], ...] | None] = []
    counts = {"copied": 0, "averaged": 0, "nearest": 0, "random": 0}
    nearest = _Neighbours(known) if method == "nearest" else None
    for token, (text, starts) in zip(tokens, surfaces, strict=True):
        row: tuple[tuple[int, float], ...] | None = None
        kind = "random"
        same = by_role.get(token)
        if same is None and text and token not in target_special:
            same = known.get((text, starts), known.get((normalise(text), starts)))
        if same is not None:
            row, kind = ((same, 1.0),), "copied"
        elif text.strip() and token not in target_special:
            if nearest is not None:
                row, kind = nearest.row((normalise(text), starts)), "nearest"
            elif method == "mean":
                row, kind = _spelled(source, text, rows), "averaged"
        counts[kind if row is not None else "random"] += 1
        result.append(row)
    return Transfer(tuple(result), counts, seed)


def _spelled(source: Any, text: str, rows: int) -> tuple[tuple[int, float], ...] | None:
    """The source tokens that spell a text, with equal weights; unknown ones do not count."""
    ids = source(text, add_special_tokens=False)["input_ids"]
    ids = [index for index in ids if index != source.unk_token_id and index < rows]
    counted = Counter(ids)
    return tuple((index, count / len(ids)) for index, count in counted.items()) or None


def _special_matches(source: Any, target: Any, source_tokens: Mapping[str, int]) -> dict[str, int]:
    """Special token of the target -> token of the source with the same role."""
    found: dict[str, int] = {}
    for role in _ROLES:
        token = getattr(target, role, None)
        names = [getattr(source, role, None), getattr(source, _TWINS.get(role, role), None)]
        same = next((name for name in names if name in source_tokens), None)
        if token is not None and same is not None:
            found.setdefault(token, source_tokens[same])
    return found


def _normaliser(tokenizer: Any) -> Callable[[str], str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    normalizer = getattr(backend, "normalizer", None)
    if normalizer is None:
        return lambda text: text

    def normalise(text: str) -> str:
        return str(normalizer.normalize_str(text)).strip()

    return normalise


def _surfaces(tokenizer: Any, tokens: Sequence[str]) -> list[Surface]:
    """Text and position in the word of every token."""
    vocabulary = tokenizer.get_vocab()
    if any(token.startswith("##") and len(token) > 2 for token in vocabulary):
        return [(token.removeprefix("##"), not token.startswith("##") or token == "##") for token in tokens]
    if any(token.startswith("▁") for token in vocabulary):
        return [(token.replace("▁", " ").strip(), token.startswith("▁")) for token in tokens]
    if any(token.startswith("Ġ") for token in vocabulary):
        return [(_from_bytes(token).strip(), token.startswith("Ġ")) for token in tokens]
    return [(token, True) for token in tokens]


def _from_bytes(token: str) -> str:
    """The text of a byte-level token; empty where its bytes are no whole characters."""
    try:
        return bytes(_BYTE_OF[character] for character in token).decode()
    except (KeyError, UnicodeDecodeError):
        return ""


def _byte_table() -> dict[str, int]:
    """Character -> byte, as byte-level BPE writes bytes: printable Latin-1 as itself, the others from U+0100 on."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_table()


class _Neighbours:
    """Cosine between counts of character n-grams, of a text against all source tokens."""

    def __init__(self, known: Mapping[Surface, int]) -> None:
        import torch

        ordered = sorted(known.items(), key=lambda entry: entry[1])
        self.tokens = [index for _, index in ordered]
        places: dict[str, list[int]] = {}
        values: dict[str, list[float]] = {}
        for number, (surface, _) in enumerate(ordered):
            counted = _ngrams(surface)
            norm = _norm(counted)
            for gram, count in counted.items():
                places.setdefault(gram, []).append(number)
                values.setdefault(gram, []).append(count / norm)
        self.columns = {gram: (torch.tensor(places[gram]), torch.tensor(values[gram])) for gram in places}

    def row(self, surface: Surface) -> tuple[tuple[int, float], ...] | None:
        """Source tokens and weights, or None where no source token shares an n-gram with the text."""
        import torch

        counted = _ngrams(surface)
        norm = _norm(counted)
        cosine = torch.zeros(len(self.tokens))
        for gram, count in counted.items():
            if gram in self.columns:
                places, values = self.columns[gram]
                cosine[places] += values * (count / norm)
        least = float(torch.topk(cosine, min(NEIGHBOURS, len(cosine))).values[-1])
        near = torch.nonzero((cosine >= least) & (cosine > 0)).flatten()
        if not len(near):
            return None
        # Of equally near tokens those with the smaller number, whatever order topk has them in.
        order = torch.sort(cosine[near], descending=True, stable=True)
        weights = torch.softmax(order.values[:NEIGHBOURS].double() / TEMPERATURE, 0).tolist()
        chosen = near[order.indices[:NEIGHBOURS]].tolist()
        return tuple((self.tokens[place], weight) for place, weight in zip(chosen, weights, strict=True))


def _norm(counted: Counter[str]) -> float:
    return float(sum(count * count for count in counted.values()) ** 0.5)


def _ngrams(surface: Surface) -> Counter[str]:
    text = ("<" if surface[1] else "") + surface[0]
    return Counter(
        text[start : start + size] for size in range(1, LONGEST_NGRAM + 1) for start in range(len(text) - size + 1)
    )
