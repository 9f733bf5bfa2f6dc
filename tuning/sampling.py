"""The values that a sweep tries, drawn by (seed, number), and whether they can work."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from methods.parts.errors import ConfigError
from pipeline.build import build_method
from pipeline.config import RunConfig, override
from pipeline.data.sources.base import open_source
from pipeline.resolve import resolve
from tuning.space import Param

Check = Callable[[Mapping[str, Any]], None]
MOST_TRIED = 64  # combinations of the other settings in which a value is tried before it is refused


def random_values(params: Sequence[Param], seed: int, number: int) -> dict[str, Any]:
    """Draw setting `number`. The value of one param does not depend on which others are searched."""
    return {param.key: param.at(np.random.default_rng([seed, number, zlib.crc32(param.key.encode())]).random()) for param in params}


def grid_values(params: Sequence[Param], points: int) -> list[dict[str, Any]]:
    """Return every combination of the params' grids."""
    return [dict(zip([p.key for p in params], row, strict=True)) for row in itertools.product(*(p.grid(points) for p in params))]


def perturb(params: Sequence[Param], random: np.random.Generator, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return new values for PBT: each moved by a fifth of its range, or by one choice; one in four is drawn anew."""
    new = {}
    for param in params:
        if random.random() < 0.25:
            new[param.key] = param.at(random.random())
            continue
        size = 1 / len(param.choices) if param.choices else 0.2
        moved = param.position(values[param.key]) + size * float(random.choice([-1, 1]))
        new[param.key] = param.at(min(1.0, max(0.0, moved)))
    return new


def checker(config: RunConfig, num_training: int | None, num_ids: int | None) -> Check:
    """Return a function that raises `ConfigError` for values that cannot work: their ranges, the rules, the method's own demands."""

    def check(values: Mapping[str, Any]) -> None:
        changed = override(config, values)
        build_method(changed, resolve(changed, num_training, num_ids).facts)

    return check


def setting_checker(config: RunConfig) -> Check:
    """Return `checker` for the images that the settings name."""
    dataset = open_source(config.data)
    training = dataset.num_training(config.data.held_out)
    return checker(config, training, None if training is None else len(dataset))


def refusal(check: Check, values: Mapping[str, Any]) -> str | None:
    """Return why a setting cannot work, or None."""
    try:
        check(values)
    except ConfigError as error:
        return str(error)
    return None


def check_corners(params: Sequence[Param], check: Check) -> None:
    """Refuse an extreme value that works in no combination with the other params.

    Raises:
        ConfigError: what is wrong with it.
    """
    for param in params:
        others = [other for other in params if other is not param]
        for value in param.corners():
            rests = itertools.islice(_combinations(others), MOST_TRIED)
            errors = []
            for rest in rests:
                error = refusal(check, {param.key: value} | rest)
                if error is None:
                    break
                errors.append(error)
            else:
                raise ConfigError(f"--space {param.key}={param.text}: {value} cannot work: {errors[0]}")


def _combinations(params: Sequence[Param]) -> Iterator[dict[str, Any]]:
    yield {}
    for row in itertools.product(*(param.corners() for param in params)):
        yield dict(zip([param.key for param in params], row, strict=True))


def check_fixed_shapes(params: Sequence[Param], config: RunConfig, num_training: int | None, num_ids: int | None) -> None:
    """Refuse what PBT cannot change: it loads one trial's state into another, so a param may change nothing but numbers.

    Raises:
        ConfigError: a param changes shapes, data or the order of images.
    """

    def shape(values: Mapping[str, Any]) -> Any:
        changed = override(config, values)
        facts = resolve(changed, num_training, num_ids).facts
        return changed.data, facts, changed.optim.name, {k: v.shape for k, v in build_method(changed, facts).state_dict().items()}

    for param in params:
        shapes = [shape({param.key: value}) for value in param.corners()]
        if any(other != shapes[0] for other in shapes):
            raise ConfigError(
                f"--space {param.key}: cannot change in mid-run, as pbt does; search it with --scheduler asha, or leave it out"
            )
