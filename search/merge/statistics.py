"""Statistics of a model, for operators that need to know more of it than its weights.

`meiosis statistics` writes them as one safetensors file per model, which `models.NAME.statistics` of a recipe
names. Its tensors are called after those of the checkpoint:

    fisher/TENSOR      of the tensor's shape: the mean over the items of the squared gradient of the item's
                       log-likelihood, the labels being those of the data (empirical diagonal Fisher information).
    gram/TENSOR        (inputs, inputs) for the matrix of a linear layer: the mean over all tokens of x x^T, x being
                       the input of the layer.
    gram_axis/TENSOR   (): which axis of that matrix the inputs are: 1 for `nn.Linear`, 0 for the Conv1D of GPT-2.

All are float32 but the axis (int64). A tensor that a kind says nothing of is left out.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.errors import CheckpointError, MeiosisError, RecipeError, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from search.merge.operator import Inputs
    from search.recipe import Recipe

KINDS = ("fisher", "gram", "gram_axis")
"""What tensors are called in front. `Operator.statistics` asks for `fisher` or `gram`."""

FORMAT = "meiosis_statistics"
"""Key of the metadata that marks our files; its value is the version."""


class Statistics:
    """The statistics of one model, mapped from their file (a `TensorSource`).

    Attributes:
        kinds: what was collected.
        model_sha256: content hash of the weights they were collected from.
        sha256: hash of the statistics themselves, which stands for them wherever results are kept.
    """

    def __init__(self, path: Path, names: Sequence[str], metadata: Mapping[str, str]) -> None:
        self.path, self.names = path, tuple(names)
        self.kinds = tuple(metadata["kinds"].split(","))
        self.model_sha256, self.sha256 = metadata["model_sha256"], metadata["sha256"]

    def get(self, name: str) -> Tensor:
        """A tensor, mapped; the file is not opened before, so that to check a recipe takes no torch."""
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    @cached_property
    def _file(self) -> Any:
        import safetensors

        try:
            return safetensors.safe_open(str(self.path), framework="pt")
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{self.path}: cannot be mapped ({error}); make the statistics again") from error


def open_statistics(
    path: Path, *, model: str, model_sha256: str | None = None, kinds: Collection[str] = ()
) -> Statistics:
    """The statistics in a file.

    Args:
        model: what the recipe calls the model, for messages.
        model_sha256: content hash of the model's weights; None if it is not known.
        kinds: what operators need to be in the file.

    Raises:
        CheckpointError: no such file, a damaged one, or one that `meiosis statistics` did not write.
        RecipeError: statistics of another model, or of another kind.
    """
    where = f"models.{model}.statistics"
    if not path.is_file():
        raise CheckpointError(
            f"{where}: {path}: no such file; make it with `meiosis statistics MODEL --data ITEMS {path.name}`"
        )
    from search.checkpoints.header import read_header

    names = list(read_header(path))
    metadata = _metadata(path)
    if metadata.get(FORMAT) != "1" or not {"kinds", "model_sha256", "sha256"} <= metadata.keys():
        raise CheckpointError(f"{where}: {path}: was not written by `meiosis statistics`; name a file that was")
    found = Statistics(path, names, metadata)
    missing = sorted(set(kinds) - set(found.kinds))
    if missing:
        raise RecipeError(
            f"{where}: {path}: holds {' and '.join(found.kinds)} statistics, expected {missing[0]}; make it again "
            f"with --kind {missing[0]}"
        )
    if model_sha256 is not None and found.model_sha256 != model_sha256:
        raise RecipeError(
            f"{where}: {path}: was made from the weights {found.model_sha256[:12]}, those of '{model}' are "
            f"{model_sha256[:12]}; make it again from this model"
        )
    return found


def kinds_needed(recipe: Recipe) -> dict[str, set[str]]:
    """Model name -> kinds of statistics that the operators of the recipe's rules want of it."""
    from search.registry import OPERATORS

    needed: dict[str, set[str]] = {}
    for rule in recipe.rules:
        kind = OPERATORS.get(rule.operator).statistics
        for source in rule.sources if kind is not None else ():
            needed.setdefault(source, set()).add(kind or "")
    return needed


def with_statistics_from(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with absolute paths of statistics; relative ones start at `folder`."""
    models = {
        name: ref
        if ref.statistics is None
        else ref.model_copy(update={"statistics": str((folder / Path(ref.statistics).expanduser()).resolve())})
        for name, ref in recipe.models.items()
    }
    return recipe.model_copy(update={"models": models})


def identities(statistics: Mapping[str, object]) -> dict[str, str]:
    """What `Merger` knows statistics by, so that what it prepares from them is not taken for that from others."""
    return {f"{name}.statistics": found.sha256 for name, found in statistics.items() if isinstance(found, Statistics)}


def statistic_of(inputs: Inputs, kind: str, index: int, shape: tuple[int, ...]) -> Tensor | None:
    """One statistic of the tensor, None if there is none.

    Raises:
        RecipeError: it has another shape than `shape`, as where layers or tokens were changed on the way.
    """
    found = inputs.statistics(kind, index)
    if found is not None and tuple(found.shape) != shape:
        raise RecipeError(
            f"tensor '{inputs.name}': the {kind} statistics of '{inputs.models[index]}' have shape "
            f"{list(found.shape)}, expected {list(shape)}; collect them from the model as it is merged"
        )
    return found


def gram_of(inputs: Inputs, index: int) -> tuple[Tensor, int] | None:
    """The Gram matrix of one source and the axis of its inputs; None where there is none."""
    axis = inputs.statistics("gram_axis", index)
    if axis is None or len(inputs.shape) != 2:
        return None
    size = inputs.shape[int(axis)]
    gram = statistic_of(inputs, "gram", index, (size, size))
    return None if gram is None else (gram, int(axis))


def _metadata(path: Path) -> dict[str, Any]:
    """What stands in a file's header beside the tensors."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        found = json.loads(file.read(length)).get("__metadata__")
    return dict(found) if isinstance(found, dict) else {}


def check_target(path: Path, overwrite: bool) -> None:
    """Raise `UserError` unless statistics can be written to `path`."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder, expected the name of a file to write")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it, or choose another file")
    if not path.exists():
        return
    if not overwrite:
        raise UserError(f"{path}: exists, and nothing is overwritten; choose a new file, or give --overwrite")
    if FORMAT not in _metadata_or_nothing(path):
        raise UserError(f"{path}: exists and is no file of statistics; choose a new file")


def write_statistics(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write a file of statistics, whole or not at all; returns the hash that stands for its content.

    Raises:
        MeiosisError: the disk is full or fails, or the folder cannot be written to.
    """
    from search.checkpoints.fingerprint import hash_tensors
    from search.checkpoints.tensor_bytes import dtype_name, tensor_bytes

    sha256 = hash_tensors(tensors)
    header: dict[str, Any] = {"__metadata__": {**metadata, "sha256": sha256}}
    end = 0
    # Wide types first, so that every tensor is aligned to its elements.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    for name, tensor in ordered:
        nbytes = tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {"dtype": dtype_name(tensor), "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, tensor in ordered:
                file.write(tensor_bytes(tensor))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise MeiosisError(f"{path}: cannot be written: {error.strerror or error}; nothing was left behind") from error
    finally:
        temporary.unlink(missing_ok=True)
    return sha256


def _metadata_or_nothing(path: Path) -> dict[str, Any]:
    try:
        return _metadata(path)
    except (OSError, ValueError, AttributeError, OverflowError, MemoryError):
        return {}
