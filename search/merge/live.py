"""The live model of a worker: an ordinary transformers model whose weights are merged in place.

transformers renames weights when it loads some families and fuses those of others (the experts of a
mixture become one parameter), so a checkpoint's tensor may be a live parameter under another name, or
a view into one. Nothing here knows any architecture: transformers' own conversion, run backwards over
tensors without data, tells which part of which parameter each checkpoint tensor is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from search.errors import CheckpointError, nearest
from search.merge.sources import TensorSource


class _Place(NamedTuple):
    """A checkpoint tensor as a view into a live one."""

    owner: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class LiveModel:
    """A model to evaluate, and where each tensor of its checkpoint lives in it.

    Attributes:
        model: in eval mode, without gradients.
        unexpected: tensors of the folder that the class has no use for, as transformers reports them.
    """

    def __init__(self, model: torch.nn.Module, unexpected: Iterable[str] = ()) -> None:
        self.model = model
        self.unexpected = frozenset(unexpected)
        self._live: dict[str, Tensor] = {name: t.detach() for name, t in model.state_dict().items()}
        self._places, self._copied = _find_places(model, self._live)
        self._prefix = f"{prefix}." if (prefix := getattr(model, "base_model_prefix", "")) else ""
        patterns = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
        # The two buffers that every class of transformers passes over, whatever its own patterns say.
        patterns |= {r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"}
        self._ignored = re.compile("|".join(f"({pattern})" for pattern in sorted(patterns)))

    def targets(self, names: Iterable[str], *, tied: bool = False) -> dict[str, Tensor]:
        """Checkpoint tensor -> the live tensor, or the view into one, that holds it.

        Writing into the values writes the model. Tensors that the class does not use are left out, and
        of names that share memory (tied weights) all but the one that the model lists first.

        Args:
            names: all tensor names of the checkpoint.
            tied: whether names that share memory with another are given too.

        Raises:
            CheckpointError: a tensor has no place that can be written, or a part of the model would keep
                weights that no tensor of the checkpoint gives.
        """
        placed: dict[str, _Place] = {}
        for name in names:
            place = self._find(name)
            if place is not None:
                placed[name] = place
            elif name not in self.unexpected and not self._ignored.search(name):
                raise CheckpointError(
                    f"tensor '{name}' has no place in the live {type(self.model).__name__}, because "
                    "transformers rearranges it on loading; this architecture cannot be merged in place yet"
                )
        order = {owner: index for index, owner in enumerate(self._live)}
        targets: dict[str, Tensor] = {}
        shared: dict[str, Tensor] = {}
        memory: dict[tuple[object, ...], str] = {}
        for name, place in sorted(placed.items(), key=lambda item: order[item[1].owner]):
            owner = self._live[place.owner]
            view = owner.as_strided(place.shape, place.stride, owner.storage_offset() + place.offset)
            if memory.setdefault((view.data_ptr(), place.shape, place.stride), name) == name or not view.numel():
                targets[name] = view
            elif tied:
                shared[name] = view
        self._check_coverage({name: placed[name] for name in targets})
        targets |= shared
        return {name: targets[name] for name in placed if name in targets}

    def check_holds(self, source: TensorSource) -> None:
        """Raise `CheckpointError` unless the live tensors hold just the tensors of `source`, rounded to
        their dtype: right after loading, proof that every tensor was found where it lives."""
        for name, target in self.targets(source.names).items():
            if not torch.equal(source.get(name).to(target.device, target.dtype), target):
                raise CheckpointError(
                    f"tensor '{name}' was loaded into the live {type(self.model).__name__} with other values "
                    "than the checkpoint has; this architecture cannot be merged in place yet"
                )

    def _find(self, name: str) -> _Place | None:
        """Where a tensor lives: under its own name, or with the base model's prefix put on or taken off."""
        variants = [name, f"{self._prefix}{name}"]
        if self._prefix and name.startswith(self._prefix):
            variants.append(name.removeprefix(self._prefix))
        for variant in variants:
            if variant in self._places:
                return self._places[variant]
            if variant in self._live and variant not in self._copied:
                live = self._live[variant]
                return _Place(variant, tuple(live.shape), live.stride(), 0)
        return None

    def _check_coverage(self, places: Mapping[str, _Place]) -> None:
        """Every element of the model must come from the checkpoint."""
        covered: dict[int, int] = {}
        for place in places.values():
            memory = self._live[place.owner].data_ptr()
            covered[memory] = covered.get(memory, 0) + math.prod(place.shape)
        for name, live in self._live.items():
            if live.numel() and covered.get(live.data_ptr(), 0) < live.numel():
                raise CheckpointError(
                    f"the checkpoint has no tensor for '{name}' of {type(self.model).__name__}: after a "
                    "merge it would keep other weights; save the model again with this transformers"
                )


class Instead(NamedTuple):
    """What a model is made of where it is not what the files of its folder hold.

    Attributes:
        source: its tensors.
        config: keys of its config with other values; None takes a key out.
    """

    source: TensorSource
    config: Mapping[str, Any]


