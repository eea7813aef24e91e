"""Checkpoint folders in the Hugging Face layout: found, checked, read.

Opening one parses headers only, needs no torch and answers in milliseconds; whatever a header, an
index or a config can show to be wrong is refused here, one line per damage. `CheckpointTensors`
then maps the files: every process of a node shares the same pages.

Beside it, `model_folder` finds the folder, `header` reads a file's header, `compatibility` says what several
checkpoints must have in common, `fingerprint` hashes the contents.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from search.checkpoints.header import (
    HEADER_LIMIT_BYTES,
    RepeatedKeyError,
    TensorInfo,
    cannot_read,
    damage,
    file_size,
    parse_json,
    quoted,
    read_header,
)
from search.checkpoints.model_folder import find_model_folder
from search.errors import CheckpointError, nearest

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Checkpoint",
    "CheckpointTensors",
    "TensorInfo",
    "open_checkpoint",
]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
CONVERT = "convert it once: from_pretrained(...).save_pretrained(folder, safe_serialization=True)"


@dataclass(frozen=True)
class Checkpoint:
    """A model folder, or that of a LoRA adapter, whose files are whole as far as their headers show.

    Attributes:
        folder: absolute path.
        config: content of `config.json`, or of `adapter_config.json`.
        tensors: tensor name -> where it lies, sorted by name, however the folder is sharded.
        kind: what the folder holds.
        base: the model that an adapter is applied to, once that is known.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    kind: Literal["model", "adapter"] = "model"
    base: Checkpoint | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files, sorted by name."""
        return tuple(sorted({tensor.file for tensor in self.tensors.values()}))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def architecture(self) -> str | None:
        """The class that the config names first, such as `LlamaForCausalLM`."""
        names = self.config.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else None


def open_checkpoint(path: str | Path, revision: str | None = None) -> Checkpoint:
    """The checkpoint in a folder, or under a hub id, with everything checked that headers can show.

    Args:
        path: a folder with `config.json` and `model.safetensors` or its sharded form, or with
            `adapter_config.json` and `adapter_model.safetensors`, or an id of the Hugging Face hub, which
            is downloaded (safetensors, JSON and tokenizer files only).
        revision: commit, tag or branch of a hub id.

    Raises:
        CheckpointError: nothing there, not a model, or damaged; one line that names the file.
    """
    folder = find_model_folder(path, revision)
    if (folder / ADAPTER_CONFIG).exists():
        return _open_adapter(folder)
    if not (folder / "config.json").exists():
        inside = sorted(entry.parent.name for entry in folder.glob("*/config.json"))
        hint = f"did you mean {folder / inside[-1]}?" if inside else "give the folder that save_pretrained wrote"
        raise CheckpointError(f"{folder}: has no config.json, so it is no model folder; {hint}")
    config = _read_object(folder / "config.json", json.loads)
    if (folder / WEIGHTS).exists():
        tensors = read_header(folder / WEIGHTS)
    elif (folder / INDEX).exists():
        tensors = _read_shards(folder)
    else:
        raise _no_weights(folder)
    if not tensors:
        raise CheckpointError(f"{folder}: its weights hold no tensor at all; save the model again")
    return Checkpoint(folder, config, tensors)


def _open_adapter(folder: Path) -> Checkpoint:
    """The adapter in a folder. Trainers put the config of its base beside it, but not its weights."""
    weights = next((name for name in (WEIGHTS, INDEX) if (folder / name).exists()), None)
    if weights is not None:
        raise CheckpointError(
            f"{folder}: has both {ADAPTER_CONFIG} and {weights}, so it could be an adapter or a model; "
            "put each into a folder of its own"
        )
    config = _read_object(folder / ADAPTER_CONFIG, json.loads)
    if not isinstance(config.get("peft_type"), str):
        raise damage(
            folder / ADAPTER_CONFIG, "names no peft_type, expected one such as 'LORA'", "save the adapter again"
        )
    if not (folder / ADAPTER_WEIGHTS).exists():
        pickles = sorted(entry.name for entry in folder.glob("adapter_model.*"))
        found = f"only {pickles[0]}, and pickle is never loaded" if pickles else f"no {ADAPTER_WEIGHTS}"
        raise CheckpointError(
            f"{folder}: is an adapter with {found}; save it again with save_pretrained(folder, safe_serialization=True)"
        )
    return Checkpoint(folder, config, read_header(folder / ADAPTER_WEIGHTS), kind="adapter")


def _read_object(path: Path, parse: Any) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        size = file_size(path)
        if size > HEADER_LIMIT_BYTES:
            raise damage(path, f"has {size} bytes, expected at most {HEADER_LIMIT_BYTES}")
        content = parse(path.read_bytes())
    except OSError as error:
        raise cannot_read(path, error) from error
    except RepeatedKeyError as error:
        raise damage(path, f"has {quoted(error.args[0])} twice, expected every name once") from error
    except (ValueError, RecursionError) as error:
        raise damage(path, f"is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise damage(path, f"holds a JSON {type(content).__name__}, expected an object")
    return content


def _read_shards(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of a sharded checkpoint: the index and the shards must tell the same story."""
    index = folder / INDEX
    weight_map = _read_object(index, parse_json).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise damage(index, "has no weight_map from tensor names to file names")
    headers: dict[str, dict[str, TensorInfo]] = {}
    for shard in sorted(set(weight_map.values())):
        if shard != Path(shard).name or shard in (".", "..") or "\\" in shard or "\0" in shard:
            found = f"names {quoted(shard)}, which may lie outside the folder; expected a plain file name"
            raise damage(index, found, "do not use this checkpoint unless you trust where it comes from")
        if not shard.endswith(".safetensors"):
            raise damage(index, f"names {quoted(shard)}, expected a .safetensors file", CONVERT)
        if not (folder / shard).exists():
            raise damage(folder / shard, f"is missing, {INDEX} names it", "copy or download the shard")
        headers[shard] = read_header(folder / shard)
    for name, count in Counter(name for header in headers.values() for name in header).items():
        if count > 1:
            shards = " and ".join(shard for shard, header in headers.items() if name in header)
            found = f"tensor {quoted(name)} is in several shards: {shards}"
            raise damage(index, f"{found}; expected it once", "save the model again")
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise damage(folder / shard, f"has no tensor {quoted(name)}, though {INDEX} puts it there")
    for shard, header in headers.items():
        for name in header:
            if name not in weight_map:
                found = f"tensor {quoted(name)} is not in {INDEX}, so stock loaders may ignore it"
                raise damage(folder / shard, found, "save the model again, so that index and shards agree")
    return {name: headers[weight_map[name]][name] for name in sorted(weight_map)}


