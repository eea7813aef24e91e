"""LoRA adapters (Hu 2021, https://arxiv.org/abs/2106.09685) as PEFT saves them, applied to their base on the fly.

Policy: a tensor that an adapter changes is computed in float32 when it is read, and not rounded to the
dtype of the base, so that a merge sees the adapter's every digit; all others are those of the base. What
peft would do to the forward pass in some other way than by weights is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from search.checkpoints.adapter_change import Change, is_turned, scale_of, trained_on
from search.checkpoints.header import quoted
from search.checkpoints.heads import EMBEDDING, HEAD
from search.checkpoints.view import Maker, Spec, View
from search.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from search.checkpoints.reading import Checkpoint
    from search.merge.sources import TensorSource

PREFIX = "base_model.model."
"""What peft puts before the names of the model it wraps."""

_PART = re.compile(
    r"^(?P<module>.*?)\.(?P<part>lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))(?:\.(?P<kind>weight|bias))?$"
)

REFUSED = {
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "layer_replication": "layers that the adapter repeats",
    "trainable_token_indices": "rows of the embedding that the adapter trains by number",
    "target_parameters": "parameters that are no layers of their own, such as fused experts",
    "alora_invocation_tokens": "an adapter that is switched on by tokens",
    "arrow_config": "a router between adapters",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
}
"""Keys of the config that change what the adapter does -> what to call it."""

_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "lora-ga")
"""Initialisations that also change the base, so that the adapter fits the original no more."""


def adapted(base: View, adapter: Checkpoint) -> View:
    """The base with an adapter in it: names of the base, and the modules that were trained in full.

    Args:
        base: the model that the adapter was trained on.
        adapter: its folder, opened.

    Raises:
        CheckpointError: not a LoRA adapter, something in it that is not merged into weights, or tensors that do not
            fit the base; one line.
    """
    _require_lora(adapter)
    low: dict[str, dict[str, str]] = {}
    full: dict[str, str] = {}
    for name in adapter.tensors:
        path = name.removeprefix(PREFIX)
        if match := _PART.match(path):
            part = match["part"] + (".bias" if match["kind"] == "bias" else "")
            low.setdefault(match["module"], {})[part] = name
        else:
            full[_clean(path)] = name
    specs = {name: Spec(info.dtype, info.shape) for name, info in adapter.tensors.items()}
    makers: dict[str, tuple[Spec, Maker]] = {}
    finder = _Names(base, adapter)
    opened: list[TensorSource] = []

    def files() -> TensorSource:
        from search.checkpoints.reading import CheckpointTensors

        if not opened:
            opened.append(CheckpointTensors(adapter))
        return opened[0]

    replaced: dict[str, str] = {}
    for path, theirs in full.items():
        target = finder.find(path, theirs, new=True)
        spec = _full_spec(base, adapter, target, specs[theirs])
        replaced[target] = theirs
        makers[target] = (spec, lambda source, theirs=theirs: files().get(theirs))  # type: ignore[misc]  # bound per loop
    for module, parts in low.items():
        for target, change in _changes(finder, adapter, module, parts):
            own = replaced.get(target)
            spec = makers[target][0] if own is not None else base.tensors[target]
            change.check(adapter, target, spec.shape, specs)
            makers[target] = (spec, _maker(target, own, change, files))
    config = dict(base.config)
    if any(target not in base.tensors for target in makers):  # a head of its own, though the base ties it
        config["tie_word_embeddings"] = False
    rows = {spec.shape[0] for target, (spec, _) in makers.items() if EMBEDDING.search(target)}
    if len(rows) == 1 and "vocab_size" in config:
        (config["vocab_size"],) = rows
    return replace(base.having(makers), checkpoint=adapter, config=config)


def _require_lora(adapter: Checkpoint) -> None:
    config = adapter.config
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{adapter.folder}: is an adapter of the type {quoted(kind)}, expected 'LORA'; merge it into its base "
            "first: PeftModel.merge_and_unload(), then save_pretrained"
        )
    for key, what in REFUSED.items():
        if config.get(key):
            raise CheckpointError(
                f"{adapter.folder}: has {key} in adapter_config.json ({what}), which is not applied on the fly; "
                "merge it into its base first: PeftModel.merge_and_unload(), then save_pretrained"
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_OTHER_BASE):
        raise CheckpointError(
            f"{adapter.folder}: was initialised with {quoted(start)}, which also changed its base; save it with "
            "path_initial_model_for_weight_conversion, or merge it with peft first"
        )


def _clean(path: str) -> str:
    """The name in the bare model of a tensor that peft saved in full."""
    path = re.sub(r"\.modules_to_save(\.[^.]+)?(?=\.)", "", path)
    return path.replace(".original_module.", ".").replace(".base_layer.", ".")


class _Names:
    """Finds the tensors of the base that an adapter means; the two may differ in a leading part of the name."""

    def __init__(self, base: View, adapter: Checkpoint) -> None:
        self._base, self._adapter = base, adapter

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.tensors[name].shape

    def find(self, name: str, theirs: str, *, new: bool = False) -> str:
        """A tensor of the base.

        Args:
            theirs: the tensor of the adapter, for the message.
            new: whether an output head that the base lacks, because it is tied, is one that the model now has.

        Raises:
            CheckpointError: there is none.
        """
        if name in self._base.tensors:
            return name
        endings = [name.split(".", count)[count] for count in range(1, min(3, name.count(".") + 1))]
        for ending in endings:
            if ending in self._base.tensors:
                return ending
        longer = [ours for ours in self._base.tensors if ours.endswith("." + name)]
        if len(longer) == 1:
            return longer[0]
        if new and HEAD.search(name):
            return name
        raise CheckpointError(
            f"{self._adapter.folder}: tensor {quoted(theirs)} belongs to {quoted(name)}, which the base "
            f"({self._base.folder}) does not have; name the model that the adapter was trained on"
            + trained_on(self._adapter)
        )


def _full_spec(base: View, adapter: Checkpoint, target: str, theirs: Spec) -> Spec:
    """What a tensor is that the adapter has in full. A vocabulary may have grown: its first dimension is free."""
    ours = base.tensors.get(target, theirs)
    if ours.shape[1:] != theirs.shape[1:] or len(ours.shape) != len(theirs.shape):
        raise CheckpointError(
            f"{adapter.folder}: has {quoted(target)} in full with shape {list(theirs.shape)}, the base "
            f"({base.folder}) has {list(ours.shape)}; name the model that the adapter was "
            f"trained on{trained_on(adapter)}"
        )
    return Spec(ours.dtype if target in base.tensors else theirs.dtype, theirs.shape)


def _changes(finder: _Names, adapter: Checkpoint, module: str, low: Mapping[str, str]) -> Iterator[tuple[str, Change]]:
    """The tensors of the base that one module of the adapter changes."""
    embedding = low.get("lora_embedding_A") is not None
    a, b = (low.get(f"lora_embedding_{x}" if embedding else f"lora_{x}") for x in "AB")
    if a is None or b is None:
        raise CheckpointError(
            f"{adapter.folder}: module {quoted(module)} has {', '.join(sorted(low))}, expected lora_A and lora_B; "
            "save the adapter again"
        )
    config = adapter.config
    target = finder.find(f"{module}.weight", a)
    shapes = adapter.tensors[a].shape, adapter.tensors[b].shape
    turned = embedding or is_turned(finder.shape(target), shapes, bool(config.get("fan_in_fan_out")))
    scale = scale_of(adapter, module, shapes[0][0] if shapes[0] else 0)
    magnitude = low.get("lora_magnitude_vector")
    if bool(config.get("use_dora")) != (magnitude is not None):
        raise CheckpointError(
            f"{adapter.folder}: use_dora is {config.get('use_dora')} in adapter_config.json, but module "
            f"{quoted(module)} has {'a' if magnitude else 'no'} lora_magnitude_vector; save the adapter again"
        )
    yield target, Change(a, b, scale, turned, magnitude)
    if (bias := low.get("lora_B.bias")) is not None:
        yield finder.find(f"{module}.bias", bias), Change(None, bias, scale)


def _maker(target: str, own: str | None, change: Change, files: Any) -> Maker:
    def make(source: TensorSource) -> Tensor:
        return change.apply(source.get(target) if own is None else files().get(own), files())

    return make
