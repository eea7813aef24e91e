"""Recipes: fully specified merges, as plain data.

A recipe names its models and gives, by rules, an operator with parameters for every output tensor.
The search, the baselines and a one-shot `meiosis merge` all go through it. It reads and writes as
YAML, and its hash stands for the candidate wherever the same models are meant.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from search.errors import RecipeError

Value = bool | int | float | str
"""A parameter of an operator."""


class ModelRef(BaseModel):
    """Where a model is, and which bytes it had."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(description="folder or hub id of a checkpoint or LoRA adapter")
    sha256: str | None = Field(None, description="content hash of the weights, filled in by Meiosis")
    revision: str | None = Field(None, description="commit, tag or branch of a hub id")
    adapts: str | None = Field(
        None, description="for a LoRA adapter, the model that it was trained on; by default the base"
    )
    statistics: str | None = Field(
        None, description="file that `meiosis statistics` wrote, for operators that need one"
    )
    random_delta: int | None = Field(
        None,
        ge=0,
        lt=2**32,
        description="seed of a placebo: the base plus random changes of the norms that this model's have, tensor by "
        "tensor, instead of the model",
    )


class Rule(BaseModel):
    """How the tensors that match are made."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tensors: tuple[str, ...] = Field(
        ("*",), min_length=1, description="tensor names; `*`, `?` and `[...]` are wild cards"
    )
    operator: str = Field(description="a name from `meiosis operators`")
    sources: dict[str, dict[str, Value]] = Field(
        min_length=1, description="model name -> parameters of that model, in the operator's order of inputs"
    )
    parameters: dict[str, Value] = Field(default_factory=dict, description="parameters that all models share")


class TokenRule(BaseModel):
    """Where the row of one token comes from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str | None = Field(None, description="a model, or `zero`; by default as for other tokens")
    token: str | None = Field(None, description="another token of that model, whose row is taken")
    token_id: int | None = Field(None, ge=0, description="the same by its number in that model")
    force: bool = Field(False, description="whether models that have the token take this row too")


