"""Optimisers by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from search.optimizer import OPTIMIZERS, MakeOptimizer, WithOptions, options_class


def optimizer_named(name: str, options: Mapping[str, Any] | None = None) -> MakeOptimizer:
    """The maker of an optimiser: one of ours, a plug-in, or one of nevergrad's registry.

    Raises:
        UserError: unknown, or known to crash, hang or not to repeat its asks.
        pydantic.ValidationError: options that do not fit.
    """
    checked = options_class(name).model_validate(dict(options or {}))
    if name in OPTIMIZERS.names() or ":" in name:
        return WithOptions(OPTIMIZERS.get(name), checked)
    from search.nevergrad_box import from_registry

    return from_registry(name, OPTIMIZERS.names())
