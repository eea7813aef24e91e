"""The faults of a config, collected so that the user meets all of them at once."""

from __future__ import annotations

from search.config import LoadedConfig
from search.errors import ConfigError
from search.yaml_source import Location


class Faults:
    """Collects faults with their lines."""

    def __init__(self, loaded: LoadedConfig) -> None:
        self._loaded = loaded
        self.lines: list[str] = []

    def add(self, location: Location, message: str) -> None:
        """Take note of what is wrong at a key; one fault per line of the message."""
        for line in message.splitlines():
            self.lines.append(self._loaded.source.fault(location, line))

    def raise_if_any(self) -> None:
        """Raise `ConfigError` with all of them."""
        if self.lines:
            raise ConfigError("\n".join(dict.fromkeys(self.lines)))
