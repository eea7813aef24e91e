"""Whether checkpoints can be merged: the same architecture, tensor names and shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from search.checkpoints.header import TensorInfo, quoted
from search.errors import CheckpointError

if TYPE_CHECKING:
    from search.checkpoints.reading import Checkpoint

LINES_PER_SOURCE = 5
"""A source with another width differs in every tensor; nobody reads more lines than this."""

OUTPUT_HEADS = ("lm_head.", "embed_out.", "output_projection.", "cls.predictions.decoder.")


def check_compatible(base: Checkpoint, sources: Mapping[str, Checkpoint]) -> None:
    """Refuse sources that cannot be merged with the base, before anything is spent.

    Architecture, model type, tensor names and shapes must be equal; dtypes may differ among
    floating-point ones only.

    Raises:
        CheckpointError: the faults of all sources, one line each, at most six a source.
    """
    faults = [*_quantised("the base", base)]
    for name, source in sources.items():
        found = [f"source '{name}': {fault}" for fault in _faults(base, source)]
        more = len(found) - LINES_PER_SOURCE
        faults += found[:LINES_PER_SOURCE]
        if more > 0:
            faults.append(f"source '{name}': ... and {more} more tensors that do not fit")
    if faults:
        raise CheckpointError("\n".join(faults))


def _faults(base: Checkpoint, source: Checkpoint) -> Iterator[str]:
    yield from _quantised(f"{source.folder}", source)
    for what, theirs, ours in (
        ("architecture", source.architecture, base.architecture),
        ("model_type", source.config.get("model_type"), base.config.get("model_type")),
    ):
        if theirs != ours:
            yield (
                f"its config.json has {what} {quoted(theirs)}, the base ({base.folder}) has {quoted(ours)}; "
                "merge models of one architecture"
            )
            return  # tensor names and shapes would only repeat it
    yield from _unpaired(base, source)
    yield from _unequal(base, source)


def _quantised(where: str, checkpoint: Checkpoint) -> Iterator[str]:
    settings = checkpoint.config.get("quantization_config")
    if settings:
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        yield f"{where} is quantised ({quoted(method)}), its numbers cannot be averaged; dequantise it first"


def _unpaired(base: Checkpoint, source: Checkpoint) -> Iterator[str]:
    """Tensors that only one of the two has."""
    for sign, names in (
        ("has no", base.tensors.keys() - source.tensors.keys()),
        ("has an extra", source.tensors.keys() - base.tensors.keys()),
    ):
        for name in sorted(names):
            info = (base if name in base.tensors else source).tensors[name]
            where = "which the base has" if sign == "has no" else "which the base lacks"
            line = f"{sign} tensor {quoted(name)} of shape {list(info.shape)}, {where}"
            if name.startswith(OUTPUT_HEADS):
                tied = [model.config.get("tie_word_embeddings") for model in (source, base)]
                yield (
                    f"{line}: one of them ties its output head to its embedding, the other does not "
                    f"(tie_word_embeddings is {tied[0]} here, {tied[1]} in the base); save both the same way"
                )
            else:
                yield f"{line}; merge models that were fine-tuned from this base"


def _unequal(base: Checkpoint, source: Checkpoint) -> Iterator[str]:
    """Tensors that both have, with other shapes or other kinds of numbers."""
    vocabularies = (source.config.get("vocab_size"), base.config.get("vocab_size"))
    resized: list[str] = []
    for name, ours in base.tensors.items():
        theirs = source.tensors.get(name)
        if theirs is None:
            continue
        if theirs.shape != ours.shape:
            if _is_vocabulary(theirs, ours, vocabularies):
                resized.append(name)
                continue
            yield (
                f"tensor {quoted(name)} has shape {list(theirs.shape)}, the base has {list(ours.shape)}; "
                "merge models that were fine-tuned from this base"
            )
        elif theirs.dtype != ours.dtype and not (theirs.floating and ours.floating):
            yield (
                f"tensor {quoted(name)} of shape {list(ours.shape)} holds {theirs.dtype}, the base holds "
                f"{ours.dtype}; only floating-point dtypes may differ, so save both in one dtype"
            )
    if resized:
        name, also = resized[0], f" (and {len(resized) - 1} more)" if len(resized) > 1 else ""
        theirs, ours = source.tensors[name], base.tensors[name]
        yield (
            f"has a vocabulary of {vocabularies[0]} tokens, the base of {vocabularies[1]}: tensor "
            f"{quoted(name)}{also} has shape {list(theirs.shape)}, the base has {list(ours.shape)}; if the "
            "tokens they share come first, bring it to the base's with "
            f"resize_token_embeddings({vocabularies[1]})"
        )


def _is_vocabulary(theirs: TensorInfo, ours: TensorInfo, vocabularies: tuple[object, object]) -> bool:
    """Whether two shapes differ in the vocabulary alone, which Hugging Face models have first."""
    return (
        len(theirs.shape) == len(ours.shape)
        and theirs.shape[1:] == ours.shape[1:]
        and (theirs.shape[:1], ours.shape[:1]) == ((vocabularies[0],), (vocabularies[1],))
    )
