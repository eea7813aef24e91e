"""`Recipe.vocabulary`, carried out: models whose tokenizers differ as models of one vocabulary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from search.checkpoints.header import damage
from search.checkpoints.view import View
from search.recipe import Vocabulary
from search.vocabulary.embeddings import Compute, by_token, with_rows
from search.vocabulary.output import changed_ids, tokenizer_files
from search.vocabulary.rows import Rows, plan_rows
from search.vocabulary.tokenizer import read_tokens, require_tokens

GENERATION = "generation_config.json"


@dataclass(frozen=True)
class MergedVocabulary:
    """Models of one vocabulary; the donor's config says so. Files replace the donor's, some of which go."""

    views: Mapping[str, View]
    files: Mapping[str, bytes]
    without: tuple[str, ...]


def with_vocabulary(
    vocabulary: Vocabulary, views: Mapping[str, View], donor: str, compute: Compute = "float32"
) -> MergedVocabulary:
    """Every model with the rows of the output's tokens.

    Args:
        views: model name -> view, all with the same tensor names.
        donor: the base, or the first model where there is no base.
        compute: as in the recipe.

    Raises:
        CheckpointError: a tokenizer or an embedding that is not there, or a tokenizer that tokens cannot be added to.
        RecipeError: a model or token that is not there.
    """
    folders = {name: _tokenizer_folder(view, views[donor]) for name, view in views.items()}
    tokens = {name: require_tokens(folder) for name, folder in folders.items()}
    counts = {name: view.tensors[by_token(view)[0]].shape[0] for name, view in views.items()}
    plan = plan_rows(vocabulary, {name: Rows(tokens[name].ids, counts[name]) for name in views}, donor)
    resized = with_rows(views, plan, compute)
    files = tokenizer_files(
        plan.ids, {name: (folders[name], tokens[name]) for name in views}, plan.first, views[donor].folder
    )
    before = tokens[donor].ids
    config = resized[donor].config
    resized[donor] = replace(resized[donor], config={**config, **changed_ids(config, before, plan.ids)})
    generation = _generation(views[donor].folder, before, plan.ids)
    return MergedVocabulary(resized, {**files.files, **generation}, files.without)


def _tokenizer_folder(view: View, donor: View) -> Path:
    """Where the tokenizer of a model is; an adapter without one uses that of its base."""
    under = view.checkpoint.base
    if view.checkpoint.kind == "adapter" and read_tokens(view.folder) is None:
        return donor.folder if under is None else under.folder
    return view.folder


def _generation(folder: Path, before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, bytes]:
    """The donor's settings of generation, if tokens that they name got other ids."""
    path = folder / GENERATION
    if not path.is_file():
        return {}
    try:
        settings: Any = json.loads(path.read_bytes())
    except ValueError as error:
        raise damage(path, f"is not valid JSON ({error})") from error
    changes = changed_ids(settings, before, after) if isinstance(settings, dict) else {}
    return {GENERATION: json.dumps({**settings, **changes}, indent=2).encode()} if changes else {}
