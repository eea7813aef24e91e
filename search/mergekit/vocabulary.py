"""The `tokenizer` section of a merge file as the vocabulary of a recipe, and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from search.errors import nearest
from search.mergekit.merge_file import MergeFile, ModelReference, TokenSource
from search.mergekit.models import Models, reference_to
from search.mergekit.settings import Reading
from search.recipe import Recipe, TokenRule, Vocabulary
from search.yaml_source import Location


def read_vocabulary(
    file: MergeFile, models: Models, references: Mapping[ModelReference, Location], reading: Reading
) -> Vocabulary | None:
    """The vocabulary that a merge file asks for; faults go to `reading`."""
    section = file.tokenizer
    chosen = file.tokenizer_source if section is None else section.source
    if chosen is None:
        return None
    place: Location = ("tokenizer_source",) if section is None else ("tokenizer", "source")

    def name_of(reference: ModelReference, where: Location) -> str:
        if reference not in models.names:
            known = [str(known) for known in references]
            reading.fault(where, f"'{reference}' is not among the models of the file{nearest(str(reference), known)}")
            return ""
        return models.names[reference]

    if chosen == "base" and file.base_model is None:
        reading.fault(place, "the file names no base_model, whose tokens 'base' would be; give a model, or union")
    tokens: dict[str, TokenRule] = {}
    for token, rule in ((section.tokens if section else None) or {}).items():
        at: Location = ("tokenizer", "tokens", token)
        match rule.source:
            case None:
                tokens[token] = TokenRule(force=rule.force)
            case ModelReference() as reference:
                tokens[token] = TokenRule(source=name_of(reference, (*at, "source")), force=rule.force)
            case TokenSource(kind="zero"):
                tokens[token] = TokenRule(source="zero", force=rule.force)
            case TokenSource(model=reference, token=other, token_id=number):
                assert reference is not None
                model = name_of(reference, (*at, "source", "model"))
                tokens[token] = TokenRule(source=model, token=other, token_id=number, force=rule.force)
    return Vocabulary(
        tokens_of=name_of(chosen, place) if isinstance(chosen, ModelReference) else chosen,
        tokens=tokens,
        pad_to_multiple_of=None if section is None else section.pad_to_multiple_of,
    )


def tokenizer_keys(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The vocabulary of a recipe as mergekit writes it; empty without one."""
    vocabulary = recipe.vocabulary
    if vocabulary is None:
        return {}

    def where(model: str) -> Any:
        return reference_to(recipe, model, folder)

    source = vocabulary.tokens_of
    section: dict[str, Any] = {"source": source if source in ("base", "union") else where(source)}
    tokens: dict[str, Any] = {}
    for token, rule in vocabulary.tokens.items():
        entry: dict[str, Any] = {}
        if rule.source == "zero":
            entry["source"] = {"kind": "zero"}
        elif rule.source is not None and (rule.token is not None or rule.token_id is not None):
            other = {"token": rule.token} if rule.token is not None else {"token_id": rule.token_id}
            entry["source"] = {"kind": "model_token", "model": where(rule.source), **other}
        elif rule.source is not None:
            entry["source"] = where(rule.source)
        tokens[token] = {**entry, **({"force": True} if rule.force else {})}
    if tokens:
        section["tokens"] = tokens
    if vocabulary.pad_to_multiple_of is not None:
        section["pad_to_multiple_of"] = vocabulary.pad_to_multiple_of
    return {"tokenizer": section}
