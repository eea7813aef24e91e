"""Which rows an embedding of the output consists of, model by model.

The rules are those of mergekit: a row that a model lacks is that of the only model that has the token, or
else the base's, or else the mean of the models that have it, or zero. Ids of added tokens go by the order
of the models and of their own ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from search.errors import RecipeError, nearest
from search.recipe import TokenRule, Vocabulary


@dataclass(frozen=True)
class Rows:
    """The vocabulary of one model: token -> id, and how many rows its embedding has."""

    ids: Mapping[str, int]
    count: int

    def row(self, token: str) -> int | None:
        """The row of a token; None where the tokenizer lacks it or the embedding is too short for it."""
        number = self.ids.get(token)
        return number if number is not None and number < self.count else None


class Place(NamedTuple):
    """A row of a model."""

    model: str
    row: int


@dataclass(frozen=True)
class Reads:
    """How an embedding of the output is made of that of one model.

    Attributes:
        own: for every row of the output, the model's own row that it is, or -1.
        given: other rows -> rows of models whose mean they are; none for zeros.
        padding: rows that are the mean of all others.
    """

    own: tuple[int, ...]
    given: Mapping[int, tuple[Place, ...]]
    padding: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """The vocabulary of the output: token -> id, rows of its embedding, and how they are read from each model."""

    ids: Mapping[str, int]
    count: int
    first: str
    reads: Mapping[str, Reads]


def plan_rows(vocabulary: Vocabulary, models: Mapping[str, Rows], donor: str) -> Plan:
    """The rows of the output.

    Args:
        models: model name -> its vocabulary, for all that take part.
        donor: the base, or the first model where there is no base.

    Raises:
        RecipeError: the vocabulary names a model or a token that is not there.
    """
    first = _first(vocabulary, models, donor)
    for token, rule in vocabulary.tokens.items():
        _check(token, rule, models)
    ids = _output_ids(vocabulary, models, first)
    real = max(models[first].count, 1 + max(ids.values(), default=-1))
    multiple = vocabulary.pad_to_multiple_of or 1
    count = -(-real // multiple) * multiple
    names: list[str | None] = [None] * count
    for token, number in ids.items():
        names[number] = token
    given = {t: _given(t, vocabulary.tokens.get(t), models, donor) for t in ids}
    reads = {model: _reads(model, models, names, given, vocabulary, first) for model in models}
    return Plan(ids, count, first, reads)


def _first(vocabulary: Vocabulary, models: Mapping[str, Rows], donor: str) -> str:
    """The model whose ids tokens keep."""
    if vocabulary.tokens_of in ("base", "union"):
        return donor
    if vocabulary.tokens_of not in models:
        known = ["base", "union", *models]
        raise RecipeError(
            f"vocabulary.tokens_of: no model is called '{vocabulary.tokens_of}'{nearest(vocabulary.tokens_of, known)}"
        )
    return vocabulary.tokens_of


def _check(token: str, rule: TokenRule, models: Mapping[str, Rows]) -> None:
    where = f"vocabulary.tokens.{token}"
    other = "token_id" if rule.token_id is not None else "token" if rule.token is not None else None
    if rule.source is None:
        if rule.force or other is not None:
            known = "a model" if other else "a model, or `zero`"
            raise RecipeError(f"{where}: names no source, which `{other or 'force'}` needs; name {known}")
        every = [known_token for rows in models.values() for known_token in rows.ids]
        if token not in every:
            raise RecipeError(
                f"{where}: no model has this token{nearest(token, every)}; for a new one name a source, or `zero`"
            )
        return
    if rule.token is not None and rule.token_id is not None:
        raise RecipeError(f"{where}: found both `token` and `token_id`, which name one row; leave one of them out")
    if rule.source == "zero" and "zero" not in models:
        if other is not None:
            raise RecipeError(f"{where}.{other}: the source `zero` has no tokens; leave it out or name a model")
        return
    if rule.source not in models:
        hint = nearest(rule.source, ["zero", *models])
        raise RecipeError(f"{where}.source: no model is called '{rule.source}'{hint}")
    rows = models[rule.source]
    if rule.token_id is not None:
        if rule.token_id >= rows.count:
            raise RecipeError(
                f"{where}.token_id: '{rule.source}' has no row {rule.token_id}; give a number below {rows.count}"
            )
    elif rows.row(wanted := rule.token or token) is None:
        raise RecipeError(f"{where}: '{rule.source}' has no row for the token '{wanted}'; name a model that has it")


def _output_ids(vocabulary: Vocabulary, models: Mapping[str, Rows], first: str) -> dict[str, int]:
    ids = dict(models[first].ids)
    new: list[str] = []
    if vocabulary.tokens_of == "union":
        for rows in models.values():
            new += sorted(rows.ids, key=lambda token, rows=rows: (rows.ids[token], token))  # type: ignore[misc]
    number = 1 + max(ids.values(), default=-1)
    for token in dict.fromkeys([*new, *vocabulary.tokens]):
        if token not in ids:
            ids[token] = number
            number += 1
    return ids


def _given(token: str, rule: TokenRule | None, models: Mapping[str, Rows], donor: str) -> tuple[Place, ...]:
    """The rows whose mean a model gets that lacks the token."""
    if rule is not None and rule.source is not None:
        if rule.source not in models:  # zero
            return ()
        row = rule.token_id if rule.token_id is not None else models[rule.source].row(rule.token or token)
        assert row is not None
        return (Place(rule.source, row),)
    places = [Place(model, row) for model, rows in models.items() if (row := rows.row(token)) is not None]
    base = [place for place in places if place.model == donor]
    return tuple(base or places)


def _reads(
    model: str,
    models: Mapping[str, Rows],
    names: list[str | None],
    given: Mapping[str, tuple[Place, ...]],
    vocabulary: Vocabulary,
    first: str,
) -> Reads:
    rows = models[model]
    taken = frozenset(rows.ids.values())
    own: list[int] = []
    other: dict[int, tuple[Place, ...]] = {}
    padding: list[int] = []
    for number, token in enumerate(names):
        if token is None:
            # Rows without a token, as many models have to fill up a multiple, stay what they are.
            spare = number < min(models[first].count, rows.count) and (model == first or number not in taken)
            own.append(number if spare else -1)
            if not spare:
                padding.append(number)
            continue
        rule = vocabulary.tokens.get(token)
        row = rows.row(token)
        if row is None or (rule is not None and rule.force):
            own.append(-1)
            other[number] = given[token]
        else:
            own.append(row)
    return Reads(tuple(own), other, tuple(padding))