class Vocabulary(BaseModel):
    """The tokens of the output, and the rows of tokens that a model lacks.

    Such a row is that of the only model that has the token, or else the base's, or else the mean of the
    models that have it (as mergekit does).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens_of: str = Field("base", description="`base`, `union` of all models in their order, or a model name")
    tokens: dict[str, TokenRule] = Field(default_factory=dict, description="token -> where its row comes from")
    pad_to_multiple_of: int | None = Field(None, ge=1, description="rows are added until their number is a multiple")


class Recipe(BaseModel):
    """A merge of `models`; for each tensor the first rule that matches its name holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    meiosis: Literal[1] = Field(1, description="version of this format")
    base: str | None = Field(None, description="name of the model that task vectors start from")
    models: dict[str, ModelRef] = Field(min_length=1)
    rules: tuple[Rule, ...] = Field(min_length=1)
    dtype: str | None = Field(None, description="dtype of the output; by default each tensor keeps that of the donor")
    seed: int = Field(0, ge=0, description="seed of operators that draw masks")
    input_dtype: str | None = Field(None, description="dtype that every input is rounded to before it is merged")
    compute: Literal["float32", "inputs"] = Field(
        "float32", description="what to compute in: float32, or as mergekit does the dtype of the inputs"
    )
    layers: tuple[dict[str, Annotated[int, Field(ge=0)]], ...] | None = Field(
        None,
        min_length=1,
        description="for models with other layers than their own: for every layer of the output, model name -> number "
        "of the layer that is read; tensors outside the layers are read as they are",
    )
    scales: tuple[Annotated[float, Field(allow_inf_nan=False)], ...] | None = Field(
        None,
        description="makes `layers` a path: for every layer of the output, the factor on the hidden state that enters "
        "it, folded into the weights that are written; a layer that is read twice is the same layer twice",
    )
    vocabulary: Vocabulary | None = Field(
        None, description="for models whose tokenizers differ: what to do with tokens"
    )
    chat_template: str | None = Field(None, description="chat template of the output (Jinja), not the donor's")

    @property
    def donor(self) -> str:
        """The model that gives config, tokenizer and tensor names: the base, or else the first model."""
        return self.base if self.base is not None else next(iter(self.models))

    def check(self) -> None:
        """Raise `RecipeError` for a name that `models` does not have, scales that do not fit, or a placebo of
        nothing."""
        for where, name in [
            ("base", self.base),
            *((f"rules[{i}].sources", s) for i, r in enumerate(self.rules) for s in r.sources),
            *((f"models.{m}.adapts", ref.adapts) for m, ref in self.models.items()),
            *((f"layers[{i}]", s) for i, layer in enumerate(self.layers or ()) for s in layer),
        ]:
            if name is not None and name not in self.models:
                from search.errors import nearest

                raise RecipeError(f"{where}: no model is called '{name}'{nearest(name, self.models)}")
        if self.scales is not None:
            if len(self.scales) != len(self.layers or ()):
                raise RecipeError(
                    f"scales: found {len(self.scales)} numbers for {len(self.layers or ())} layers; expected one for "
                    "every entry of `layers`"
                )
            if 0.0 in self.scales:
                raise RecipeError(f"scales[{self.scales.index(0.0)}]: is 0, which no layer could undo; leave it out")
        for name, ref in self.models.items():
            if ref.random_delta is not None and self.base in (None, name):
                found = "the recipe has no base" if self.base is None else f"'{name}' is the base itself"
                raise RecipeError(f"models.{name}.random_delta: changes the base at random, and {found}; name a base")

    def assign(self, tensor_names: Iterable[str]) -> dict[str, Rule]:
        """The rule of every tensor, in the order given.

        Raises:
            RecipeError: a tensor that no rule matches, or a rule that matches no tensor.
        """
        exact: dict[str, int] = {}
        used: set[tuple[int, str]] = set()
        wild: list[tuple[int, str]] = []
        for index, rule in enumerate(self.rules):
            for pattern in rule.tensors:
                if any(c in pattern for c in "*?["):
                    wild.append((index, pattern))
                else:
                    exact.setdefault(pattern, index)
        names = list(tensor_names)
        assigned: dict[str, Rule] = {}
        for name in names:
            found = [(index, pattern) for index, pattern in wild if fnmatch.fnmatchcase(name, pattern)]
            used.update(found)
            matches = [index for index, _ in found]
            if name in exact:
                matches.append(exact[name])
            if not matches:
                raise RecipeError(f"no rule of the recipe matches tensor '{name}'; end with a rule for tensors ['*']")
            assigned[name] = self.rules[min(matches)]
        missing = sorted(set(exact) - set(names))
        if missing:
            from search.errors import nearest

            where, hint = f"rules[{exact[missing[0]]}].tensors", nearest(missing[0], names)
            raise RecipeError(f"{where}: the models have no tensor '{missing[0]}'{hint}")
        idle = [(index, pattern) for index, pattern in wild if (index, pattern) not in used]
        if idle:
            index, pattern = idle[0]
            raise RecipeError(
                f"rules[{index}].tensors: no tensor of the models matches '{pattern}'; "
                f"they have names such as {', '.join(map(repr, names[:: max(1, len(names) // 3)][:3]))}"
            )
        return assigned

    def canonical(self) -> dict[str, Any]:
        """What the hash covers: everything, with a model standing for its bytes where they are known."""
        data = self.model_dump(mode="json")
        data["models"] = {name: ref.sha256 or ref.path for name, ref in sorted(self.models.items())}
        if statistics := {name: ref.statistics for name, ref in sorted(self.models.items()) if ref.statistics}:
            data["statistics"] = statistics
        if adapts := {name: ref.adapts for name, ref in sorted(self.models.items()) if ref.adapts}:
            data["adapts"] = adapts
        if deltas := {n: ref.random_delta for n, ref in sorted(self.models.items()) if ref.random_delta is not None}:
            data["random_delta"] = deltas
        # Younger than the first hashes:
        for name in ("input_dtype", "compute", "layers", "scales", "vocabulary", "chat_template"):
            if data[name] == type(self).model_fields[name].default:
                del data[name]
        return data

    @property
    def hashed_text(self) -> str:
        """The canonical form as JSON in ASCII, without blanks."""
        return json.dumps(self.canonical(), sort_keys=False, separators=(",", ":"), ensure_ascii=True)

    @property
    def hash(self) -> str:
        """sha256 of the canonical form, 64 hex digits. Does not depend on where the models lie."""
        return hashlib.sha256(self.hashed_text.encode()).hexdigest()

    def to_yaml(self) -> str:
        """The recipe as YAML that `from_yaml` reads back to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False, width=100)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Recipe:
        """A recipe from plain data, checked."""
        recipe = cls.model_validate(data)
        recipe.check()
        return recipe