def build_live_model(
    folder: Path,
    *,
    device: str | torch.device,
    dtype: str | None,
    instead: Instead | None = None,
    lay_out: Callable[[torch.nn.Module], None] | None = None,
) -> LiveModel:
    """Load a checkpoint folder with the transformers class that its config names first.

    Args:
        device: where the model lives.
        dtype: of all its floating point weights; None for that of the checkpoint.
        instead: tensors and keys of the config that take the place of those in the folder.
        lay_out: moves the model from `device` to several others.

    Raises:
        CheckpointError: no config, a class that transformers does not have (code that comes with a
            model is never run) or for which a library is missing, or weights that do not fit the class.
    """
    import transformers

    model_class = model_class_of(folder)
    wanted: Any = "auto" if dtype is None else getattr(torch, dtype)
    with _quiet(transformers.utils.logging):
        try:
            model, report = model_class.from_pretrained(
                folder if instead is None else None,
                dtype=wanted,
                **({} if instead is None else _made_of(model_class, folder, instead, dtype)),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
        except ImportError as error:
            raise _needs_library(folder, model_class.__name__, error) from error
        except (RuntimeError, ValueError, OSError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder}: {model_class.__name__} cannot load it: {_first_line(error)}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder}: has no weights for '{missing[0]}'{_others(missing)} of {model_class.__name__}, which "
            "would be random numbers; name the class that was trained under 'architectures' in config.json"
        )
    model.requires_grad_(False)
    model = model.to(device).eval()
    if lay_out is not None:
        lay_out(model)
    return LiveModel(model, report["unexpected_keys"])


def _made_of(model_class: Any, folder: Path, instead: Instead, dtype: str | None) -> dict[str, Any]:
    """What `from_pretrained` takes in place of a folder. Tensors are copied: those of files must not be written."""
    config = json.loads((folder / "config.json").read_text()) | dict(instead.config)
    config = {key: value for key, value in config.items() if value is not None or key not in instead.config}
    wanted = None if dtype is None else getattr(torch, dtype)
    state = {}
    for name in instead.source.names:
        tensor = instead.source.get(name)
        state[name] = tensor.to(wanted if tensor.is_floating_point() else None, copy=True)
    return {"config": model_class.config_class.from_dict(config), "state_dict": state}


def _needs_library(place: Path, name: str, error: ImportError) -> CheckpointError:
    reason = _first_line(error).partition(". ")[0].rstrip(".")  # how to install it goes on for several lines
    return CheckpointError(
        f"{place}: {name} needs a library that is not installed here: {reason}; install it, "
        "or use a model that transformers loads by itself"
    )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _others(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def model_class_of(folder: Path) -> Any:
    """The class of transformers that the config of a checkpoint folder names first, imported.

    Raises:
        CheckpointError: see `build_live_model`.
    """
    import transformers

    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error
    architectures = config.get("architectures") if isinstance(config, dict) else None
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise CheckpointError(
            f"{path}: names no class under 'architectures', expected one such as ['LlamaForCausalLM']"
        )
    name = architectures[0]
    try:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and getattr(found, "is_dummy", False):
            found()  # stands for a class whose libraries are missing, and says which when it is used
    except ImportError as error:
        raise _needs_library(path, name, error) from error
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    if "auto_map" in config:
        raise CheckpointError(
            f"{path}: '{name}' is code that comes with the model, which is never run; use a model whose "
            f"class is part of transformers (here {transformers.__version__})"
        )
    classes = [entry for entry in dir(transformers) if re.search(r"(Model|For\w+)$", entry)]
    hint = nearest(name, classes)
    raise CheckpointError(
        f"{path}: transformers {transformers.__version__} has no model class '{name}'"
        f"{hint if 'did you mean' in hint else '; is a newer transformers needed?'}"
    )


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Loading tells nothing that the report does not, and a worker's output belongs to the run."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


class _Views(TorchFunctionMode):  # type: ignore[misc]  # torch is untyped here
    """Copies that only change the layout in memory become the tensor itself."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.contiguous, Tensor.clone, torch.clone):
            return args[0]
        return func(*args, **(kwargs or {}))


def _find_places(model: torch.nn.Module, live: Mapping[str, Tensor]) -> tuple[dict[str, _Place], set[str]]:
    """Checkpoint name -> place, for all that transformers' conversion only renames, splits or turns, and
    the names of the tensors that it computes.

    The conversion that `save_pretrained` runs is applied to tensors on the meta device, which have
    shapes, strides and an owner, but no data; a result that still belongs to the storage of one of
    them is a view into it.
    """
    from transformers.core_model_loading import revert_weight_conversion

    empty = {name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for name, t in live.items()}
    owners = {tensor.untyped_storage()._cdata: name for name, tensor in empty.items()}
    try:
        with _Views():
            reverted = revert_weight_conversion(model, dict(empty))
    except (RuntimeError, ValueError, NotImplementedError):
        # A step that needs its input contiguous: what it makes is a copy, found to be none of ours below.
        reverted = revert_weight_conversion(model, dict(empty))
    places: dict[str, _Place] = {}
    copied: set[str] = set()
    for name, tensor in reverted.items():
        owner = owners.get(tensor.untyped_storage()._cdata)
        if owner is None:
            copied.add(name)
        else:
            places[name] = _Place(owner, tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
    return places, copied
