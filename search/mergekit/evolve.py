"""Search files of mergekit-evolve as configs of `meiosis search`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from search.errors import ConfigError
from search.mergekit.merge_file import ModelReference, Reference
from search.yaml_source import YamlSource


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Genome(_Section):
    """The `genome` section."""

    models: tuple[Reference, ...] = Field(min_length=1)
    merge_method: Literal["linear", "task_arithmetic", "ties", "dare_ties", "slerp"]
    base_model: Reference | None = None
    tokenizer_source: str | None = None
    layer_granularity: int = 0
    normalize: bool | None = None
    allow_negative_weights: bool = False
    filters: tuple[str, ...] | None = None
    smooth: bool = False


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class Task(_Section):
    """One entry of `tasks`, of lm-evaluation-harness."""

    name: str
    weight: float = 1.0
    metric: str = "acc,none"


class EvolveFile(_Section):
    """A whole search file."""

    genome: Genome
    tasks: tuple[Annotated[Task, BeforeValidator(_named)], ...] = Field(min_length=1)
    limit: int | None = None
    num_fewshot: int | None = None
    shuffle: bool = False
    random_init: bool = False
    apply_chat_template: bool = True
    fewshot_as_multiturn: bool = True


@dataclass(frozen=True)
class Converted:
    """A search config that still lacks what scores candidates.

    Attributes:
        text: the config as YAML, with a comment where something must be filled in.
        notes: what could not be carried over, and what is done otherwise, one line each.
    """

    text: str
    notes: tuple[str, ...]


def read_evolve_file(source: YamlSource, folder: Path = Path()) -> Converted:
    """The config for a search file of mergekit-evolve.

    Args:
        folder: of the file. Relative paths start where the command runs, or else there.

    Raises:
        ConfigError: every fault of the file, with its line.
    """
    try:
        file = EvolveFile.model_validate(source.data)
    except ValidationError as error:
        raise ConfigError("\n".join(source.faults(error, EvolveFile))) from error
    _check(file, source)
    notes: list[str] = []

    def note(key: str, message: str) -> None:
        notes.append(source.fault(tuple(int(k) if k.isdigit() else k for k in key.split(".")), message))

    data = {
        "name": "evolve",
        "models": _models(file.genome, folder, note),
        "space": _space(file.genome, note),
        "search": {"optimizer": "diagonal_cma", "budget": 100},
        "cluster": {"dtype": "bfloat16"},
    }
    for task in file.tasks:
        if task.weight < 0:
            notes.append(
                f"{source.name}: task '{task.name}' counts negatively: choose a metric whose direction says so"
            )
    _note_evaluation(file, note)
    text = yaml.safe_dump(data, sort_keys=False, width=100) + _placeholder(file)
    return Converted(text, tuple(notes))


def _check(file: EvolveFile, source: YamlSource) -> None:
    genome, faults = file.genome, []
    if genome.merge_method in ("task_arithmetic", "ties", "dare_ties") and genome.base_model is None:
        faults.append(source.fault(("genome",), f"'{genome.merge_method}' needs a base_model"))
    if genome.merge_method == "slerp" and len(genome.models) < 2:
        faults.append(source.fault(("genome", "models"), f"slerp needs two models, found {len(genome.models)}"))
    if genome.merge_method == "slerp" and (genome.smooth or genome.filters):
        key = "smooth" if genome.smooth else "filters"
        faults.append(source.fault(("genome", key), "mergekit-evolve refuses this for slerp"))
    if genome.layer_granularity < 0:
        faults.append(source.fault(("genome", "layer_granularity"), "must be 0 or the number of layers in a block"))
    if len(set(genome.models)) < len(genome.models):
        faults.append(source.fault(("genome", "models"), "names a model twice"))
    if faults:
        raise ConfigError("\n".join(faults))


def _models(genome: Genome, folder: Path, note: Any) -> dict[str, Any]:
    from search.mergekit.models import short_names

    base, sources = genome.base_model, [model for model in genome.models if model != genome.base_model]
    if base is None:
        base = genome.models[0]
        note(
            "genome",
            f"names no base_model; a search has one, so {base} is the base: it gives config and tokenizer, and "
            f"{genome.merge_method} takes it as one more model only where it stands among the sources",
        )
        sources = list(genome.models)
    elif len(sources) < len(genome.models):
        note("genome.models", "has the base_model in it, whose genes have no effect on task vectors; it is left out")
    if genome.merge_method == "slerp" and len(sources) > 2:
        note(
            "genome.models",
            "slerp takes two models at a time; mergekit-evolve lets genes choose the two, a search here cannot: leave "
            "two sources, or search multislerp",
        )
    names = short_names([base, *(model for model in sources if model != base)], base)
    names = {model: "".join(c if c.isalnum() or c in "-_" else "-" for c in name) for model, name in names.items()}

    def called(model: ModelReference) -> str:
        return names[model] if names[model] != "base" else "first"

    for model in (base, *sources):
        if (model.lora or model.model).revision is not None:
            note("genome.models", f"{model}: a config names no revisions; download this one and give its folder")
        if model.lora is not None:
            note("genome.models", f"{model}: a search takes adapters by their own folder; the base is then {base}")
    return {
        "base": _place(base, folder),
        "sources": {called(model): _place(model, folder) for model in sources},
    }


def _place(model: ModelReference, folder: Path) -> str:
    from search.mergekit.models import find_place

    return find_place(model.lora or model.model, folder)


def _space(genome: Genome, note: Any) -> dict[str, Any]:
    method = genome.merge_method
    low = -1.0 if genome.allow_negative_weights else 0.0
    start = round(1 / len(genome.models), 6)
    if method != "slerp":
        note(
            "genome.merge_method",
            f"mergekit-evolve sets no bounds on weights; here they are searched from {low:g} to 1 (space.parameters)",
        )
    parameters: dict[str, Any] = {}
    if method == "slerp":
        parameters["t"] = {"low": 0.0, "high": 0.5, "initial": 0.25}
    else:
        parameters["weight"] = {"low": low, "high": 1.0, "initial": start}
    if method in ("ties", "dare_ties"):
        parameters["density"] = {"low": 0.0, "high": 1.0, "initial": 0.9}
        note("genome.merge_method", "starts with density 1, on its bound; the search starts at 0.9")
    if method != "slerp":
        chosen = genome.normalize
        parameters["normalize"] = method in ("ties", "dare_ties", "linear") if chosen is None else chosen
    space: dict[str, Any] = {
        "operator": method,
        "layers_per_group": genome.layer_granularity,
        "split": [],
        "parameters": parameters,
    }
    if genome.filters:
        patterns = {}
        for text in genome.filters:
            name = "".join(c if c.isalnum() else "_" for c in text).strip("_") or "filter"
            while name in patterns:
                name += "_"
            patterns[name] = _escaped(text)
        space["patterns"] = patterns
        if genome.layer_granularity:
            note(
                "genome.filters",
                "tensors that match a pattern share genes over all layers here; mergekit-evolve gives them genes of "
                "their own in every block. Use space.split where the filters are attention and mlp",
            )
    if genome.layer_granularity:
        note(
            "genome.layer_granularity",
            "mergekit-evolve gives the embedding the genes of the first block, norm and head those of the last; here "
            "what is outside of the layers has genes of its own",
        )
    if genome.smooth:
        note("genome.smooth", "values interpolated over layers are not searched here; every block has its own")
    if genome.tokenizer_source is not None:
        note("genome.tokenizer_source", "a search wants models with one tokenizer; it keeps that of the base")
    return space


def _escaped(text: str) -> str:
    return "".join(f"\\{c}" if c in r".^$*+?{}[]\|()" else c for c in text)


def _note_evaluation(file: EvolveFile, note: Any) -> None:
    if file.random_init:
        note("random_init", "the search starts at the initial values of the genes; random_search starts anywhere")
    if file.shuffle:
        note("shuffle", "has no counterpart: every candidate is scored on the same items")


def _placeholder(file: EvolveFile) -> str:
    """Comments where the fitness must be filled in."""
    asked = {key: getattr(file, key) for key in ("limit", "num_fewshot", "apply_chat_template", "fewshot_as_multiturn")}
    lines = [
        "",
        "# TO BE FILLED IN: what scores a candidate. The tasks were those of lm-evaluation-harness:",
        *(f"#   {task.name}, metric {task.metric}, weight {task.weight:g}" for task in file.tasks),
        f"# with {', '.join(f'{key} {value}' for key, value in asked.items() if value is not None)}.",
        "# They are no evaluators here (`meiosis evaluators` lists what is). An example over a file of items:",
        "# evaluators:",
        *(line for task in file.tasks for line in _example(task)),
        "# objectives:",
        *(f"#   - {{metric: {_plain(task.name)}.accuracy, weight: {abs(task.weight):g}}}" for task in file.tasks),
    ]
    return "\n".join(lines) + "\n"


def _example(task: Task) -> tuple[str, ...]:
    return (
        f"#   {_plain(task.name)}:",
        "#     use: multiple_choice",
        "#     data: {search: search.jsonl, select: select.jsonl, certify: certify.jsonl}",
    )


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)


def is_evolve_file(data: Mapping[str, Any]) -> bool:
    """Whether a YAML document is a search file of mergekit-evolve."""
    return "genome" in data
