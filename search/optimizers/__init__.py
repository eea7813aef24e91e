"""Optimisers by name."""

from __future__ import annotations

from search.optimizer import OPTIMIZERS, MakeOptimizer


def optimizer_named(name: str) -> MakeOptimizer:
    """The maker of an optimiser: one of ours, a plug-in, or one of nevergrad's registry.

    Raises:
        UserError: unknown, or known to crash, hang or not to repeat its asks.
    """
    if name in OPTIMIZERS.names() or ":" in name:
        return OPTIMIZERS.get(name)
    from search.nevergrad_box import from_registry

    return from_registry(name, OPTIMIZERS.names())
