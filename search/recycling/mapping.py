"""What becomes of every source tensor and where every target tensor comes from: a plan, and its report.

A plan is made from headers, so that it can be shown, and refused, before anything is computed. Its parts make
their tensors one after another while the checkpoint is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.checkpoints.reading import Checkpoint
from search.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

Read = Callable[[str], "Tensor"]
"""A source tensor by its name in the source, in its own dtype or float32, whichever is wider."""


@dataclass(frozen=True)
class Part:
    """One target tensor.

    Attributes:
        name: of the tensor in the target.
        shape: of the tensor in the target.
        operation: what is done, in a few words: copied, transposed, fused, folded, initialised, ...
        sources: names in the source of the tensors that it is made of; empty: initialised.
        make: computes it; the result is cast to the dtype of the first source.
        note: why, or with which numbers.
    """

    name: str
    shape: tuple[int, ...]
    operation: str
    sources: tuple[str, ...]
    make: Callable[[Read], Tensor]
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """A recycling that can be carried out.

    Attributes:
        source: gives the weights.
        method: one sentence for people.
        architecture: class of transformers that loads the result.
        config: the whole `config.json` of the result.
        parts: the target tensors, in the order of writing.
        dropped: source tensors of which nothing is kept, with the reason.
        settings: what was asked for.
        preserving: what is known about the function of the result compared with that of the source.
        notes: what else the user should know.
        tokenizer: folder whose tokenizer goes with the result; None: that of the source.
    """

    source: Checkpoint
    method: str
    architecture: str
    config: Mapping[str, Any]
    parts: tuple[Part, ...]
    dropped: Mapping[str, str]
    settings: Mapping[str, Any]
    preserving: str
    notes: tuple[str, ...] = ()
    tokenizer: Path | None = None

    def __post_init__(self) -> None:
        used = {name for part in self.parts for name in part.sources}
        lost = sorted(set(self.source.tensors) - used - set(self.dropped))
        assert not lost, f"the report would not say what becomes of {lost}"
        assert not used & set(self.dropped), "a tensor is both used and dropped"
        names = [part.name for part in self.parts]
        assert len(names) == len(set(names)), "a target tensor is made twice"

    def report(self) -> MappingReport:
        """The mapping, both ways."""
        uses: dict[str, list[Part]] = {name: [] for name in self.source.tensors}
        for part in self.parts:
            for name in part.sources:
                uses[name].append(part)
        sources = tuple(
            SourceUse(
                name,
                self.source.tensors[name].shape,
                "; ".join(dict.fromkeys(part.operation for part in parts)) or "dropped",
                tuple(part.name for part in parts),
                self.dropped.get(name, ""),
            )
            for name, parts in uses.items()
        )
        targets = tuple(TargetOrigin(p.name, p.shape, p.operation, p.sources, p.note) for p in self.parts)
        return MappingReport(
            source=self.source.folder.name,
            source_architecture=self.source.architecture,
            architecture=self.architecture,
            method=self.method,
            preserving=self.preserving,
            settings=dict(self.settings),
            notes=self.notes,
            sources=sources,
            targets=targets,
        )


@dataclass(frozen=True)
class SourceUse:
    """What became of one source tensor; `operation` is "dropped" where nothing is kept, for this `reason`."""

    name: str
    shape: tuple[int, ...]
    operation: str
    targets: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class TargetOrigin:
    """Where one target tensor comes from; no `sources`: initialised as the operation says."""

    name: str
    shape: tuple[int, ...]
    operation: str
    sources: tuple[str, ...]
    note: str


@dataclass(frozen=True)
class MappingReport:
    """Every source tensor and every target tensor exactly once."""

    source: str
    source_architecture: str | None
    architecture: str
    method: str
    preserving: str
    settings: dict[str, Any]
    notes: tuple[str, ...]
    sources: tuple[SourceUse, ...]
    targets: tuple[TargetOrigin, ...]
    counts: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        dropped = sum(not use.targets for use in self.sources)
        made = sum(not origin.sources for origin in self.targets)
        counts = {
            "source tensors": len(self.sources),
            "used": len(self.sources) - dropped,
            "dropped": dropped,
            "target tensors": len(self.targets),
            "initialised": made,
        }
        object.__setattr__(self, "counts", counts)

    def as_dict(self) -> dict[str, Any]:
        """For `recycling.json` and `--json`."""
        return asdict(self)


def class_of(source: Checkpoint) -> str:
    """What a checkpoint is, for messages."""
    return source.architecture or ("LoRA adapter" if source.kind == "adapter" else "model of unknown class")


def refuse_quantised(source: Checkpoint) -> None:
    """Raise `CheckpointError` for a source whose numbers are not the weights."""
    settings = source.config.get("quantization_config")
    if settings:
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        raise CheckpointError(
            f"{source.folder}: is quantised ({method}), expected floating-point weights; dequantise it first"
        )


def widen(tensor: Tensor) -> Tensor:
    """The tensor in its own dtype, or in float32 where that is narrower: for arithmetic."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor
