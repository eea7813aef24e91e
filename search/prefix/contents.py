"""What a candidate's layers are made of, so that two candidates can be seen to begin alike.

The content of a tensor is decided by its rule: operator, sources, parameters, seed and dtype, beside the models of the
run. So nothing is read to find out how far two candidates agree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Place = int | Literal["before", "after"]
"""Of a tensor in the forward pass: the number of a layer, or before or after the layers."""

DIGEST_BYTES = 16


@dataclass(frozen=True)
class Contents:
    """Digests of what decides the bits of a model up to the last of its layers.

    Attributes:
        before: of all that is used before the first layer, or of which it is not known where.
        layers: of every layer, in the order in which they run.
    """

    before: bytes
    layers: tuple[bytes, ...]

    def chain(self) -> tuple[bytes, ...]:
        """(n_layers + 1,) signatures: number k is equal for two models whose states entering layer k are.

        That of the number of layers belongs to what leaves the last of them.
        """
        signatures = [self.before]
        for layer in self.layers:
            signatures.append(digest(signatures[-1], layer))
        return tuple(signatures)


def digest(*parts: object) -> bytes:
    """16 bytes that stand for plain values: text, numbers, bytes, None, and tuples of them, told apart by type."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=DIGEST_BYTES).digest()


def contents_of(fingerprints: Mapping[str, object], places: Mapping[str, Place], layers: int) -> Contents:
    """The contents of a merged model.

    Args:
        fingerprints: tensor -> what it is made by, see `Merger.fingerprints`.
        places: tensor -> where it is used; those that are left out count as used before the layers.
        layers: how many there are.
    """
    known: dict[int, bytes] = {}
    parts: list[list[object]] = [[] for _ in range(layers + 1)]
    for name, fingerprint in sorted(fingerprints.items()):
        place = places.get(name, "before")
        if place == "after":
            continue
        if (made_by := known.get(id(fingerprint))) is None:  # one object for all tensors of a rule
            made_by = known[id(fingerprint)] = digest(plain(fingerprint))
        parts[0 if place == "before" else place + 1] += (name, made_by)
    before, *rest = (digest(*part) for part in parts)
    return Contents(before, tuple(rest))


def plain(value: object) -> object:
    """A fingerprint as `digest` takes it: types of torch as text; everything else as it is."""
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    return value if isinstance(value, str | bytes | bool | int | float) or value is None else str(value)
