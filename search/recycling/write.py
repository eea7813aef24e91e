"""Carries out a plan: the checkpoint, its tokenizer, `recycling.json` and a model card."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from search.checkpoints.fingerprint import fingerprint, refuse_non_finite
from search.checkpoints.reading import CheckpointTensors
from search.checkpoints.shard_writer import Planned
from search.checkpoints.tensor_bytes import TORCH_NAMES
from search.checkpoints.writing import COMPANION_SUFFIXES, COMPANIONS, write_checkpoint
from search.recycling.mapping import MappingReport, Plan, widen

if TYPE_CHECKING:
    from torch import Tensor

REPORT = "recycling.json"


def write_recycled(plan: Plan, out: Path, *, dtype: str | None = None, overwrite: bool = False) -> Path:
    """Write the result of a plan as a checkpoint, one tensor in memory at a time.

    Args:
        plan: what to make.
        out: folder to write; must not exist, or be empty.
        dtype: of all floating-point tensors; None: each keeps that of its source.
        overwrite: whether `out` may be a model that Meiosis wrote before.

    Returns:
        The absolute path of the folder.

    Raises:
        UserError: `out` is taken, the dtype is unknown, or the source has values that are not finite.
    """
    print_ = fingerprint(plan.source)
    refuse_non_finite(plan.source.folder.name, print_)
    report = plan.report()
    with CheckpointTensors(plan.source) as tensors, tempfile.TemporaryDirectory() as folder:
        # The writer takes config and tokenizer from a folder; neither may be the source's here.
        layout = Path(folder)
        (layout / "config.json").write_text(json.dumps(plan.config, indent=2))
        _copy_tokenizer(plan.tokenizer or plan.source.folder, layout)
        donor = type(plan.source)(layout, plan.config, plan.source.tensors)
        return write_checkpoint(
            _made(plan, tensors),
            donor,
            out,
            layout=_layout(plan, dtype),
            extra_files={
                REPORT: json.dumps(report.as_dict(), indent=2) + "\n",
                "README.md": recycling_card(plan, report, print_.sha256),
            },
            dtype=dtype,
            overwrite=overwrite,
        )


def _layout(plan: Plan, dtype: str | None) -> list[Planned] | None:
    """What will be written, so that the space for it can be checked; None where the dtype is not known."""
    theirs = {torch_name: name for name, torch_name in TORCH_NAMES.items()}
    target = None if dtype is None else theirs.get(dtype, dtype)
    if target is not None and target not in TORCH_NAMES:
        return None  # the writer knows what to say
    infos, usual = plan.source.tensors, _usual(plan)
    kinds = [infos[part.sources[0]] if part.sources else infos[usual] for part in plan.parts]
    return [
        Planned(part.name, target if target and info.floating else info.dtype, part.shape)
        for part, info in zip(plan.parts, kinds, strict=True)
    ]


def _usual(plan: Plan) -> str:
    """The largest tensor of the source, whose dtype those get that are initialised."""
    infos = plan.source.tensors
    return max((name for name, info in infos.items() if info.floating), key=lambda name: infos[name].nbytes)


def make_tensors(plan: Plan) -> dict[str, Tensor]:
    """All tensors of a plan by name, in memory."""
    with CheckpointTensors(plan.source) as tensors:
        return {name: tensor.clone() for name, tensor in _made(plan, tensors)}


def _made(plan: Plan, tensors: CheckpointTensors) -> Iterator[tuple[str, Tensor]]:
    infos, usual = plan.source.tensors, _usual(plan)
    for part in plan.parts:
        dtype = tensors.get(part.sources[0] if part.sources else usual).dtype
        made = part.make(lambda name: widen(tensors.get(name)) if infos[name].floating else tensors.get(name))
        assert tuple(made.shape) == part.shape, f"{part.name}: {tuple(made.shape)}, planned {part.shape}"
        yield part.name, made.to(dtype).contiguous()


def _copy_tokenizer(source: Path, to: Path) -> None:
    """The files of a tokenizer, without the settings of generation, which belong to the old architecture."""
    for path in sorted(source.iterdir()):
        name = path.name
        if name == "generation_config.json" or not name.endswith(COMPANION_SUFFIXES) or not path.is_file():
            continue
        if any(fnmatchcase(name, pattern) for pattern in COMPANIONS):
            shutil.copyfile(path, to / name)


def recycling_card(plan: Plan, report: MappingReport, sha256: str) -> str:
    """Markdown with the metadata block that the Hugging Face hub reads."""
    cached = next((part for part in plan.source.folder.parts if part.startswith("models--")), "")
    hub_id = cached.removeprefix("models--").replace("--", "/")
    metadata = {
        "base_model": [hub_id] if hub_id.count("/") == 1 else [],
        "tags": ["recycling", "meiosis"],
        "library_name": "transformers",
    }
    lines = ["---", yaml.safe_dump(metadata, sort_keys=False).strip(), "---", ""]
    lines += [f"# {plan.architecture} from {hub_id or report.source}", ""]
    lines += [
        f"Recycled by Meiosis without training: {plan.method}. Source: {report.source_architecture}, "
        f"sha256 of the weights `{sha256[:16]}`.",
        "",
        f"Compared with the source: {plan.preserving}.",
        "",
        "Meant as the starting point of training. Loads with "
        f"`transformers.{plan.architecture}.from_pretrained`, no remote code.",
        "",
    ]
    lines += [f"- {note}" for note in plan.notes]
    lines += ["", "| tensors | number |", "|---|---|"]
    lines += [f"| {what} | {count} |" for what, count in report.counts.items()]
    lines += ["", "Settings:", ""]
    lines += [f"    {name}: {value}" for name, value in plan.settings.items()]
    lines += ["", f"`{REPORT}` beside this file says for every tensor what became of it or where it comes from.", ""]
    return "\n".join(lines)
