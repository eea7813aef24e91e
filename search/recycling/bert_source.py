"""Reads a BERT checkpoint of any of its classes under one set of names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from search.checkpoints.reading import Checkpoint
from search.errors import CheckpointError
from search.recycling.mapping import class_of, refuse_quantised

ARCHITECTURES = ("BertForMaskedLM", "BertModel", "BertForPreTraining", "BertLMHeadModel")

HEAD = {
    "cls.predictions.transform.dense.weight": "hh",
    "cls.predictions.transform.dense.bias": "h",
    "cls.predictions.transform.LayerNorm.weight": "h",
    "cls.predictions.transform.LayerNorm.bias": "h",
    "cls.predictions.bias": "v",
}
"""The MLM head besides the tied decoder: name -> axes (h hidden, m mlp, v vocabulary, p positions, t types)."""

_EMBEDDINGS = {
    "embeddings.word_embeddings.weight": "vh",
    "embeddings.position_embeddings.weight": "ph",
    "embeddings.token_type_embeddings.weight": "th",
    "embeddings.LayerNorm.weight": "h",
    "embeddings.LayerNorm.bias": "h",
}
LAYER = {
    "attention.self.query.weight": "hh",
    "attention.self.query.bias": "h",
    "attention.self.key.weight": "hh",
    "attention.self.key.bias": "h",
    "attention.self.value.weight": "hh",
    "attention.self.value.bias": "h",
    "attention.output.dense.weight": "hh",
    "attention.output.dense.bias": "h",
    "attention.output.LayerNorm.weight": "h",
    "attention.output.LayerNorm.bias": "h",
    "intermediate.dense.weight": "mh",
    "intermediate.dense.bias": "m",
    "output.dense.weight": "hm",
    "output.dense.bias": "h",
    "output.LayerNorm.weight": "h",
    "output.LayerNorm.bias": "h",
}

REASONS = {
    "pooler.": "the pooler serves sentence classification; a language model has none",
    "cls.seq_relationship.": "the head of next sentence prediction; a language model has none",
    "cls.predictions.decoder.": "tied: the same numbers as the word embeddings and the output bias",
    "embeddings.position_ids": "a buffer with the numbers 0, 1, 2, ...",
}


@dataclass(frozen=True)
class BertSource:
    """A BERT encoder that was checked: every tensor there, with the shape that its config announces.

    Attributes:
        checkpoint: as opened.
        names: name as in `BertModel` (heads: as in `BertForMaskedLM`) -> name in the file.
        vocabulary, positions, types, hidden, mlp, layers, heads: sizes.
        has_head: whether the MLM head is there.
    """

    checkpoint: Checkpoint
    names: dict[str, str]
    vocabulary: int
    positions: int
    types: int
    hidden: int
    mlp: int
    layers: int
    heads: int
    has_head: bool

    @property
    def config(self) -> dict[str, Any]:
        """The config of the checkpoint."""
        return dict(self.checkpoint.config)

    @property
    def initial_std(self) -> float:
        """Standard deviation with which weights of this model are initialised."""
        return float(self.checkpoint.config.get("initializer_range", 0.02))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor by its common name."""
        return self.checkpoint.tensors[self.names[name]].shape

    def leftovers(self, used: set[str]) -> dict[str, str]:
        """Name in the file -> why it is dropped, for the tensors that are not in `used` (names in the file)."""
        reasons = dict(REASONS)
        if not self.config.get("tie_word_embeddings", True):
            reasons["cls.predictions.decoder.weight"] = "an output of its own; the result's is tied to its input"
        unknown = "not part of a BERT encoder or its MLM head"
        return {
            found: next((why for start, why in reversed(reasons.items()) if name.startswith(start)), unknown)
            for name, found in self.names.items()
            if found not in used
        }


def read_bert(checkpoint: Checkpoint) -> BertSource:
    """Check a BERT checkpoint and name its tensors.

    Raises:
        CheckpointError: another architecture, quantised, relative positions, a tensor missing or misshaped.
    """
    folder, config = checkpoint.folder, checkpoint.config
    if checkpoint.architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{folder}: is a {class_of(checkpoint)}, "
            f"expected a BERT ({', '.join(ARCHITECTURES)}); to grow a model give --layers or --hidden"
        )
    refuse_quantised(checkpoint)
    kind = config.get("position_embedding_type", "absolute")
    if kind != "absolute":
        raise CheckpointError(f"{folder}: has {kind} positions, expected absolute ones; no target has such positions")
    sizes = {}
    for key, axis in _SIZES.items():
        value = config.get(key, _DEFAULTS.get(key))
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{folder}: config.json has {key} {value!r}, expected a whole number of at least 1")
        sizes[axis] = value
    names = {_common(name): name for name in checkpoint.tensors}
    has_head = any(name.startswith("cls.predictions.transform.") for name in names)
    wanted = {**_EMBEDDINGS, **(HEAD if has_head else {})}
    wanted |= {f"encoder.layer.{i}.{name}": axes for i in range(sizes["l"]) for name, axes in LAYER.items()}
    for name, axes in wanted.items():
        expected = tuple(sizes[axis] for axis in axes)
        if name not in names:
            raise CheckpointError(
                f"{folder}: has no tensor '{name}', expected one of shape {list(expected)} as config.json announces; "
                "save the model again"
            )
        shape = checkpoint.tensors[names[name]].shape
        if shape != expected:
            raise CheckpointError(
                f"{folder}: tensor '{names[name]}' has shape {list(shape)}, config.json announces {list(expected)}"
            )
    return BertSource(
        checkpoint,
        names,
        vocabulary=sizes["v"],
        positions=sizes["p"],
        types=sizes["t"],
        hidden=sizes["h"],
        mlp=sizes["m"],
        layers=sizes["l"],
        heads=sizes["a"],
        has_head=has_head,
    )


_SIZES = {
    "vocab_size": "v",
    "hidden_size": "h",
    "num_hidden_layers": "l",
    "num_attention_heads": "a",
    "intermediate_size": "m",
    "max_position_embeddings": "p",
    "type_vocab_size": "t",
}
_DEFAULTS = {"type_vocab_size": 2}


def _common(name: str) -> str:
    """Without the prefix of classes with a head, and with the names that LayerNorm has today."""
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
