"""What the lists of plug-ins share: one that is broken is a row like the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from evaluators.errors import UserError

Plugin = TypeVar("Plugin")
Description = TypeVar("Description")


def described(plugin: Plugin | UserError, describe: Callable[[Plugin], Description]) -> Description | dict[str, str]:
    """What `describe` says of a plug-in, or `{"error": "cannot be loaded: ..."}`."""
    if isinstance(plugin, UserError):
        return {"error": f"cannot be loaded: {plugin}"}
    try:
        return describe(plugin)
    except Exception as error:  # noqa: BLE001 - somebody else's object, of which anything may be missing
        return {"error": f"cannot be loaded: it is not what is listed here: {type(error).__name__}: {error}"}
