"""Limits of a search beside its number of candidates, as a config has them."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")
_UNIT_SECONDS = (86400, 3600, 60, 1)


def seconds_of(text: object) -> float:
    """Seconds of `8h`, `30m`, `1h30m`, `2d` or `90s`. Raises ValueError."""
    match = _DURATION.fullmatch(text.replace(" ", "")) if isinstance(text, str) else None
    if match is None or not any(match.groups()):
        raise ValueError(f"{text!r} is no time; write it as 8h, 30m, 1h30m, 2d or 90s")
    seconds = sum(float(number or 0) * unit for number, unit in zip(match.groups(), _UNIT_SECONDS, strict=True))
    if seconds <= 0:
        raise ValueError(f"{text!r} is no time to search in; expected more than nothing")
    return seconds


def duration(seconds: float) -> str:
    """`1h30m`, as `seconds_of` reads it; fractions of a second only below a minute."""
    if seconds < 60:
        return f"{seconds:g}s"
    rest, parts = round(seconds), ""
    for unit, name in zip(_UNIT_SECONDS, "dhms", strict=True):
        number, rest = divmod(rest, unit)
        parts += f"{number}{name}" if number else ""
    return parts


def _written(seconds: float | None) -> str | None:
    return None if seconds is None else f"{seconds:.6f}s"


WallClock = Annotated[
    float | None,
    BeforeValidator(lambda text: None if text is None else seconds_of(text)),
    PlainSerializer(_written),
]
"""Seconds, written with a unit; or None."""


class LimitsConfig(BaseModel):
    """What a search may use beside candidates; whichever limit is reached first ends it, then come the finals."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    item_evaluations: int | None = Field(None, ge=1, description="search items scored, over all candidates")
    gpu_hours: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="hours that workers spend on candidates, lost attempts included, times the GPUs of a worker; "
        "worker-hours without GPUs",
    )
    wall_clock: WallClock = Field(
        None, description="time of the search over all resumes, without the finals: 8h, 30m, 1h30m, 2d"
    )
