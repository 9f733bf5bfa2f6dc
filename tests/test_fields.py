"""Limits of settings beside their fields."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

import pytest

from methods.parts.contract import MethodConfig
from methods.parts.errors import ConfigError, require
from methods.parts.fields import SearchRange, at_least, below_one, check_limits, fraction, limited, positive


@dataclass(frozen=True, kw_only=True)
class Settings:
    rate: float = positive(0.1, SearchRange(0.01, 1.0))
    layers: int = at_least(1, 3)
    share: float = fraction(0.0)
    held_out: float = below_one(0.25)
    clip: float | None = positive(None)
    taps: int = limited(5, lambda taps: taps % 2 == 1, "use an odd number")
    free: int = -7

    def __post_init__(self) -> None:
        check_limits(self, "toy.")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": 0}, "toy.rate=0: use a positive number, e.g. 0.1"),
        ({"rate": float("nan")}, "toy.rate=nan: use a positive number, e.g. 0.1"),
        ({"layers": 0}, "toy.layers=0: use 1 or more, e.g. 3"),
        ({"share": 1.5}, "toy.share=1.5: use a number from 0 to 1"),
        ({"held_out": 1.0}, "toy.held_out=1.0: use a fraction in [0, 1), e.g. 0.25"),
        ({"clip": -1.0}, "toy.clip=-1.0: use a positive number, or leave it out"),
        ({"taps": 4}, "toy.taps=4: use an odd number"),
    ],
)
def test_a_value_beyond_its_limit_is_refused_with_key_value_and_remedy(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Settings(**settings)
    assert str(refused.value) == message


def test_values_at_the_limits_pass() -> None:
    settings = Settings(rate=1e-9, layers=1, share=1, held_out=0, clip=None)
    assert pickle.loads(pickle.dumps(settings)) == settings and settings.rate == 1e-9 and Settings().layers == 3


def test_a_method_cannot_skip_the_limits_of_its_settings() -> None:
    with pytest.raises(TypeError, match="use check"):

        class Skips(MethodConfig):
            def __post_init__(self) -> None: ...

    @dataclass(frozen=True, kw_only=True)
    class Toy(MethodConfig):
        low: float = positive(1.0)
        high: float = positive(2.0)

        def check(self) -> None:
            require(self.low < self.high, "method.low", self.low, f"use less than method.high={self.high}")

    for settings, message in (({"low": 3.0}, "method.low=3.0: use less than method.high=2.0"), ({"low": -1.0}, "use a positive number")):
        with pytest.raises(ConfigError, match=message):
            Toy(**settings)


def test_a_method_s_settings_are_checked_without_a_line_of_its_own() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Toy(MethodConfig):
        temperature: float = positive(0.1)

    with pytest.raises(ConfigError, match=r"method\.temperature=-1: "):
        Toy(temperature=-1)
