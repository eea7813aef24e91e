"""How the tensors of the families that can grow hang together: the axes of each and what lies along them.

An axis is written `+x` where it is the output of the layer (rows to copy), `-x` where it is the input (columns
to divide among the copies), and empty where it never grows. x is `hidden`, `mlp`, `q` (query heads), `kv` (key and
value heads) or `qkv` (GPT-2's fused three).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from search.checkpoints.reading import Checkpoint
from search.errors import CheckpointError
from search.recycling.mapping import class_of

Axes = tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """One architecture family.

    Attributes:
        classes: names in `architectures`.
        layer: regular expression of a layer's tensor, with the groups `start`, `number` and `inside`.
        inside: name inside a layer -> axes.
        outside: end of the name of any other tensor -> axes.
        last_norm: names in `outside` of the norm whose output the output matrix reads, where that is tied.
        residual_outputs: names inside a layer of what is added to the residual stream.
        pre_norm: whether a layer without these outputs does nothing.
        output: name of an output matrix of its own.
        config: what the config calls layers, hidden, mlp, heads and key-value heads.
        tied: whether input and output are tied where the config does not say.
        ignored: start of the name inside or outside a layer -> why a tensor is dropped.
    """

    classes: tuple[str, ...]
    layer: str
    inside: Mapping[str, Axes]
    outside: Mapping[str, Axes]
    last_norm: tuple[str, ...]
    residual_outputs: tuple[str, ...]
    pre_norm: bool
    output: str
    config: Mapping[str, str]
    tied: bool
    ignored: Mapping[str, str]


def _linear(name: str, inputs: str, outputs: str) -> dict[str, Axes]:
    return {f"{name}.weight": (f"+{outputs}", f"-{inputs}"), f"{name}.bias": (f"+{outputs}",)}


def _conv1d(name: str, inputs: str, outputs: str) -> dict[str, Axes]:
    """GPT-2's linear layer, which stores input x output."""
    return {f"{name}.weight": (f"-{inputs}", f"+{outputs}"), f"{name}.bias": (f"+{outputs}",)}


def _norm(name: str) -> dict[str, Axes]:
    return {f"{name}.weight": ("+hidden",), f"{name}.bias": ("+hidden",)}


_BUFFER = "a buffer that the architecture computes itself"

GPT2 = Family(
    classes=("GPT2LMHeadModel",),
    layer=r"(?P<start>(?:transformer\.)?h\.)(?P<number>\d+)\.(?P<inside>.+)",
    inside={
        **_norm("ln_1"),
        **_conv1d("attn.c_attn", "hidden", "qkv"),
        **_conv1d("attn.c_proj", "q", "hidden"),
        **_norm("ln_2"),
        **_conv1d("mlp.c_fc", "hidden", "mlp"),
        **_conv1d("mlp.c_proj", "mlp", "hidden"),
    },
    outside={
        "wte.weight": ("", "+hidden"),
        "wpe.weight": ("", "+hidden"),
        **_norm("ln_f"),
        "lm_head.weight": ("", "-hidden"),
    },
    last_norm=("ln_f.weight", "ln_f.bias"),
    residual_outputs=("attn.c_proj.weight", "attn.c_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"),
    pre_norm=True,
    output="lm_head.weight",
    config={"layers": "n_layer", "hidden": "n_embd", "mlp": "n_inner", "heads": "n_head"},
    tied=True,
    ignored={"attn.bias": _BUFFER, "attn.masked_bias": _BUFFER},
)

