"""Search ranges are found by dotted name and can be put into a config."""

from __future__ import annotations

from pipeline.config import override
from pipeline.recipes import load_recipe
from tuning.spaces import search_ranges


def test_ranges_of_swav_are_settings_that_an_override_accepts() -> None:
    config = load_recipe("swav-small")
    ranges = search_ranges(config)
    assert {"method.temperature", "method.epsilon", "method.num_prototypes"} <= set(ranges)
    for name, search in ranges.items():
        for value in search.choices or (search.low, search.high):
            assert override(config, {name: value}).method != config.method or value == getattr(config.method, name.split(".")[1])
        assert search.reason
