"""Which values a sweep tries: drawn by (seed, number), so that a trial can be repeated; and whether they can work."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from methods.parts.errors import ConfigError
from pipeline.build import build_method
from pipeline.config import RunConfig, override
from pipeline.resolve import resolve
from tuning.space import Knob

Check = Callable[[Mapping[str, Any]], None]
MOST_TRIED = 64  # combinations of other knobs in which a value is tried before it is refused


def random_values(knobs: Sequence[Knob], seed: int, number: int) -> dict[str, Any]:
    """The values of setting `number`: a knob's do not depend on which others are searched."""
    return {knob.key: knob.at(np.random.default_rng([seed, number, zlib.crc32(knob.key.encode())]).random()) for knob in knobs}


def grid_values(knobs: Sequence[Knob], points: int) -> list[dict[str, Any]]:
    """Every combination of every knob's grid."""
    return [dict(zip([k.key for k in knobs], row, strict=True)) for row in itertools.product(*(k.grid(points) for k in knobs))]


def explored(knobs: Sequence[Knob], values: Mapping[str, Any], random: np.random.Generator) -> dict[str, Any]:
    """PBT's next values: each a fifth of its range up or down, or one choice on; one time in four anew."""
    new = {}
    for knob in knobs:
        if random.random() < 0.25:
            new[knob.key] = knob.at(random.random())
        elif knob.scale == "choice":
            place = knob.choices.index(as_value(values[knob.key])) + int(random.choice([-1, 1]))
            new[knob.key] = knob.choices[min(max(place, 0), len(knob.choices) - 1)]
        else:
            new[knob.key] = knob.at(min(1.0, max(0.0, knob.position(values[knob.key]) + 0.2 * float(random.choice([-1, 1])))))
    return new


def as_value(value: Any) -> Any:
    """A value as JSON gives it back, as a setting holds it."""
    return tuple(value) if isinstance(value, list) else value


def checker(config: RunConfig, num_training: int | None, num_ids: int | None) -> Check:
    """A function that raises `ConfigError` for values that cannot work: their ranges, the rules, the method's own demands."""

    def check(values: Mapping[str, Any]) -> None:
        changed = override(config, values)
        build_method(changed, resolve(changed, num_training, num_ids).facts)

    return check


def refusal(check: Check, values: dict[str, Any]) -> str | None:
    """Why a setting cannot work, or None."""
    try:
        check(values)
    except ConfigError as error:
        return str(error)
    return None


def check_corners(knobs: Sequence[Knob], check: Check) -> None:
    """Every extreme of every knob must work in some combination with the others.

    Raises:
        ConfigError: what is wrong with a value that never works.
    """
    for knob in knobs:
        others = [other for other in knobs if other is not knob]
        for value in knob.corners():
            first: ConfigError | None = None
            for rest in itertools.islice(_combinations(others), MOST_TRIED):
                try:
                    check({knob.key: value} | rest)
                    break
                except ConfigError as error:
                    first = first or error
            else:
                raise ConfigError(f"--space {knob.key}={knob.text}: {value} cannot work: {first}")


def _combinations(knobs: Sequence[Knob]) -> Iterator[dict[str, Any]]:
    yield {}
    for row in itertools.product(*(knob.corners() for knob in knobs)):
        yield dict(zip([knob.key for knob in knobs], row, strict=True))


def fixed_shapes(knobs: Sequence[Knob], config: RunConfig, num_training: int | None, num_ids: int | None) -> None:
    """PBT carries the state of one trial into another, so a knob may change nothing but numbers.

    Raises:
        ConfigError: a knob that changes shapes, data or the plan.
    """

    def shape(values: Mapping[str, Any]) -> Any:
        changed = override(config, values)
        facts = resolve(changed, num_training, num_ids).facts
        return changed.data, facts, changed.optim.name, {k: v.shape for k, v in build_method(changed, facts).state_dict().items()}

    for knob in knobs:
        shapes = [shape({knob.key: value}) for value in knob.corners()]
        if any(other != shapes[0] for other in shapes):
            raise ConfigError(
                f"--space {knob.key}: cannot change in mid-run, as pbt does; search it with --scheduler asha, or leave it out"
            )
