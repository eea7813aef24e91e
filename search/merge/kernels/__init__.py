"""Merges in one pass over memory: native code for CPUs, Triton for GPUs, the same bits as plain torch.

`MEIOSIS_KERNELS` chooses: `auto` (the default: native or Triton kernels where they can be had, else torch,
with a warning), `native` (the same, but an error where they cannot be had) or `torch` (never).
"""

from __future__ import annotations

import os
from typing import Literal

from search.errors import UserError, nearest

Mode = Literal["auto", "native", "torch"]

MODES: tuple[Mode, ...] = ("auto", "native", "torch")


def chosen_mode() -> Mode:
    """What `MEIOSIS_KERNELS` says.

    Raises:
        UserError: it says something else.
    """
    said = os.environ.get("MEIOSIS_KERNELS", "auto")
    for mode in MODES:
        if said == mode:
            return mode
    raise UserError(f"MEIOSIS_KERNELS: found '{said}', expected one of {', '.join(MODES)}{nearest(said, MODES)}")


def description() -> str:
    """One line for people: what merges on this machine's CPU. Compiles nothing and loads no torch."""
    from search.merge.kernels.build import NoKernelsError, find_compiler

    if chosen_mode() == "torch":
        return "plain torch (MEIOSIS_KERNELS=torch)"
    try:
        return f"native kernels, compiled by {find_compiler().version}"
    except NoKernelsError as reason:
        return f"plain torch, several times slower than native kernels: {reason}"
