"""The one error a user may cause. The message names the key, its value and the remedy."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting, path or name that cannot work; the message is one sentence that says what to change."""


def require(condition: bool, key: str, value: object, remedy: str) -> None:
    """Raise `ConfigError("key=value: remedy")` unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key}={value}: {remedy}")
