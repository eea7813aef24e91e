"""Memory that a process lets go of once it has used it: pages of mapped files, and large freed blocks.

Pages of files stay in the system's cache; only this process stops counting them as its memory, so that its
resident size says what it needs. Best effort: where it cannot be done, nothing happens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection
from pathlib import Path

DONT_NEED = 4
"""`MADV_DONTNEED`: pages of a private mapping of a file are read again from it when they are next touched."""


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGE_BYTES = 1 << 22
KEPT_BYTES = 1 << 26


def return_large_blocks() -> None:
    """From now on, memory of large tensors goes back to the system when they are freed (glibc only).

    By default glibc keeps freed blocks of up to 32 MiB for later, in pieces where threads free what others
    took: measured as 25 tensors of 4 MiB where 4 were alive. Smaller ones, as what is computed block by block makes
    them, are kept: a page that is had anew for each costs more than the arithmetic on it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
    except (OSError, AttributeError):
        return


def drop_mapped_pages(files: Collection[Path]) -> None:
    """Let go of the pages of these files, which this process has mapped and has not written to.

    Goes by the system's own list of mappings, because the same advice on other memory would erase it.
    """
    wanted = {str(file.resolve()) for file in files}
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
        advise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return  # not Linux
    for line in lines:
        addresses, _, _, _, _, *path = line.split(maxsplit=5)
        if path and path[0] in wanted:
            start, stop = (int(address, 16) for address in addresses.split("-"))
            advise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), DONT_NEED)
