"""The config of a search: one YAML file, strictly read.

Each section is a pydantic model with a sentence under every key. Unknown keys, wrong types and
impossible pairs are errors with the line and the nearest valid name, all of them at once.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from search.certificate import CertifyConfig
from search.cluster_config import ClusterConfig
from search.errors import ConfigError
from search.limits import LimitsConfig
from search.paths.config import PathConfig
from search.racing.config import FitnessConfig
from search.run_log import emit
from search.yaml_source import YamlSource

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Models(_Section):
    """The models that take part."""

    base: str = Field(description="checkpoint folder or hub id of the model the sources were fine-tuned from")
    sources: dict[Name, str] = Field(
        min_length=1, description="name -> checkpoint folder or hub id of a fine-tune, or of a LoRA adapter of the base"
    )
    statistics: dict[Name, str] = Field(
        default_factory=dict,
        description="name of a source -> file that `meiosis statistics` wrote of it, for operators that need one",
    )

    @field_validator("sources")
    @classmethod
    def _no_source_is_called_base(cls, sources: dict[str, str]) -> dict[str, str]:
        if "base" in sources:
            raise ValueError("'base' names the base model; call this source something else")
        return sources


class GeneRange(_Section):
    """A parameter that is searched."""

    low: float = Field(allow_inf_nan=False, description="lower bound, inclusive")
    high: float = Field(allow_inf_nan=False, description="upper bound, inclusive")
    initial: float | None = Field(
        None, allow_inf_nan=False, description="where the search starts; by default the middle"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low must be below high, found low {self.low:g} and high {self.high:g}")
        if self.initial is not None and not self.low <= self.initial <= self.high:
            raise ValueError(f"initial {self.initial:g} lies outside of [{self.low:g}, {self.high:g}]")
        return self


def _kind_of_setting(value: Any) -> str:
    if isinstance(value, dict | GeneRange):
        return "range"
    if isinstance(value, bool):
        return "bool"
    return "int" if isinstance(value, int) else "float"


Setting = Annotated[
    Annotated[GeneRange, Tag("range")]
    | Annotated[bool, Tag("bool")]
    | Annotated[int, Tag("int")]
    | Annotated[float, Tag("float"), Field(allow_inf_nan=False)],
    Discriminator(_kind_of_setting),
]
"""A parameter: bounds or a value. What it looks like decides, so that a fault in bounds is told once and
not as well as being no number, no truth value and so on."""

SplitKind = Literal["attention", "mlp", "norm", "embedding", "head"]


def _operator_names(value: Any) -> Any:
    """One name, or several that differ; checked here so that a fault is told once, not for each alternative."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple) or not value or not all(isinstance(name, str) for name in value):
        raise ValueError(f"expected the name of an operator or a list of names, found {value!r}")
    if repeated := next((name for name in value if value.count(name) > 1), None):
        raise ValueError(f"'{repeated}' stands twice")
    return value[0] if len(value) == 1 else value


