"""Seeds that derive from the run's seed and a purpose, never from a worker or from the order of arrival."""

import hashlib


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 32-bit seed for one purpose, such as `derive_seed(run_seed, "bootstrap", 3)`."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
