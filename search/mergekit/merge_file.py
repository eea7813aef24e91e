"""The form of a mergekit merge file: what keys there may be, strictly read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from search.errors import ConfigError
from search.yaml_source import YamlSource

SIGNS = ("merge_method", "slices", "modules")
"""Keys that a merge file has and a recipe has not."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _model_path(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    path, at, revision = value.partition("@")
    if "@" in revision:
        raise ValueError(f"'{value}' has more than one @; expected path or path@revision")
    return {"path": path, "revision": revision if at else None}


class ModelPath(_Section):
    """A folder or hub id, with the revision of a hub id."""

    path: str = Field(min_length=1)
    revision: str | None = None

    def __str__(self) -> str:
        return self.path if self.revision is None else f"{self.path}@{self.revision}"


def _reference(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    parts = value.split("+")
    if len(parts) > 2:
        raise ValueError(f"'{value}' has more than one +; expected model or model+adapter")
    return dict(zip(("model", "lora"), parts, strict=False))


class ModelReference(_Section):
    """A model, perhaps with a LoRA adapter on it."""

    model: Annotated[ModelPath, BeforeValidator(_model_path)]
    lora: Annotated[ModelPath | None, BeforeValidator(_model_path)] = None
    override_architecture: str | None = None

    def __str__(self) -> str:
        return str(self.model) if self.lora is None else f"{self.model}+{self.lora}"


Reference = Annotated[ModelReference, BeforeValidator(_reference)]
Parameters = dict[str, Any]


class Model(_Section):
    """One entry of `models`."""

    model: Reference
    parameters: Parameters | None = None


class Source(_Section):
    """One entry of the `sources` of a slice: its layers from `layer_range[0]` up to, not with, `layer_range[1]`."""

    model: Reference
    layer_range: tuple[int, int]
    parameters: Parameters | None = None

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        low, high = self.layer_range
        if not 0 <= low < high:
            raise ValueError(f"layer_range [{low}, {high}] holds no layer; expected 0 <= first < last + 1")
        return self


class Slice(_Section):
    """One entry of `slices`."""

    sources: tuple[Source, ...]
    base_model: Reference | None = None
    residual_weight: float | None = None
    parameters: Parameters | None = None

    @model_validator(mode="after")
    def _has_sources(self) -> Self:
        if not self.sources:
            raise ValueError("a slice needs sources, found none")
        return self


class Module(_Section):
    """One entry of `modules`."""

    slices: tuple[Slice, ...] | None = None
    models: tuple[Model, ...] | None = None
    parameters: Parameters | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if bool(self.slices) == bool(self.models):
            raise ValueError("expected exactly one of 'slices' and 'models'")
        return self


class TokenSource(_Section):
    """The row of one token of one model, or zeros."""

    kind: Literal["zero", "model_token"]
    model: Reference | None = None
    token: str | None = None
    token_id: int | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        given = sum(value is not None for value in (self.token, self.token_id))
        if self.kind == "model_token" and (self.model is None or given != 1):
            raise ValueError("kind: model_token needs 'model' and one of 'token' and 'token_id'")
        return self


def _is_kind(value: Any) -> Any:
    return TokenSource.model_validate(value) if isinstance(value, dict) and "kind" in value else _as_reference(value)


def _as_reference(value: Any) -> Any:
    return value if value is None else ModelReference.model_validate(_reference(value))


class Token(_Section):
    """One entry of `tokenizer.tokens`."""

    source: Annotated[TokenSource | ModelReference | None, BeforeValidator(_is_kind)] = None
    force: bool = False


def _tokenizer_source(value: Any) -> Any:
    return value if value in ("base", "union") else _as_reference(value)


class Tokenizer(_Section):
    """The `tokenizer` section."""

    source: Annotated[Literal["base", "union"] | ModelReference, BeforeValidator(_tokenizer_source)] = "union"
    tokens: dict[str, Token] | None = None
    pad_to_multiple_of: int | None = Field(None, ge=1)


class MergeFile(_Section):
    """A whole merge file."""

    merge_method: str
    models: tuple[Model, ...] | None = None
    slices: tuple[Slice, ...] | None = None
    modules: dict[str, Module] | None = None
    base_model: Reference | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: Annotated[
        Literal["base", "union"] | ModelReference | None, BeforeValidator(_tokenizer_source)
    ] = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    parameters: Parameters | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if sum(bool(form) for form in (self.models, self.slices, self.modules)) != 1:
            raise ValueError("expected exactly one of 'models', 'slices' and 'modules', with something in it")
        if self.tokenizer_source is not None and self.tokenizer is not None:
            raise ValueError("give either 'tokenizer_source' or 'tokenizer', which replaces it")
        return self


def is_merge_file(data: Mapping[str, Any]) -> bool:
    """Whether a YAML document is a merge file of mergekit rather than a recipe or something else."""
    recipe = "rules" in data or "meiosis" in data
    return not recipe and (any(key in data for key in SIGNS) or isinstance(data.get("models"), list))


def parse_merge_file(source: YamlSource) -> MergeFile:
    """The file, checked for its form; parameters are checked later.

    Raises:
        ConfigError: every fault, with its line.
    """
    try:
        return MergeFile.model_validate(source.data)
    except ValidationError as error:
        raise ConfigError("\n".join(source.faults(error, MergeFile))) from error