LLAMA = Family(
    classes=("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
    layer=r"(?P<start>model\.layers\.)(?P<number>\d+)\.(?P<inside>.+)",
    inside={
        "input_layernorm.weight": ("+hidden",),
        **_linear("self_attn.q_proj", "hidden", "q"),
        **_linear("self_attn.k_proj", "hidden", "kv"),
        **_linear("self_attn.v_proj", "hidden", "kv"),
        **_linear("self_attn.o_proj", "q", "hidden"),
        "self_attn.q_norm.weight": ("",),
        "self_attn.k_norm.weight": ("",),
        "post_attention_layernorm.weight": ("+hidden",),
        **_linear("mlp.gate_proj", "hidden", "mlp"),
        **_linear("mlp.up_proj", "hidden", "mlp"),
        **_linear("mlp.down_proj", "mlp", "hidden"),
    },
    outside={
        "embed_tokens.weight": ("", "+hidden"),
        "model.norm.weight": ("+hidden",),
        "lm_head.weight": ("", "-hidden"),
    },
    last_norm=("model.norm.weight",),
    residual_outputs=(
        "self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.down_proj.weight", "mlp.down_proj.bias",
    ),
    pre_norm=True,
    output="lm_head.weight",
    config={
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "mlp": "intermediate_size",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
    },
    tied=False,
    ignored={"self_attn.rotary_emb.inv_freq": _BUFFER},
)  # fmt: skip

BERT = Family(
    classes=("BertForMaskedLM", "BertModel", "BertForPreTraining", "BertLMHeadModel"),
    layer=r"(?P<start>(?:bert\.)?encoder\.layer\.)(?P<number>\d+)\.(?P<inside>.+)",
    inside={
        **_linear("attention.self.query", "hidden", "q"),
        **_linear("attention.self.key", "hidden", "q"),
        **_linear("attention.self.value", "hidden", "q"),
        **_linear("attention.output.dense", "q", "hidden"),
        **_norm("attention.output.LayerNorm"),
        **_linear("intermediate.dense", "hidden", "mlp"),
        **_linear("output.dense", "mlp", "hidden"),
        **_norm("output.LayerNorm"),
    },
    outside={
        "embeddings.word_embeddings.weight": ("", "+hidden"),
        "embeddings.position_embeddings.weight": ("", "+hidden"),
        "embeddings.token_type_embeddings.weight": ("", "+hidden"),
        **_norm("embeddings.LayerNorm"),
        **_linear("pooler.dense", "hidden", "hidden"),
        "cls.seq_relationship.weight": ("", "-hidden"),
        "cls.seq_relationship.bias": ("",),
        **_linear("cls.predictions.transform.dense", "hidden", "hidden"),
        **_norm("cls.predictions.transform.LayerNorm"),
        "cls.predictions.bias": ("",),
        "cls.predictions.decoder.weight": ("", "-hidden"),
        "cls.predictions.decoder.bias": ("",),
    },
    last_norm=("cls.predictions.transform.LayerNorm.weight", "cls.predictions.transform.LayerNorm.bias"),
    residual_outputs=(),
    pre_norm=False,
    output="cls.predictions.decoder.weight",
    config={
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "mlp": "intermediate_size",
        "heads": "num_attention_heads",
    },
    tied=True,
    ignored={"embeddings.position_ids": _BUFFER},
)

FAMILIES = (GPT2, LLAMA, BERT)


@dataclass(frozen=True)
class Place:
    """Where a tensor stands: in layer `layer` (None: outside) under the name `inside`, after `start`."""

    name: str
    start: str
    layer: int | None
    inside: str
    axes: Axes


@dataclass(frozen=True)
class Sizes:
    """Numbers of a model; `head` is the width of one head."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head: int


def find_family(checkpoint: Checkpoint) -> Family:
    """The family of a checkpoint.

    Raises:
        CheckpointError: none that can grow.
    """
    found = next((family for family in FAMILIES if checkpoint.architecture in family.classes), None)
    if found is None:
        known = ", ".join(name for family in FAMILIES for name in family.classes)
        raise CheckpointError(f"{checkpoint.folder}: is a {class_of(checkpoint)}, expected one that can grow: {known}")
    return found


def sizes_of(checkpoint: Checkpoint, family: Family) -> Sizes:
    """The sizes in the config.

    Raises:
        CheckpointError: one is missing, or no whole number.
    """
    config, names = checkpoint.config, family.config

    def number(what: str, default: int | None = None) -> int:
        value = config.get(names.get(what, ""), default)
        value = default if value is None else value
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(
                f"{checkpoint.folder}: config.json has {names[what]} {value!r}, expected a whole number of at least 1"
            )
        return value

    hidden, heads = number("hidden"), number("heads")
    head = config.get("head_dim")
    if not isinstance(head, int):
        head = hidden // heads
    mlp = number("mlp", 4 * hidden)
    return Sizes(number("layers"), hidden, mlp, heads, number("kv_heads", heads), head)


def places(checkpoint: Checkpoint, family: Family) -> tuple[list[Place], dict[str, str]]:
    """Every tensor with its axes, and those that are dropped with the reason.

    Raises:
        CheckpointError: a tensor that the family does not have.
    """
    found: list[Place] = []
    dropped: dict[str, str] = {}
    for name in checkpoint.tensors:
        match = re.fullmatch(family.layer, name)
        inside = match["inside"] if match else name
        inside = inside.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        reason = next((why for what, why in family.ignored.items() if inside.endswith(what)), None)
        known = family.inside if match else family.outside
        key = next((key for key in known if inside == key or (not match and inside.endswith("." + key))), None)
        # `attn.bias` is a buffer; `attn.c_attn.bias`, which also ends so, is not: exact names come first.
        if key is not None:
            found.append(
                Place(name, match["start"] if match else name, int(match["number"]) if match else None, key, known[key])
            )
        elif reason is not None:
            dropped[name] = reason
        else:
            raise CheckpointError(
                f"{checkpoint.folder}: tensor '{name}' is none that a {checkpoint.architecture} is known to have, "
                "so it cannot be grown; remove it, or grow a plain model"
            )
    return found, dropped
