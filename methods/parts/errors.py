"""The one error a user may cause. The message names the key, its value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A setting, path or name that cannot work; the message is one sentence that says what to change."""


def require(condition: bool, key: str, value: object, remedy: str) -> None:
    """Raise `ConfigError("key=value: remedy")` unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key}={value}: {remedy}")


# settings that had another name: refused by it where they are typed, read in old files
RENAMED = {
    "data.lanes": "data.num_shards",
    "data.window": "data.images_per_task",
    "data.finish": "data.augment_on",
    "optim.idle_epochs": "optim.zero_lr_epochs",
    "optim.horizon": "optim.schedule_stretch",
    "method.horizon": "method.schedule_stretch",
    "train.wait_s": "train.resource_timeout_s",
}


def unknown_key(key: str, known: Iterable[str]) -> ConfigError:
    """Return the error for a misspelt key, with the nearest names, or for one that has another name now."""
    if key in RENAMED:
        return ConfigError(f"{key}: is called {RENAMED[key]} now")
    known = list(known)
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    leaf = key.rsplit(".", 1)[-1]
    near += [k for k in known if k.rsplit(".", 1)[-1] == leaf and k not in near]
    hint = f"did you mean {' or '.join(near)}?" if near else "VERB RECIPE --help lists every key"
    return ConfigError(f"{key}: no such key; {hint}")
