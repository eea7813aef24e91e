"""Which tensors share genes: by layer, by kind, or by the user's patterns.

Everything goes by tensor names, so any architecture whose checkpoint numbers its layers works.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

LAYER = re.compile(r"^(?P<stack>.*?)\.?(?<![^.])(?P<index>\d+)\.(?P<rest>.+)$")
"""The first path component that is a number is the layer; what stands before it names the stack."""

_KINDS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("norm", re.compile(r"norm|(^|[._])ln(_|\d|\.|$)|batch_?norm", re.IGNORECASE)),
    ("attention", re.compile(r"attn|attention|(^|\.)[qkvo]_proj\.|selfatt|crossatt", re.IGNORECASE)),
    (
        "mlp",
        re.compile(
            r"mlp|ffn|feed_?forward|expert|moe|dense_?relu|(^|\.)(intermediate|output|fc\d?|c_fc|wi|wo|wi_\d|"
            r"up_proj|down_proj|gate_proj|lin\d)(\.|$)",
            re.IGNORECASE,
        ),
    ),
)
_OUTER: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("embedding", re.compile(r"embed|(^|\.)(wte|wpe|shared)(\.|$)|cls_token|patch|position", re.IGNORECASE)),
    ("norm", _KINDS[0][1]),
    (
        "head",
        re.compile(r"head|classifier|score|pooler|(^|\.)(cls|qa_outputs|fc)(\.|$)|logits", re.IGNORECASE),
    ),
)


BEHIND = 2**31 - 1
"""Position in a forward pass of what comes after all layers."""


@dataclass(frozen=True)
class Place:
    """Where a tensor stands in its model: stack of layers, layer number (None: outside of them), kind."""

    stack: str
    layer: int | None
    kind: str


@dataclass(frozen=True)
class Group:
    """Tensors that share genes."""

    name: str
    tensors: tuple[str, ...]


def place_of(tensor: str) -> Place:
    """The place that the name of a tensor tells."""
    match = LAYER.match(tensor)
    if match:
        rest = match["rest"]
        kind = next((kind for kind, pattern in _KINDS if pattern.search(rest)), "other")
        return Place(match["stack"], int(match["index"]), kind)
    kind = next((kind for kind, pattern in _OUTER if pattern.search(tensor)), "other")
    return Place("", None, kind)


def positions(groups: Iterable[Group]) -> dict[str, int]:
    """Group name -> where a forward pass first meets one of its tensors.

    0: before the layers, or unknown; 1 + n: in layer n, the layers of a decoder counted on from those of the encoder;
    `BEHIND`: only after the last layer (final norm, head).
    """
    groups = tuple(groups)
    places = {tensor: place_of(tensor) for group in groups for tensor in group.tensors}
    lengths: dict[str, int] = {}
    for place in places.values():
        if place.layer is not None:
            lengths[place.stack] = max(lengths.get(place.stack, 0), place.layer + 1)
    before: dict[str, int] = {}
    total = 0
    for stack in sorted(lengths, key=lambda name: ("decoder" in name, name)):
        before[stack] = total
        total += lengths[stack]

    def position(place: Place) -> int:
        if place.layer is not None:
            return 1 + before[place.stack] + place.layer
        return BEHIND if place.kind in ("head", "norm") else 0

    return {group.name: min(position(places[tensor]) for tensor in group.tensors) for group in groups}


def depths(names: Iterable[str]) -> dict[str, float]:
    """Tensor name -> 0 in the first layer of its stack to 1 in the last (1 in an only layer); others are left out."""
    places = {name: place for name in names if (place := place_of(name)).layer is not None}
    last: dict[str, int] = {}
    for place in places.values():
        last[place.stack] = max(last.get(place.stack, 0), place.layer or 0)
    return {
        name: (place.layer or 0) / last[place.stack] if last[place.stack] else 1.0 for name, place in places.items()
    }


def group_tensors(
    names: Iterable[str], layers_per_group: int, split: Sequence[str], patterns: Mapping[str, str]
) -> tuple[Group, ...]:
    """Groups over all tensors, in the order in which a forward pass would meet them.

    Args:
        names: tensor names of the base.
        layers_per_group: neighbouring layers that share genes; 0: all of a stack.
        split: kinds that get a group of their own; the other tensors of a layer group stay together.
            Tensors outside of the layers that are not split off form the group `rest`.
        patterns: group name -> regular expression, tried before everything else, in order.
    """
    compiled = [(name, re.compile(pattern)) for name, pattern in patterns.items()]
    found: dict[tuple[int, str, int, str], tuple[str, list[str]]] = {}
    stacks: dict[str, None] = {}
    for tensor in sorted(names, key=_natural):
        pattern_name = next((name for name, pattern in compiled if pattern.search(tensor)), None)
        place = place_of(tensor)
        part = place.kind if place.kind in split else ""
        if pattern_name is not None:
            key, label = (0, pattern_name, 0, ""), pattern_name
        elif place.layer is None:
            rank = 3 if place.kind in ("head", "norm") else 1
            key, label = ((rank if part else 3), "", 0, part), part or "rest"
        else:
            stacks[place.stack] = None
            first = 0 if layers_per_group == 0 else place.layer // layers_per_group * layers_per_group
            key = (2, place.stack, first, part)
            label = _layer_label(first, layers_per_group) + (f".{part}" if part else "")
        found.setdefault(key, (label, []))[1].append(tensor)
    named = []
    for key, (label, tensors) in sorted(found.items()):
        # Two stacks (encoder and decoder) number their layers alike: tell them apart by their prefix.
        prefix = f"{key[1]}." if key[0] == 2 and len(stacks) > 1 else ""
        named.append(Group(prefix + label, tuple(tensors)))
    return tuple(named)


def _layer_label(first: int, layers_per_group: int) -> str:
    if layers_per_group == 0:
        return "layers"
    return f"layer{first}" if layers_per_group == 1 else f"layers{first}-{first + layers_per_group - 1}"


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
