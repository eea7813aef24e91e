"""How images come into a model, and what comes out: preprocessing, pooled features, heads from files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from evaluators.errors import UserError
from evaluators.image_files import Image

if TYPE_CHECKING:
    import torch

Pooling = Literal["auto", "pooler", "cls", "mean"]

BACKBONES = ("ViTModel", "DeiTModel", "BeitModel", "Dinov2Model", "ResNetModel", "ConvNextModel", "SwinModel")
"""Architectures whose features a head from a file can be applied to."""

_SHOWN = 8


@dataclass(frozen=True)
class Head:
    """A linear layer: `weight` (classes, features), `bias` (classes,)."""

    path: Path
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]

    @property
    def classes(self) -> int:
        return len(self.weight)


def read_head(path: Path) -> Head:
    """The head in a safetensors file with tensors `weight` and, if it has one, `bias`; needs no torch.

    Raises:
        UserError: not such a file, or shapes that do not fit.
    """
    import safetensors
    from safetensors.numpy import load_file

    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a .safetensors file with 'weight' (classes, features)")
    try:
        tensors = load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path}: not a readable safetensors file with float32 or float16 tensors ({reason})"
        ) from error
    unknown = sorted(set(tensors) - {"weight", "bias"})
    if unknown or "weight" not in tensors:
        raise UserError(f"{path}: holds {', '.join(sorted(tensors)) or 'nothing'}; expected 'weight' and maybe 'bias'")
    weight = tensors["weight"].astype(np.float32)
    if weight.ndim != 2 or len(weight) < 2:
        raise UserError(
            f"{path}: 'weight' has shape {weight.shape}, expected (classes, features) with 2 classes or more"
        )
    bias = tensors.get("bias", np.zeros(len(weight))).astype(np.float32)
    if bias.shape != (len(weight),):
        raise UserError(
            f"{path}: 'bias' has shape {bias.shape}, expected {(len(weight),)}, as many as 'weight' has rows"
        )
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise UserError(f"{path}: the head has values that are not finite")
    return Head(path, weight, bias)


def head_sha256(path: Path) -> str:
    """Hash of the file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def applied_head(model: torch.nn.Module, pixels: torch.Tensor, head: Head, pooling: Pooling) -> torch.Tensor:
    """Logits (n, classes) of a head on the pooled features of a backbone, both in float32."""
    import torch

    features = pooled(model(pixel_values=pixels), pooling).float()
    if features.shape[1] != head.weight.shape[1]:
        raise UserError(
            f"{head.path}: 'weight' takes {head.weight.shape[1]} features, the model gives {features.shape[1]}; is it "
            "the head of this backbone, with this 'pool'?"
        )
    weight, bias = (torch.from_numpy(array).to(features.device) for array in (head.weight, head.bias))
    return torch.nn.functional.linear(features, weight, bias)


def pooled(output: Any, pooling: Pooling) -> torch.Tensor:
    """One vector for every image, (n, features).

    `auto` is the output of the pooler where the model has one, else the first token. `mean` is over the tokens
    that stand for patches: all but the first of (n, tokens, features), all places of (n, features, height, width).
    """
    import torch

    pooler = getattr(output, "pooler_output", None)
    if pooling == "pooler" or (pooling == "auto" and pooler is not None):
        if pooler is None:
            raise UserError("pool: the model has no pooler; choose cls or mean")
        return torch.as_tensor(pooler).flatten(1)
    hidden = torch.as_tensor(output.last_hidden_state)
    if hidden.ndim == 4:
        if pooling == "cls":
            raise UserError("pool: the model has no first token to stand for the image; choose pooler or mean")
        return hidden.mean((2, 3))
    return hidden[:, 0] if pooling in ("auto", "cls") else hidden[:, 1:].mean(1)


@dataclass(frozen=True)
class Preprocessing:
    """What is done to images, in this order: channels, size, values from 0 to 1, (value - mean) / std.

    Attributes:
        size: height and width.
        mean, std: one value per channel.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def resized(self, images: Sequence[Image]) -> NDArray[np.uint8]:
        """(n, channels, height, width): gray made into colours or the other way round, bilinear with antialiasing."""
        import torch

        done = np.empty((len(images), len(self.mean), *self.size), np.uint8)
        for index, image in enumerate(images):
            channels = _with_channels(image, len(self.mean))
            if channels.shape[:2] != self.size:
                values = torch.from_numpy(np.ascontiguousarray(channels)).permute(2, 0, 1)[None].float()
                values = torch.nn.functional.interpolate(
                    values, self.size, mode="bilinear", antialias=True, align_corners=False
                )
                done[index] = values[0].round().clamp(0, 255).to(torch.uint8).numpy()
            else:
                done[index] = channels.transpose(2, 0, 1)
        return done

    def normalised(self, images: NDArray[np.uint8], device: str, dtype: torch.dtype) -> torch.Tensor:
        """What the model is given, (n, channels, height, width)."""
        import torch

        values = torch.from_numpy(images).to(device).float() / 255
        mean, std = (torch.tensor(given, device=device)[:, None, None] for given in (self.mean, self.std))
        return ((values - mean) / std).to(dtype)


def preprocessing_of(
    folder: Path,
    image_size: int | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    images: Sequence[Image],
) -> Preprocessing:
    """Options first, then `preprocessor_config.json` and `config.json` of a checkpoint folder, then the images.

    Raises:
        UserError: the size is nowhere said and images differ, or mean and std do not fit the model's channels.
    """
    config, processor = _json(folder / "config.json"), _json(folder / "preprocessor_config.json")
    channels = config.get("num_channels", 3)
    if channels not in (1, 3):
        raise UserError(f"{folder}: the model reads {channels} channels; images are given to models of 1 or 3")
    means = _per_channel("mean", mean or processor.get("image_mean") or (0.5,), channels)
    stds = _per_channel("std", std or processor.get("image_std") or (0.5,), channels)
    size = image_size or config.get("image_size") or processor.get("size")
    if isinstance(size, dict):
        size = (size["height"], size["width"]) if "height" in size else size.get("shortest_edge")
    if size is None:
        shapes = sorted({image.shape[:2] for image in images})
        if len(shapes) > 1:
            shown = ", ".join(f"{h}x{w}" for h, w in shapes[:_SHOWN])
            raise UserError(f"images have {len(shapes)} sizes ({shown}) and the model names none; set image_size")
        (size,) = shapes
    height, width = (size, size) if isinstance(size, int) else size
    return Preprocessing((int(height), int(width)), means, stds)


def class_count(folder: Path) -> int:
    """How many classes the head of a checkpoint has, by its config."""
    config = _json(folder / "config.json")
    names = config.get("id2label")
    return len(names) if isinstance(names, dict) else int(config.get("num_labels", 2))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _per_channel(key: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(values) not in (1, channels):
        raise UserError(f"{key}: {len(values)} values, expected 1 or {channels}, as many as the model has channels")
    return tuple(float(value) for value in values) * (channels // len(values))


def _with_channels(image: Image, channels: int) -> Image:
    if image.shape[2] == channels:
        return image
    if channels == 3:
        return np.repeat(image, 3, axis=2)
    # The weights of ITU-R BT.601, as Pillow has them.
    gray = (image.astype(np.uint32) @ np.array([299, 587, 114], np.uint32) + 500) // 1000
    return gray.astype(np.uint8)[..., None]
