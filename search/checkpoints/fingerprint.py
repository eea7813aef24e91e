"""Content hashes of weights, and whether they are finite: one pass over the bytes, without torch.

The hash goes by tensor, not by file: every tensor's bytes are hashed, then the sorted list of name,
dtype, shape and hash. So a checkpoint that was sharded in another way has the same hash, tensors of
one file are hashed in parallel, and a live model hashes to the same value as its export.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from search.checkpoints.adapter_facts import adapter_facts
from search.checkpoints.byte_progress import Advance, ByteProgress
from search.checkpoints.fingerprint_cache import read_cache, write_cache
from search.checkpoints.header import TensorInfo, cannot_read, damage, quoted, read_header
from search.checkpoints.tensor_bytes import dtype_name, tensor_bytes
from search.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from search.checkpoints.reading import Checkpoint

CHUNK_BYTES = 1 << 18
"""Read at once: the chunk and the masks made of it stay in the cache of a core."""


@dataclass(frozen=True)
class Bits:
    """How non-finite numbers of a dtype look: `bits & mask == pattern`, and infinity among them."""

    kind: str
    mask: int
    pattern: int
    magnitude: int = 0
    infinity: int | None = None


_F32 = Bits("<u4", 0x7F800000, 0x7F800000, 0x7FFFFFFF, 0x7F800000)
NON_FINITE: Mapping[str, Bits] = {
    "F64": Bits("<u8", 0x7FF << 52, 0x7FF << 52, (1 << 63) - 1, 0x7FF << 52),
    "F32": _F32,
    "C64": _F32,
    "BF16": Bits("<u2", 0x7F80, 0x7F80, 0x7FFF, 0x7F80),
    "F16": Bits("<u2", 0x7C00, 0x7C00, 0x7FFF, 0x7C00),
    "F8_E5M2": Bits("u1", 0x7C, 0x7C, 0x7F, 0x7C),
    # The other 8-bit floats have no infinity and one NaN (two with the sign).
    "F8_E4M3": Bits("u1", 0x7F, 0x7F),
    "F8_E4M3FNUZ": Bits("u1", 0xFF, 0x80),
    "F8_E5M2FNUZ": Bits("u1", 0xFF, 0x80),
    "F8_E8M0": Bits("u1", 0xFF, 0xFF),
}
"""Every dtype that can hold a NaN (Micikevicius 2022, https://arxiv.org/abs/2209.05433, for 8 bits)."""


@dataclass(frozen=True)
class Fingerprint:
    """What one pass over a checkpoint's bytes tells.

    Attributes:
        sha256: hash of the contents, 64 hex digits; does not depend on the sharding.
        non_finite: names of the tensors with NaN or infinity, sorted.
        nans, infinities: how many elements.
        where: file of the first of them, for messages.
    """

    sha256: str
    non_finite: tuple[str, ...]
    nans: int = 0
    infinities: int = 0
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class TensorDigest:
    """Hash (empty if it was not asked for) and non-finite elements of one tensor."""

    sha256: str
    nans: int = 0
    infinities: int = 0


def fingerprint(checkpoint: Checkpoint, cache: bool = True, report: Callable[[str], None] | None = None) -> Fingerprint:
    """Hash a checkpoint's tensors and look for NaN and infinity in them.

    An adapter that knows its base hashes to what stands for both.

    Args:
        cache: whether a file with known path, size and times may be taken from the cache of this user
            (`MEIOSIS_CACHE`, by default `~/.cache/meiosis`), and be put there.
        report: called with a line now and then, if there is enough to read that it takes a while.

    Raises:
        CheckpointError: a file cannot be read, or changed since the checkpoint was opened.
    """
    progress = ByteProgress(f"hashing {checkpoint.folder}", checkpoint.nbytes, report)
    known = read_cache() if cache else {}
    digests: dict[str, TensorDigest] = {}
    fresh: dict[str, Any] = {}
    for file in checkpoint.files:
        tensors = [tensor for tensor in checkpoint.tensors.values() if tensor.file == file]
        identity = file_identity(file)
        if read_header(file) != {tensor.name: tensor for tensor in tensors}:
            raise damage(file, "was changed since it was opened", "start again")
        key = str(file.resolve())
        found = digests_from_cache(known.get(key), identity, tensors)
        if found is None:
            found = _digest_file(tensors, progress)
            if file_identity(file) != identity:
                raise damage(file, "was changed while it was read", "wait until it is written")
            fresh[key] = cache_entry(identity, found)
        else:
            progress.advance(sum(tensor.nbytes for tensor in tensors))
        digests |= found
    if cache and fresh:
        write_cache(fresh)
    own = fingerprint_of(checkpoint, digests)
    if checkpoint.base is None:
        return own
    return adapted_fingerprint(own, fingerprint(checkpoint.base, cache, report))


def fingerprint_of(checkpoint: Checkpoint, digests: Mapping[str, TensorDigest]) -> Fingerprint:
    """The fingerprint of a checkpoint from those of all its tensors; of an adapter, that of the adapter alone."""
    bad = [name for name in sorted(digests) if digests[name].nans or digests[name].infinities]
    sha256 = combine_hashes((t.name, t.dtype, t.shape, digests[t.name].sha256) for t in checkpoint.tensors.values())
    if checkpoint.kind == "adapter":
        sha256 = _hash_of(["adapter", adapter_facts(checkpoint.config), sha256])
    return Fingerprint(
        sha256,
        tuple(bad),
        sum(one.nans for one in digests.values()),
        sum(one.infinities for one in digests.values()),
        str(checkpoint.tensors[bad[0]].file) if bad else "",
    )


def adapted_fingerprint(adapter: Fingerprint, base: Fingerprint) -> Fingerprint:
    """What stands for the model that an adapter makes of its base; NaN are told of the adapter alone."""
    return replace(adapter, sha256=_hash_of(["adapted", adapter.sha256, base.sha256]))


def _hash_of(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def refuse_non_finite(name: str, fingerprint: Fingerprint) -> None:
    """Raise `CheckpointError` if the model called `name` holds NaN or infinity: no merge can cure it."""
    if not fingerprint.non_finite:
        return
    counts = [(fingerprint.nans, "NaN"), (fingerprint.infinities, "infinite")]
    values = " and ".join(f"{count} {kind} values" for count, kind in counts if count)
    tensors = len(fingerprint.non_finite)
    raise CheckpointError(
        f"model '{name}': {fingerprint.where}: {values} in {tensors} tensor{'s' * (tensors > 1)}, first in "
        f"{quoted(fingerprint.non_finite[0])}; expected finite weights; leave this model out"
    )


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """The hash that `fingerprint` gives a checkpoint with exactly these tensors under these names."""
    return combine_hashes(
        (name, dtype_name(tensor), tuple(tensor.shape), hashlib.sha256(tensor_bytes(tensor)).hexdigest())
        for name, tensor in tensors.items()
    )


def combine_hashes(entries: Iterable[tuple[str, str, tuple[int, ...], str]]) -> str:
    """The hash of a checkpoint from name, dtype, shape and sha256 of the bytes of each of its tensors."""
    hashed = hashlib.sha256()
    for name, dtype, shape, sha256 in sorted(entries):
        hashed.update(json.dumps([name, dtype, list(shape), sha256]).encode() + b"\n")
    return hashed.hexdigest()


def _digest_file(tensors: list[TensorInfo], progress: ByteProgress) -> dict[str, TensorDigest]:
    """Hash the tensors of one file in parallel; hashlib and numpy let go of the interpreter meanwhile."""
    largest_first = sorted(tensors, key=lambda tensor: -tensor.nbytes)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        found = threads.map(lambda tensor: digest_tensor(tensor, progress), largest_first)
        return {tensor.name: digest for tensor, digest in zip(largest_first, found, strict=True)}


def digest_tensor(tensor: TensorInfo, progress: Advance, *, hashed: bool = True) -> TensorDigest:
    """Hash and count one tensor, or only count it, which is several times faster.

    Read with `readinto`, not through a mapping: a file that shrinks is an error here, not a SIGBUS.
    """
    sha256, left = hashlib.sha256(), tensor.nbytes
    buffer = memoryview(bytearray(min(CHUNK_BYTES, left)))
    nans = infinities = 0
    try:
        with tensor.file.open("rb", buffering=0) as file:
            file.seek(tensor.start)
            while left:
                chunk = buffer[: min(CHUNK_BYTES, left)]
                filled = 0
                while filled < len(chunk):
                    got = file.readinto(chunk[filled:])
                    if not got:
                        raise damage(tensor.file, "became shorter while it was read")
                    filled += got
                if hashed:
                    sha256.update(chunk)
                nan, infinite = count_non_finite(chunk, tensor.dtype)
                nans, infinities = nans + nan, infinities + infinite
                left -= len(chunk)
                progress.advance(len(chunk))
    except OSError as error:
        raise cannot_read(tensor.file, error) from error
    return TensorDigest(sha256.hexdigest() if hashed else "", nans, infinities)


def count_non_finite(chunk: memoryview, dtype: str) -> tuple[int, int]:
    """How many elements of these bytes are NaN, and how many infinite; takes memory of three chunks."""
    bits = NON_FINITE.get(dtype)
    if bits is None:
        return 0, 0
    values: NDArray[Any] = np.frombuffer(chunk, bits.kind)
    bad = (values & values.dtype.type(bits.mask)) == bits.pattern
    count = int(np.count_nonzero(bad))
    if not count or bits.infinity is None:
        return count, 0
    infinite = int(np.count_nonzero((values[bad] & values.dtype.type(bits.magnitude)) == bits.infinity))
    return count - infinite, infinite


def file_identity(file: Path) -> list[int]:
    """Size and times of a file. The change time also shows a rewrite that puts the old mtime back."""
    try:
        status = file.stat()
    except OSError as error:
        raise cannot_read(file, error) from error
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def cache_entry(identity: list[int], digests: Mapping[str, TensorDigest]) -> dict[str, Any]:
    """What the cache keeps of a file with this identity."""
    tensors = {name: [one.sha256, one.nans, one.infinities] for name, one in digests.items()}
    return {"identity": identity, "tensors": tensors}


def digests_from_cache(entry: Any, identity: list[int], tensors: list[TensorInfo]) -> dict[str, TensorDigest] | None:
    """What the cache knows of a file, or None. The cache is a convenience: whatever looks odd is ignored."""
    try:
        found = entry["tensors"]
        if entry["identity"] != identity or found.keys() != {tensor.name for tensor in tensors}:
            return None
        return {name: TensorDigest(str(sha), int(nan), int(inf)) for name, (sha, nan, inf) in found.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
