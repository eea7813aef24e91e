"""Whether models can be merged: the same architecture, tensor names and shapes, the same tokens."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from search.checkpoints.adapter import adapted
from search.checkpoints.fp8 import dequantised, fp8_faults
from search.checkpoints.header import quoted
from search.checkpoints.heads import agree_on_heads
from search.checkpoints.reading import Checkpoint
from search.checkpoints.view import View, file_view, require_model
from search.errors import CheckpointError
from search.vocabulary.embeddings import is_by_token
from search.vocabulary.tokenizer import vocabulary_conflict

LINES_PER_SOURCE = 5
"""A source with another width differs in every tensor; nobody reads more lines than this."""


def view_of(checkpoint: Checkpoint, base: Checkpoint | None = None) -> View:
    """A checkpoint as merges see it: fp8 as numbers, an adapter applied to its base.

    Args:
        base: what an adapter that does not know its base is applied to.

    Raises:
        CheckpointError: it cannot be read so; one line.
    """
    if checkpoint.kind == "model":
        return dequantised(file_view(checkpoint))
    under = checkpoint.base or base
    if under is None:
        require_model(checkpoint, "merged")
        raise AssertionError
    require_model(under, "the base of another adapter")
    return adapted(view_of(under), checkpoint)


def check_compatible(base: Checkpoint, sources: Mapping[str, Checkpoint], *, any_vocabulary: bool = False) -> None:
    """Refuse sources that cannot be merged with the base, before anything is spent.

    Architecture, model type, tensor names and shapes must be equal; dtypes may differ among
    floating-point ones only. Adapters are looked at as the models that they make of their base.

    Args:
        any_vocabulary: whether vocabularies may differ, because the recipe says what to do then.

    Raises:
        CheckpointError: the faults of all sources, one line each, at most six a source.
    """
    faults = [f"the base {fault}" for fault in fp8_faults(base)]
    if faults:
        raise CheckpointError("\n".join(faults))
    require_model(base, "the base of a merge")
    ours = view_of(base)
    for name, source in sources.items():
        found = [f"source '{name}': {fault}" for fault in _faults(base, ours, source, any_vocabulary)]
        more = len(found) - LINES_PER_SOURCE
        faults += found[:LINES_PER_SOURCE]
        if more > 0:
            faults.append(f"source '{name}': ... and {more} more tensors that do not fit")
    if faults:
        raise CheckpointError("\n".join(faults))


def _faults(base: Checkpoint, ours: View, source: Checkpoint, any_vocabulary: bool) -> Iterator[str]:
    if source.kind == "model":
        for what, theirs, own in (
            ("architecture", source.architecture, base.architecture),
            ("model_type", source.config.get("model_type"), base.config.get("model_type")),
        ):
            if theirs != own:
                yield (
                    f"its config.json has {what} {quoted(theirs)}, the base ({base.folder}) has {quoted(own)}; "
                    "merge models of one architecture"
                )
                return  # tensor names and shapes would only repeat it
    quantised = [f"{source.folder} {fault}" for fault in fp8_faults(source)] if source.kind == "model" else []
    if quantised:
        yield from quantised
        return
    try:
        theirs_view = view_of(source, base)
        views = agree_on_heads({"base": ours, "source": theirs_view}, "base").views
    except CheckpointError as error:
        yield str(error)
        return
    ours, theirs_view = views["base"], views["source"]
    yield from _unpaired(ours, theirs_view)
    resized = [name for name in ours.tensors if _resized(name, ours, theirs_view)]
    yield from _unequal(ours, theirs_view, resized)
    if any_vocabulary:
        return
    if resized:
        yield _of_vocabularies(resized, ours, theirs_view)
    elif conflict := vocabulary_conflict(source.folder, base.folder):
        yield (
            f"{conflict}; say what to do with tokens under `vocabulary` in a recipe (`meiosis merge` carries it out), "
            "or merge models of one tokenizer"
        )


def _unpaired(base: View, source: View) -> Iterator[str]:
    """Tensors that only one of the two has."""
    for sign, names in (
        ("has no", base.tensors.keys() - source.tensors.keys()),
        ("has an extra", source.tensors.keys() - base.tensors.keys()),
    ):
        for name in sorted(names):
            info = (base if name in base.tensors else source).tensors[name]
            where = "which the base has" if sign == "has no" else "which the base lacks"
            line = f"{sign} tensor {quoted(name)} of shape {list(info.shape)}, {where}"
            yield f"{line}; merge models that were fine-tuned from this base, or take it out of the files"


def _resized(name: str, base: View, source: View) -> bool:
    """Whether a tensor differs in nothing but the number of tokens."""
    ours, theirs = base.tensors[name], source.tensors.get(name)
    return (
        theirs is not None
        and theirs.shape != ours.shape
        and theirs.shape[1:] == ours.shape[1:]
        and is_by_token(name, base)
        and is_by_token(name, source)
    )


def _of_vocabularies(resized: list[str], base: View, source: View) -> str:
    name, also = resized[0], f" (and {len(resized) - 1} more)" if len(resized) > 1 else ""
    theirs, ours = source.tensors[name].shape, base.tensors[name].shape
    return (
        f"has a vocabulary of {theirs[0]} tokens, the base of {ours[0]}: tensor {quoted(name)}{also} has shape "
        f"{list(theirs)}, the base has {list(ours)}; say what to do with tokens under `vocabulary` in a recipe "
        "(`meiosis merge` carries it out), or, if the tokens they share come first, bring it to the base's with "
        f"resize_token_embeddings({ours[0]})"
    )


def _unequal(base: View, source: View, but: Collection[str]) -> Iterator[str]:
    """Tensors that both have, with other shapes or other kinds of numbers."""
    for name, ours in base.tensors.items():
        theirs = source.tensors.get(name)
        if theirs is None or name in but:
            continue
        if theirs.shape != ours.shape:
            yield (
                f"tensor {quoted(name)} has shape {list(theirs.shape)}, the base has {list(ours.shape)}; "
                "merge models that were fine-tuned from this base"
            )
        elif theirs.dtype != ours.dtype and not (theirs.floating and ours.floating):
            yield (
                f"tensor {quoted(name)} of shape {list(ours.shape)} holds {theirs.dtype}, the base holds "
                f"{ours.dtype}; only floating-point dtypes may differ, so save both in one dtype"
            )
