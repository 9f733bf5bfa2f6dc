"""The searched settings and their ranges: `method.temperature=log:0.05:0.5`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from methods.parts.errors import ConfigError, require, unknown_key
from methods.parts.fields import SearchRange

if TYPE_CHECKING:
    from pipeline.config import RunConfig  # importing it costs seconds (torch)

SYNTAX = "use KEY=log:0.05:0.5, linear:0:1, int:2:8 or choice:100,300"


def search_ranges(config: RunConfig) -> dict[str, SearchRange]:
    """Return `{"method.temperature": SearchRange(...), ...}`: the range of every setting of this config that states one."""
    found: dict[str, SearchRange] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(f"{prefix}.{name}" if prefix else name, inner)
        elif dataclasses.is_dataclass(value):
            for f in dataclasses.fields(value):
                name = f"{prefix}.{f.name}" if prefix else f.name
                if "search" in f.metadata:
                    found[name] = f.metadata["search"]
                walk(name, getattr(value, f.name))

    walk("", config)
    return found


def as_value(value: Any) -> Any:
    """Return a value that JSON gave back as a setting holds it: lists as tuples."""
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Param:
    """One searched setting. `log`, `linear` and `int` have `low` and `high`, both possible; `choice` has `choices`."""

    key: str
    scale: str
    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] = ()
    whole: bool = False  # the setting is a whole number
    reason: str = ""

    def __post_init__(self) -> None:
        require(self.scale in ("log", "linear", "int", "choice"), self.key, self.scale, f"no such scale; {SYNTAX}")
        if self.scale == "choice":
            require(bool(self.choices), self.key, self.text, f"needs values; {SYNTAX}")
            return
        require(self.low is not None and self.high is not None and self.low < self.high, self.key, self.text, "use low < high")
        if self.scale == "log":
            require(self.low > 0, self.key, self.text, "a log scale begins above 0; use linear")  # type: ignore[operator]

    @property
    def text(self) -> str:
        """The range as the command line takes it."""
        if self.scale == "choice":
            plain = [list(c) if isinstance(c, tuple) else c for c in self.choices]
            return "choice:" + yaml.safe_dump(plain, default_flow_style=True, width=10_000).strip()[1:-1].replace(", ", ",")
        return f"{self.scale}:{self.low:g}:{self.high:g}"

    def at(self, u: float) -> Any:
        """Return the value at position `u` in [0, 1] of the range."""
        if self.scale == "choice":
            return self.choices[min(int(u * len(self.choices)), len(self.choices) - 1)]
        low, high = float(self.low or 0), float(self.high or 0)
        if self.scale == "int":
            return min(int(low + u * (high - low + 1)), int(high))
        value = low * (high / low) ** u if self.scale == "log" else low + u * (high - low)
        return round(value) if self.whole else float(f"{value:.4g}")

    def position(self, value: Any) -> float:
        """Return the position of a value in [0, 1]; of a choice, the middle of its share."""
        if self.scale == "choice":
            return (self.choices.index(value) + 0.5) / len(self.choices)
        low, high = float(self.low or 0), float(self.high or 0)
        if self.scale == "int":
            return (value - low + 0.5) / (high - low + 1)
        u = math.log(value / low) / math.log(high / low) if self.scale == "log" else (value - low) / (high - low)
        return min(1.0, max(0.0, u))

    def grid(self, points: int) -> list[Any]:
        """Return every choice, or `points` values evenly over the range with both ends; without repeats."""
        if self.scale == "choice":
            return list(self.choices)
        if self.scale == "int":
            span = int(self.high or 0) - int(self.low or 0)
            return sorted({int(self.low or 0) + round(i * span / max(1, points - 1)) for i in range(points)})
        return list(dict.fromkeys(self.at(i / max(1, points - 1)) for i in range(points)))

    def corners(self) -> list[Any]:
        """Return the extreme values: if any value is out of range, one of these is."""
        return list(self.choices) if self.scale == "choice" else list(dict.fromkeys([self.at(0.0), self.at(1.0)]))

    def to_dict(self) -> dict[str, Any]:
        values = {"scale": self.scale, "low": self.low, "high": self.high, "choices": list(self.choices)}
        return values | {"text": self.text, "reason": self.reason}

    @classmethod
    def from_dict(cls, key: str, given: Mapping[str, Any]) -> Param:
        """Read what `to_dict` has written; whether the setting is a whole number is not kept."""
        choices = tuple(map(as_value, given.get("choices") or ()))
        return cls(key, given["scale"], given.get("low"), given.get("high"), choices, reason=str(given.get("reason") or ""))


def parse_space(words: Iterable[str], config: RunConfig) -> list[Param]:
    """Read `KEY=RANGE`, or a bare `KEY` whose range stands beside the setting.

    Raises:
        ConfigError: a key that is unknown, given twice or without a range, or a range that does not fit the setting.
    """
    from pipeline.config import flatten, keys_meant

    known, ranges = flatten(config), search_ranges(config)
    params: list[Param] = []
    for word in words:
        key, given, text = word.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        meant = keys_meant(config, key)
        if meant[0] not in known:
            raise unknown_key(key, known)
        if any(other in meant for param in params for other in keys_meant(config, param.key)):
            raise ConfigError(f"--space {key}: given twice; give one range")
        if meant[0] in ranges:
            ranges[key] = ranges[meant[0]]
        params.append(_parsed(key, text, known[meant[0]]) if given else _stated(key, known[meant[0]], ranges))
    if not params:
        raise ConfigError("--space: missing; name what to search, e.g. --space method.temperature=log:0.05:0.5")
    return params


def _stated(key: str, current: Any, ranges: dict[str, SearchRange]) -> Param:
    if key not in ranges:
        near = ", ".join(sorted(ranges))
        raise ConfigError(f"--space {key}: no range stands beside this setting; {SYNTAX} (with a range of their own: {near})")
    stated = ranges[key]
    low, high = stated.low, stated.high
    if stated.around is not None:
        require(current > 0, f"--space {key}", current, f"no range around this value; {SYNTAX}")
        low, high = float(f"{current / stated.around:.4g}"), float(f"{current * stated.around:.4g}")
    choices = tuple(_fitting(key, choice, current) for choice in stated.choices)
    return Param(key, stated.scale, low, high, choices, _is_whole(current), stated.reason)


def _parsed(key: str, text: str, current: Any) -> Param:
    scale, _, rest = text.partition(":")
    if scale == "choice":
        try:
            values = yaml.safe_load(f"[{rest}]")
        except yaml.YAMLError:
            raise ConfigError(f"--space {key}={text}: not a list of values; {SYNTAX}") from None
        return Param(key, scale, choices=tuple(_fitting(key, _number(value), current) for value in values))
    if isinstance(current, bool | str | tuple):
        raise ConfigError(f"--space {key}={text}: this setting is no number; use {key}=choice:A,B")
    try:
        low, high = (float(part) for part in rest.split(":"))
    except ValueError:
        raise ConfigError(f"--space {key}={text}: not a range; {SYNTAX}") from None
    if scale == "int" and (low != int(low) or high != int(high)):
        raise ConfigError(f"--space {key}={text}: the ends are not whole numbers; use linear, or whole ends")
    return Param(key, scale, low, high, whole=_is_whole(current))


def _is_whole(current: Any) -> bool:
    return isinstance(current, int) and not isinstance(current, bool)


def _number(value: Any) -> Any:
    """YAML reads 1e-4 as a word."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _fitting(key: str, value: Any, current: Any) -> Any:
    """Return a choice in the type of the setting; the config checks its range."""
    if isinstance(value, list | tuple):
        value = tuple(_number(v) for v in value)
    wrong = f"--space {key}: {value} is not of the kind of {current!r}; give values like it"
    if value is None or current is None:
        return value
    if isinstance(current, bool) != isinstance(value, bool) or isinstance(current, tuple) != isinstance(value, tuple):
        raise ConfigError(wrong)
    if isinstance(current, float) and isinstance(value, int):
        return float(value)
    if isinstance(current, int) and isinstance(value, float) and value == int(value):
        return int(value)
    if isinstance(current, str) != isinstance(value, str) or (isinstance(current, int) and isinstance(value, float)):
        raise ConfigError(wrong)
    return value
