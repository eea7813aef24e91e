"""What decides, beside its tensors, what an adapter does to its base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DECISIVE = (
    "peft_type",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "fan_in_fan_out",
)
"""Keys of `adapter_config.json` that go into the content hash; the others tell how it was trained."""


def adapter_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The decisive part of an adapter's config."""
    return {key: config.get(key) or None for key in DECISIVE}