class SpaceConfig(_Section):
    """What is searched: an operator, and how finely its parameters vary over the model."""

    operator: Annotated[str | tuple[str, ...], BeforeValidator(_operator_names)] = Field(
        "task_arithmetic",
        description="a name from `meiosis operators`, or a list of them, of which every group of tensors chooses one",
    )
    subset: Literal[False, True, "group"] = Field(
        False,
        description="whether it is searched which sources take part. true: for the whole model; group: for every group "
        "of tensors; a group without sources is as in the base",
    )
    layers_per_group: int = Field(1, ge=0, description="layers that share genes; 0: all layers share them")
    split: tuple[SplitKind, ...] = Field(
        ("attention", "mlp", "norm"),
        description="parts of a layer, and of the rest, that get genes of their own",
    )
    patterns: dict[Name, str] = Field(
        default_factory=dict,
        description="group name -> regular expression on tensor names; tensors that match form this group instead",
    )
    parameters: dict[str, Setting] = Field(
        default_factory=dict,
        description="parameter of the operator -> bounds (searched) or a value (fixed); by default those the "
        "operator recommends to search are searched; of several operators each takes those that it has",
    )
    path: PathConfig | None = Field(
        None, description="which layers run, in which order; by default those of the base, in theirs"
    )

    @property
    def operators(self) -> tuple[str, ...]:
        """The operators to choose from, at least one."""
        return (self.operator,) if isinstance(self.operator, str) else self.operator

    @field_validator("patterns")
    @classmethod
    def _compiles(cls, patterns: dict[str, str]) -> dict[str, str]:
        for name, pattern in patterns.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"'{name}' is not a regular expression: {error}") from error
        return patterns


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class OptimizerConfig(_Section):
    """Which optimiser proposes candidates. Keys beside these are its options."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = Field(
        "auto",
        description="auto: chosen by size and kind of the genome; gaussian_process, diagonal_cma, full_cma, "
        "natural_niches, map_elites, nsga2, random_search, or a name of nevergrad's registry",
    )
    step: float = Field(
        0.1, gt=0, le=1, description="first step of diagonal_cma and full_cma, as a fraction of a gene's range"
    )

    @property
    def options(self) -> dict[str, Any]:
        """What its own section of the optimiser checks."""
        return dict(self.model_extra or {})


class _NamedWithOptions(_Section):
    """An entry of a list of plug-ins: its name, or `{name: options}`."""

    noun: ClassVar[str]

    name: str
    options: dict[str, Any] = Field(default_factory=dict, description="checked by the plug-in")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, cls) or (isinstance(value, dict) and "name" in value):
            return value
        if not isinstance(value, dict) or len(value) != 1:
            raise ValueError(f"expected the name of a {cls.noun}, or one {{name: options}}, found {value!r}")
        ((name, options),) = value.items()
        if not isinstance(options, dict | None):
            raise ValueError(f"'{name}' needs a mapping of options, found {options!r}")
        return {"name": name, "options": options or {}}

    @model_serializer
    def _as_written(self) -> str | dict[str, Any]:
        return {self.name: self.options} if self.options else self.name


class BaselineConfig(_NamedWithOptions):
    """A baseline: its name, or `{name: options}`."""

    noun = "baseline"
    name: str = Field(description="a standard merge")


class TrackerConfig(_NamedWithOptions):
    """A tracker: its name, or `{name: options}`."""

    noun = "tracker"
    name: str = Field(description="tensorboard, mlflow, wandb, or a plug-in")


def _baselines(*names: str) -> tuple[BaselineConfig, ...]:
    return tuple(BaselineConfig(name=name) for name in names)


class SearchConfig(_Section):
    """How the population is run."""

    optimizer: Annotated[OptimizerConfig, BeforeValidator(_named)] = OptimizerConfig()
    budget: int = Field(200, ge=1, description="candidates to evaluate, generation 0 included")
    limits: LimitsConfig = LimitsConfig()
    fitness: FitnessConfig = FitnessConfig()
    baselines: tuple[BaselineConfig, ...] = Field(
        _baselines("uniform_soup", "greedy_soup", "task_arithmetic", "slerp", "ties"),
        description="standard merges in generation 0, by name or as {name: options}; the parents always are in it",
    )
    baselines_only: bool = Field(
        False, description="end with generation 0, whatever the budget (see: meiosis baselines)"
    )
    order: Literal["ordered", "arrival"] = Field(
        "ordered",
        description="ordered: the same history on any number of workers; arrival: results as they come",
    )
    window: int | None = Field(
        None,
        ge=1,
        description="candidates in flight; by default twice the workers at the start, which keeps up to 16 of them "
        "busy; more workers, or times that vary much, want 3 or 4 times as many, or `order: arrival`",
    )
    finalists: int = Field(5, ge=1, description="best candidates that are scored again on the select items")


class ObjectiveTerm(_Section):
    """One metric that the search improves."""

    metric: str = Field(pattern=r"^[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+$", description="<evaluator>.<metric>")
    weight: float = Field(1.0, gt=0, allow_inf_nan=False, description="how much it counts")


def _as_term(value: Any) -> Any:
    return {"metric": value} if isinstance(value, str) else value


class ObjectivesConfig(_Section):
    """What is better: a weighted mean of metrics, or more in any of them (a front)."""

    terms: tuple[Annotated[ObjectiveTerm, BeforeValidator(_as_term)], ...] = Field(min_length=1)
    normalize: Literal["parents", "none"] = Field(
        "parents",
        description="parents: each metric is scaled to best parent = 0, worst parent = 1; none: as it is",
    )
    search: Literal["weighted", "pareto"] = Field(
        "weighted",
        description="weighted: the best weighted mean; pareto: all merges that no other one beats in every metric",
    )
    pick: str = Field(
        "knee",
        description="with `search: pareto`, which point of the front is certified and exported: knee, or bounds and a "
        "goal such as 'accuracy >= 0.9, min asr'",
    )

    @model_validator(mode="after")
    def _front_needs_terms(self) -> Self:
        if self.search == "pareto" and len(self.terms) < 2:
            raise ValueError("search: pareto needs two terms or more; add one, or use search: weighted")
        if self.search == "weighted" and "pick" in self.model_fields_set and self.pick != "knee":
            raise ValueError("pick chooses from a front; add search: pareto, or take pick out")
        return self


_CONSTRAINT = re.compile(r"^\s*([A-Za-z0-9_-]+\.[A-Za-z0-9_-]+)\s*(<=|>=)\s*([-+0-9.eE]+)\s*$")


class Constraint(_Section):
    """A bound that a candidate must keep to be feasible."""

    metric: str
    relation: Literal["<=", ">="]
    bound: float = Field(allow_inf_nan=False)

    def __str__(self) -> str:
        return f"{self.metric} {self.relation} {self.bound:g}"


def _as_constraint(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    match = _CONSTRAINT.match(value)
    if not match:
        raise ValueError(f"{value!r} is not a constraint; write it as 'evaluator.metric <= number'")
    return {"metric": match[1], "relation": match[2], "bound": match[3]}


class EvaluatorConfig(BaseModel):
    """One evaluator: `use` names it, the other keys are its options."""

    model_config = ConfigDict(extra="allow", frozen=True)

    use: str = Field(description="a name from `meiosis evaluators`, or module:Class")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Config(_Section):
    """A whole search."""

    name: Name = Field("search", description="first part of the names of its runs")
    seed: int = Field(0, ge=0, lt=2**32, description="everything random derives from it")
    models: Models
    space: SpaceConfig = SpaceConfig()
    evaluators: dict[Name, EvaluatorConfig] = Field(min_length=1, description="name -> evaluator")
    objectives: ObjectivesConfig
    constraints: tuple[Annotated[Constraint, BeforeValidator(_as_constraint)], ...] = ()
    search: SearchConfig = SearchConfig()
    certify: CertifyConfig = CertifyConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: tuple[TrackerConfig, ...] = Field(
        (), description="where results are shown as well, by name or as {name: options}; never stops a run"
    )
    results: str = Field(
        "results",
        description="folder of the runs; or a URL (s3://, gs://, hdfs://, file://, or what fsspec knows): runs then "
        "work in a folder of this machine and are copied there every few seconds",
    )

    @model_validator(mode="before")
    @classmethod
    def _objectives_may_be_a_list(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("objectives"), list):
            return {**data, "objectives": {"terms": data["objectives"]}}
        return data


class LoadedConfig:
    """A config and the file it came from, so that later faults can still name the line.

    Attributes:
        config: the validated config.
        source: the YAML it was read from.
        folder: relative paths in the config start here.
    """

    def __init__(self, config: Config, source: YamlSource, folder: Path) -> None:
        self.config, self.source, self.folder = config, source, folder

    def path(self, text: str) -> str:
        """A model path or hub id with a relative folder made absolute; hub ids stay as they are."""
        candidate = (self.folder / Path(text).expanduser()).resolve()
        looks_local = text.startswith((".", "/", "~")) or candidate.exists()
        return str(candidate) if looks_local else text


def load_config(path: Path, overrides: tuple[str, ...] = ()) -> LoadedConfig:
    """Read a config file.

    Args:
        path: the YAML file.
        overrides: `key.path=value` strings that replace what the file says; the value is YAML.

    Raises:
        ConfigError: every fault that was found, one per line.
    """
    import yaml

    source = YamlSource.read(path)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {override}: expected key.path=value")
        try:
            source.override(key, yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override}: the value is not valid YAML") from error
    loaded = parse_config(source, path.resolve().parent)
    emit("config_read")
    return loaded


def parse_config(source: YamlSource, folder: Path) -> LoadedConfig:
    """Validate a parsed document; see `load_config`."""
    try:
        return LoadedConfig(Config.model_validate(source.data), source, folder)
    except ValidationError as error:
        raise ConfigError("\n".join(source.faults(error, Config))) from error
