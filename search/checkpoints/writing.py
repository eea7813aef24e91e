"""Writes checkpoint folders that stock transformers loads, completely or not at all.

The folder is made under another name beside its place and renamed when every byte is on the disk.
"""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.checkpoints.byte_progress import Meter
from search.checkpoints.fingerprint import combine_hashes
from search.checkpoints.header import ITEM_BYTES, is_floating
from search.checkpoints.reading import INDEX, Checkpoint, open_checkpoint
from search.checkpoints.shard_writer import SHARD_BYTES, Planned, Written, entries, write_file, write_weights
from search.checkpoints.staging import move_into_place, staging_folder, sync_folder
from search.checkpoints.tensor_bytes import TORCH_NAMES
from search.errors import MeiosisError, UserError, nearest

if TYPE_CHECKING:
    from torch import Tensor

Files = Mapping[str, str | bytes]
"""Plain file name -> content."""

MARKER = "meiosis.json"
"""Tells a folder that we wrote, and may therefore replace when asked to."""

COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "*preprocessor_config.json",
    "*processor_config.json",
    "spiece.model",
    "sentencepiece*.model",
    "source.spm",
    "target.spm",
    "normalizer.json",
    "bpe.codes",
    "*.tiktoken",
)
"""What stock transformers reads beside weights and config: tokenizers, templates, processors."""

COMPANION_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".spm", ".codes", ".tiktoken")
"""So that a `tokenizer.py` or `vocab.pt` never comes along: no code, no pickle."""


def write_checkpoint(
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    donor: Checkpoint,
    out: Path,
    *,
    layout: Sequence[Planned] | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    extra_files: Files | Callable[[], Files] | None = None,
    config_changes: Mapping[str, Any] | None = None,
    without: Collection[str] = (),
    dtype: str | None = None,
    finite: bool = False,
    overwrite: bool = False,
    verify: Callable[[Path], None] = lambda _: None,
    meter: Meter | None = None,
) -> Path:
    """Write a model folder.

    Args:
        tensors: by name, in the order in which they fill the shards. An iterable is read as it is
            written; a tensor that it gave must not change afterwards.
        donor: gives config, tokenizer and the other files that a model needs to load.
        layout: for an iterable, what it will give, in order. With it at most four tensors are in memory at
            a time, without it a shard.
        max_shard_bytes: tensors of more than this in all are split over files with an index.
        extra_files: plain file name -> content, such as the recipe and the model card; a function is called
            when the tensors are written.
        config_changes: keys of `config.json` that get other values than the donor's; None takes a key out.
        without: files of the donor that do not go with this model, such as those of another tokenizer.
        dtype: dtype of all floating-point tensors, as in torch (`bfloat16`) or safetensors (`BF16`);
            by default each keeps its own.
        finite: whether tensors with NaN or infinity are refused.
        verify: called with the finished folder before it gets its name; what it raises leaves nothing behind.
        overwrite: whether `out` may be a folder that this function wrote before; it is replaced.
        meter: told how far the tensors are.

    Returns:
        The absolute path of the folder.

    Raises:
        UserError: `out` is taken or cannot be written to; `dtype` is unknown, or too narrow for a value; a
            tensor is not finite where it must be.
        MeiosisError: the disk is full or fails. Nothing is left behind then.
        ValueError: a tensor comes twice or in a dtype that safetensors lacks, or the layout is wrong; an extra
            file has a bad name.
    """
    out = Path(out).resolve()
    if not callable(extra_files):
        _check_names(extra_files or {})
    target = None if dtype is None else _dtype(dtype)
    check_target(out, overwrite)
    if isinstance(tensors, Mapping):
        layout = [entry.planned for entry in entries(tensors, target)]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        check_space(out, _expected_bytes(layout, donor, target))
        with staging_folder(out) as staging:
            if meter is not None and layout is not None:
                meter.start(len(layout), sum(planned.nbytes for planned in layout))
            written = write_weights(
                entries(tensors, target), staging, max_shard_bytes, layout=layout, finite=finite, meter=meter
            )
            files = extra_files() if callable(extra_files) else extra_files or {}
            _check_names(files)
            _write_companions(donor, staging, written, {*files, *without}, config_changes or {})
            for name, content in files.items():
                write_file(staging / name, [content.encode() if isinstance(content, str) else content])
            marker = {"meiosis": 1, "weights_sha256": combine_hashes(written), "tensors": len(written)}
            write_file(staging / MARKER, [json.dumps(marker, indent=2).encode()])
            sync_folder(staging)
            open_checkpoint(staging)  # what we refuse to read we do not hand out
            verify(staging)
            check_target(out, overwrite)  # it may have come meanwhile
            move_into_place(staging, out)
    except OSError as error:
        raise _cannot_write(out, error) from error
    return out


def written_sha256(folder: Path) -> str:
    """The content hash that the writer of a folder took of the bytes as it wrote them."""
    return str(json.loads((folder / MARKER).read_bytes())["weights_sha256"])


def _check_names(files: Collection[str]) -> None:
    for name in files:
        plain = name == Path(name).name and name not in ("", ".", "..")
        if not plain or name.endswith(".safetensors") or name in (INDEX, MARKER, "config.json"):
            raise ValueError(f"extra file {name!r}: expected a plain file name that is not part of the model")