def _no_weights(folder: Path) -> CheckpointError:
    """Why a model folder has no weights that we read."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        return CheckpointError(
            f"{folder}: has {others[0]}, but neither {WEIGHTS} nor {INDEX}; copy the missing file "
            "or save the model again with save_pretrained"
        )
    if pickles:
        return CheckpointError(f"{folder}: has only {pickles[0]}, and pickle is never loaded; {CONVERT}")
    return CheckpointError(f"{folder}: has a config.json, but neither {WEIGHTS} nor {INDEX}; copy the weights there")


class CheckpointTensors:
    """The tensors of a checkpoint as zero-copy views of its files.

    The files are mapped copy-on-write and stay open: all processes of a node share their pages, and
    one that writes by mistake spoils nobody else's tensors. Still, never write: it costs private
    memory and changes the source of every later merge of this process.

    Raises:
        CheckpointError: a file is gone or was changed since the checkpoint was opened.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._files = {file: _map_file(file) for file in checkpoint.files}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(self.checkpoint.tensors)

    def get(self, name: str) -> Tensor:
        """A read-only view of one tensor, on the CPU, in the dtype of the file.

        Raises:
            CheckpointError: no tensor has this name, or the file was changed under it.
        """
        from safetensors import SafetensorError

        info = self.checkpoint.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{self.checkpoint.folder}: no tensor {quoted(name)}{nearest(name, self.names[:5000])}"
            )
        try:
            tensor = self._files[info.file].get_tensor(name)
        except SafetensorError as error:
            raise damage(info.file, f"tensor {quoted(name)} cannot be read ({error})") from error
        if tuple(tensor.shape) != info.shape:
            raise damage(info.file, "was changed while it was in use", "keep it as it is and start again")
        return tensor

    def close(self) -> None:
        """Let go of the files. Views that were handed out stay valid."""
        self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _map_file(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        try:
            return safe_open(str(path), framework="pt", backend="mmap")
        except TypeError:  # safetensors before 0.8 has no other backend and no such argument
            return safe_open(str(path), framework="pt")
    except RuntimeError as error:  # torch, where the file is larger than the memory
        if "mmap" not in str(error):
            raise
        from search.checkpoints.large_file import LargeFile

        return LargeFile(path)
    except SafetensorError as error:
        raise damage(path, f"cannot be mapped ({error})") from error
    except OSError as error:
        raise damage(path, f"cannot be mapped ({error})", "keep the files in place and start again") from error
