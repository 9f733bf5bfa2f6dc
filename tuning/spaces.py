"""What can be searched: the ranges that methods state beside their settings, by dotted name."""

from __future__ import annotations

from dataclasses import fields

from methods.parts.contract import SearchRange
from pipeline.config import RunConfig


def search_ranges(config: RunConfig) -> dict[str, SearchRange]:
    """`{"method.temperature": SearchRange(...), ...}`: the range of every setting of the config's method that states one."""
    ranges = {f"method.{f.name}": f.metadata.get("search") for f in fields(config.method)}
    return {name: search for name, search in ranges.items() if search is not None}