def _dtype(name: str) -> str:
    """The safetensors name of a floating-point dtype that was named in either way."""
    floats = {theirs: ours for ours, theirs in TORCH_NAMES.items() if is_floating(ours)}
    found = name if name in floats.values() else floats.get(name)
    if found is None:
        raise UserError(f"unknown dtype '{name}' for the weights{nearest(name, floats)}")
    return found


def check_target(out: Path, overwrite: bool) -> None:
    """Raise `UserError` if a model cannot be written to `out`, because something is there."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: is a file, expected a folder to write the model to; choose another name")
    if not any(out.iterdir()):
        return
    ours = (out / MARKER).is_file()
    if not overwrite:
        way_out = (
            "choose a new folder, or give --overwrite to replace the model in it" if ours else "choose a new folder"
        )
        raise UserError(f"{out}: is not empty, and nothing is overwritten; {way_out}")
    if not ours:
        raise UserError(
            f"{out}: is not empty and not a model that Meiosis wrote (no {MARKER}), which is all that --overwrite "
            "replaces; choose a new folder"
        )


def check_not_a_source(out: Path, sources: Mapping[str, Checkpoint]) -> None:
    """Raise `UserError` if `out` is one of the models that are merged, or lies in the folder of one.

    The recipe beside the output would name the output, and could not be carried out again.
    """
    for name, source in sources.items():
        if source.folder.resolve() == Path(out).resolve():
            raise UserError(f"{out}: is the model '{name}' of this merge; choose another folder for the output")
        if source.folder.resolve() in Path(out).resolve().parents:
            raise UserError(
                f"{out}: lies in the folder of the model '{name}' of this merge; choose a folder outside of it"
            )


def _expected_bytes(layout: Sequence[Planned] | None, donor: Checkpoint, target: str | None) -> int:
    """Bytes of the weights; those of the donor where the tensors are not known yet."""
    if layout is not None:
        return sum(planned.nbytes for planned in layout)
    return sum(
        info.nbytes // ITEM_BYTES[info.dtype] * ITEM_BYTES[target if target and info.floating else info.dtype]
        for info in donor.tensors.values()
    )


def check_space(out: Path, needed: int) -> None:
    """Raise `MeiosisError` if the disk of `out` has not so many bytes left."""
    there = next(folder for folder in out.parents if folder.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise MeiosisError(
            f"{out}: the model takes {needed / 2**20:.1f} MiB, the disk has {free / 2**20:.1f} MiB left; "
            "free some space or choose another disk"
        )


def _cannot_write(out: Path, error: OSError) -> MeiosisError:
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return MeiosisError(
            f"{out}: the disk is full or a quota is used up ({error.strerror}); nothing was left behind; "
            "free some space or choose another disk"
        )
    if error.errno in (
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOTDIR,
        errno.EEXIST,
        errno.ENAMETOOLONG,
    ):
        return UserError(f"{out}: cannot be written: {error.strerror}{where}; choose a folder of yours")
    return MeiosisError(f"{out}: cannot be written: {error.strerror or error}{where}; nothing was left behind")


def _write_companions(
    donor: Checkpoint, folder: Path, written: Written, others: Collection[str], changes: Mapping[str, Any]
) -> None:
    """The config, with the dtype that the weights now have, and what else the donor needs but `others`."""
    theirs = _main_float((info.dtype, info.shape) for info in donor.tensors.values())
    ours = _main_float((dtype, shape) for _, dtype, shape, _ in written)
    config = (donor.folder / "config.json").read_bytes()
    other_dtype = ours is not None and ours != theirs
    if changes or other_dtype:
        changed = {**donor.config, **changes}
        changed = {key: value for key, value in changed.items() if value is not None or key not in changes}
        if ours is not None and other_dtype:
            changed = _with_dtype(changed, TORCH_NAMES[ours])
            if not {"dtype", "torch_dtype"} & changed.keys():
                changed["dtype"] = TORCH_NAMES[ours]
        config = json.dumps(changed, indent=2).encode()
    write_file(folder / "config.json", [config])
    for path in sorted([*donor.folder.iterdir(), *donor.folder.glob("additional_chat_templates/*")]):
        name = path.relative_to(donor.folder).as_posix()
        wanted = name not in others and name.endswith(COMPANION_SUFFIXES)
        if wanted and path.is_file() and any(fnmatchcase(name, pattern) for pattern in COMPANIONS):
            (folder / name).parent.mkdir(exist_ok=True)
            write_file(folder / name, [path.read_bytes()])


def _main_float(tensors: Iterable[tuple[str, tuple[int, ...]]]) -> str | None:
    """The floating-point dtype of most elements."""
    counts: Counter[str] = Counter()
    for dtype, shape in tensors:
        if is_floating(dtype):
            counts[dtype] += math.prod(shape)
    return max(counts, key=lambda dtype: (counts[dtype], dtype), default=None)


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config with every `dtype` in it set, those of nested text and vision configs included."""
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and value in (None, *TORCH_NAMES.values()):
            changed[key] = dtype
        else:
            changed[key] = _with_dtype(value, dtype) if isinstance(value, dict) else value
    return changed
