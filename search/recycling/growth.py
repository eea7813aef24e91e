"""A small model initialises a larger one of its own architecture: more layers, wider layers, or both.

Width: Net2Net (Chen 2015, https://arxiv.org/abs/1511.05641), which Chen 2022 (bert2BERT,
https://arxiv.org/abs/2110.07143) calls FPI, copies rows and divides columns by the number of copies, so that the
function stays. Hidden units are copied equally often, because a norm sees the mean over all of them. With
`asymmetry` the columns are divided unevenly (the shares still sum to 1): even copies would get equal gradients
and stay copies for ever. AKI (bert2BERT) takes the new rows from the next layer instead; the function changes.

Depth: stack (layer l mod L; Gong 2019, StackBERT), interlace (every layer followed by its copies), identity
(interlaced copies whose output matrices are zero, Wu 2024, https://arxiv.org/abs/2401.02415): only the last keeps
the function.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from search.errors import UserError
from search.recycling.families import Family, Place, Sizes, find_family, places, sizes_of
from search.recycling.mapping import Part, Plan, Read, refuse_quantised
from search.recycling.widening import Widening, expand, widenings_of

if TYPE_CHECKING:
    from torch import Tensor

    from search.checkpoints.reading import Checkpoint

DepthMethod = Literal["stack", "interlace", "identity"]
WidthMethod = Literal["fpi", "aki"]


@dataclass(frozen=True)
class GrowthOptions:
    """The size of the result and how it is filled.

    Attributes:
        layers: None: as many as the source.
        hidden: a multiple of the source's; the number of heads grows with it. None: as wide as the source.
        mlp: None: grows with `hidden`.
        depth: how new layers are filled.
        width: how new units are filled.
        asymmetry: from 0 (columns divided evenly) to below 1: how unevenly, drawn by `seed`.
        seed: of the uneven division.
    """

    layers: int | None = None
    hidden: int | None = None
    mlp: int | None = None
    depth: DepthMethod = "stack"
    width: WidthMethod = "fpi"
    asymmetry: float = 0.0
    seed: int = 0


def plan_growth(checkpoint: Checkpoint, options: GrowthOptions) -> Plan:
    """How a checkpoint becomes a larger one of the same architecture.

    Raises:
        UserError: the architecture cannot grow, or not to this size.
    """
    family = find_family(checkpoint)
    refuse_quantised(checkpoint)
    small = sizes_of(checkpoint, family)
    large = _target(checkpoint, family, small, options)
    found, dropped = places(checkpoint, family)
    tied = bool(checkpoint.config.get("tie_word_embeddings", family.tied))
    if tied:
        for place in [place for place in found if place.inside == family.output]:
            found.remove(place)
            dropped[place.name] = "tied: the same numbers as the input embeddings"
    origin = layer_origins(small.layers, large.layers, options.depth)
    widenings = widenings_of(small, large, options.asymmetry, options.seed)
    parts: list[Part] = []
    by_key = {(place.layer, place.inside): place for place in found}
    for place in found:
        if place.layer is None:
            axes = tuple(axis.replace("+", "-") for axis in place.axes) if _last(family, tied, place) else place.axes
            parts.append(_part(checkpoint, place.name, place, None, axes, widenings, zero=False, new_layer=False))
    for number, old in enumerate(origin):
        first = origin.index(old) == number
        for place in (place for place in found if place.layer == old):
            name = f"{place.start}{number}.{place.name.removeprefix(f'{place.start}{old}.')}"
            zero = options.depth == "identity" and not first and place.inside in family.residual_outputs
            upper = by_key.get((old + 1, place.inside)) if options.width == "aki" else None
            parts.append(_part(checkpoint, name, place, upper, place.axes, widenings, zero=zero, new_layer=not first))
    return Plan(
        source=checkpoint,
        method=_method(small, large, options),
        architecture=str(checkpoint.architecture),
        config=_config(checkpoint, family, small, large, origin),
        parts=tuple(parts),
        dropped=dropped,
        settings=asdict(options),
        preserving=_preserving(small, large, options),
        notes=_notes(small, large, options),
    )


def layer_origins(small: int, large: int, method: DepthMethod) -> list[int]:
    """For every layer of the result the layer of the source that it comes from."""
    if method == "stack":
        return [layer % small for layer in range(large)]
    return [layer * small // large for layer in range(large)]


def _target(checkpoint: Checkpoint, family: Family, small: Sizes, options: GrowthOptions) -> Sizes:
    """The sizes of the result; what cannot be reached by growing is refused."""
    layers, hidden = options.layers or small.layers, options.hidden or small.hidden
    for what, wanted, have in (
        ("layers", options.layers, small.layers),
        ("hidden", options.hidden, small.hidden),
        ("mlp", options.mlp, small.mlp),
    ):
        if wanted is not None and wanted < have:
            raise UserError(f"--{what} {wanted}: {checkpoint.folder} has {have}, and growing cannot shrink it")
    if hidden % small.hidden:
        lower = hidden // small.hidden * small.hidden
        raise UserError(
            f"--hidden {hidden}: expected a multiple of {small.hidden}, so that every unit is copied equally often "
            f"and the norms keep their statistics; the nearest are {lower} and {lower + small.hidden}"
        )
    factor = hidden // small.hidden
    mlp = options.mlp or small.mlp * factor
    if not 0 <= options.asymmetry < 1:
        raise UserError(f"--asymmetry {options.asymmetry:g}: expected at least 0 and less than 1")
    if (layers, hidden, mlp) == (small.layers, small.hidden, small.mlp):
        raise UserError(
            f"{checkpoint.folder} has {layers} layers, {hidden} hidden units and {mlp} in the MLP already; "
            "ask for more of one of them"
        )
    if layers > small.layers:
        if options.depth == "identity" and not family.pre_norm:
            raise UserError(
                f"--depth identity: a {checkpoint.architecture} normalises after each sub-layer, so that no new "
                "layer leaves its input as it is; use stack or interlace"
            )
        if checkpoint.config.get("scale_attn_by_inverse_layer_idx"):
            raise UserError(
                f"{checkpoint.folder}: scales attention by the layer's number (scale_attn_by_inverse_layer_idx), "
                "which moved layers would change; grow its width only"
            )
    return Sizes(layers, hidden, mlp, small.heads * factor, small.kv_heads * factor, small.head)


def _part(
    checkpoint: Checkpoint,
    name: str,
    place: Place,
    upper: Place | None,
    axes: tuple[str, ...],
    widenings: dict[str, Widening],
    *,
    zero: bool,
    new_layer: bool,
) -> Part:
    """One tensor of the result; `upper` gives the new rows (AKI)."""
    shape = checkpoint.tensors[place.name].shape
    grows = [bool(axis) and len(widenings[axis[1:]].old) != size for axis, size in zip(axes, shape, strict=True)]
    new_shape = tuple(len(widenings[axis[1:]].old) if axis else size for axis, size in zip(axes, shape, strict=True))
    rows = next((dim for dim, axis in enumerate(axes) if axis.startswith("+") and grows[dim]), None)
    if rows is None:
        upper = None
    steps = ["layer copied" if new_layer else "copied"]
    if any(grow and axis.startswith("+") for grow, axis in zip(grows, axes, strict=True)):
        steps.append("new rows from the next layer" if upper else "rows copied")
    if any(grow and axis.startswith("-") for grow, axis in zip(grows, axes, strict=True)):
        steps.append("columns divided")
    if zero:
        import torch

        note = "zero output: the layer passes its input on until it is trained"
        return Part(name, new_shape, "initialised 0", (), lambda _: torch.zeros(new_shape), note)

    def make(read: Read) -> Tensor:
        import torch

        mine = expand(read(place.name), axes, widenings)
        if upper is None or rows is None:
            return mine
        mask = widenings[axes[rows][1:]].new
        view = [1] * mine.ndim
        view[rows] = len(mask)
        return torch.where(mask.view(view), expand(read(upper.name), axes, widenings), mine)

    sources = (place.name,) if upper is None else (place.name, upper.name)
    return Part(name, new_shape, ", ".join(steps), sources, make)


def _last(family: Family, tied: bool, place: Place) -> bool:
    """Whether this norm feeds a tied output: its copies then add up there, and must share."""
    return tied and place.inside in family.last_norm


def _config(checkpoint: Checkpoint, family: Family, small: Sizes, large: Sizes, origin: list[int]) -> dict[str, Any]:
    config = dict(checkpoint.config)
    for what, key in family.config.items():
        if key in config or what != "kv_heads":
            config[key] = getattr(large, what)
    if "head_dim" in family.config or "num_key_value_heads" in family.config.values():
        config["head_dim"] = large.head
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == small.layers:
        config["layer_types"] = [kinds[layer] for layer in origin]
    return config


def _method(small: Sizes, large: Sizes, options: GrowthOptions) -> str:
    steps = []
    if large.layers > small.layers:
        steps.append(f"{small.layers} to {large.layers} layers ({options.depth})")
    if (large.hidden, large.mlp) != (small.hidden, small.mlp):
        steps.append(f"hidden {small.hidden} to {large.hidden}, MLP {small.mlp} to {large.mlp} ({options.width})")
    return "grown from " + ", ".join(steps)


def _preserving(small: Sizes, large: Sizes, options: GrowthOptions) -> str:
    reasons = []
    if large.layers > small.layers and options.depth != "identity":
        reasons.append(f"{options.depth} runs layers again")
    if (large.hidden, large.mlp) != (small.hidden, small.mlp) and options.width == "aki":
        reasons.append("aki mixes in the next layer")
    if reasons:
        return f"another function ({', '.join(reasons)})"
    return "the same function up to rounding"


def _notes(small: Sizes, large: Sizes, options: GrowthOptions) -> tuple[str, ...]:
    notes = []
    if large.heads > small.heads:
        notes.append(f"{small.heads} to {large.heads} heads of {large.head} units")
    if (large.hidden, large.mlp) != (small.hidden, small.mlp) and options.width == "fpi" and not options.asymmetry:
        notes.append(
            "copies of a unit get equal gradients and stay equal without dropout; --asymmetry 0.5 divides the "
            "columns unevenly, which keeps the function and lets them part"
        )
    return tuple(notes)
