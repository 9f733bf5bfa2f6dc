"""Settings from a command line over a recipe: `--group.key value`, with mistakes as one sentence."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import tyro

from methods.parts.errors import ConfigError, unknown_key
from pipeline.cli.parsing import parse
from pipeline.shell import program

if TYPE_CHECKING:
    from pipeline.config import RunConfig


def configured(recipe: str, settings: list[str], verb: str = "pretrain") -> RunConfig:
    """Return a recipe with settings from the command line.

    Args:
        verb: the command's, for its help.

    Raises:
        ConfigError: no such recipe, an unknown key, or a value that does not fit.
    """
    from pipeline.recipes import load_recipe

    start = load_recipe(recipe)  # a misspelt one is answered before torch is loaded
    from pipeline.config import override

    config = parse_settings(start, settings, f"{program()} {verb} {recipe}")
    server = os.environ.get("MLFLOW_TRACKING_URI")  # as MLflow's own tools do; it becomes a setting of the run, for resume and sync
    return override(config, {"track.uri": server}) if server and config.track.uri is None else config


def parse_settings(config: RunConfig, settings: list[str], prog: str) -> RunConfig:
    """Return a config with settings given as `--group.key value`.

    Args:
        prog: the command without the settings, for its help.

    Raises:
        ConfigError: an unknown key, with the nearest names, or a value that does not fit, as one sentence.
    """
    from pipeline.config import RunConfig, flatten, length_given

    if "--help" in settings:
        options = f"Options of the command itself: {prog.rpartition(' ')[0]} --help."
        about = f"Every setting of {config.recipe or 'this run'}, with its type and default.{_groups_meant(config)} {options}"
        tyro.cli(RunConfig, default=config, args=["--help"], prog=prog, description=about)  # exits
    parsed, unknown = parse(RunConfig, _words(config, settings), default=config, prog=prog)
    if unknown and not unknown[0].startswith("--"):
        raise _one_too_many(unknown[0])
    if unknown:
        raise unknown_key(unknown[0].removeprefix("--").replace("-", "_").split("=")[0], flatten(config))
    return length_given(parsed, keys(config, settings))


def _groups_meant(config: RunConfig) -> str:
    """Return which groups `views.global` and `views.local` stand for where this config names its groups otherwise."""
    from pipeline.config import keys_meant

    said = []
    for name in ("global", "local"):
        groups = [key.split(".")[1] for key in keys_meant(config, f"views.{name}.size")]
        if groups != [name]:
            said.append(f"--views.{name}.KEY sets {' and '.join(groups)}")
    return f" {'; '.join(said)}." if said else ""


def split(settings: list[str]) -> list[tuple[str, list[str]]]:
    """Return each setting's dotted name, as it was spelt, with its values.

    Raises:
        ConfigError: a word that belongs to no setting.
    """
    found: list[tuple[str, list[str]]] = []
    for word in settings:
        if word.startswith("--"):
            name, given, value = word.removeprefix("--").partition("=")
            found.append((name, [value] if given else []))
        elif found:
            found[-1][1].append(word)
        else:
            raise _one_too_many(word)
    return found


def tracking_uri(settings: list[str]) -> str | None:
    """Return `--track.uri` among settings that are not parsed yet."""
    return next((values[0] for key, values in split(settings) if key == "track.uri" and values), None)


def keys(config: RunConfig, settings: list[str]) -> set[str]:
    """Return the dotted names of the settings that were given."""
    return {key for key, _ in _meant(config, settings)}


def _meant(config: RunConfig, settings: list[str]) -> list[tuple[str, list[str]]]:
    """Return settings by their names in the config, with their values: `--group.no-key` is `group.key` and `false`."""
    from pipeline.config import flatten, keys_meant

    known = flatten(config)
    found = []
    for name, values in split(settings):
        for key in keys_meant(config, name.replace("-", "_")):
            group, _, leaf = key.rpartition(".")
            positive = f"{group}.{leaf.removeprefix('no_')}"
            negated = key not in known and isinstance(known.get(positive), bool)
            found.append((positive, ["false", *values]) if negated else (key, values))
    return found


def _words(config: RunConfig, settings: list[str]) -> list[str]:
    """Return settings as tyro takes them: a switch that is false as `--group.no-key`."""
    from pipeline.config import flatten

    switches = {key for key, value in flatten(config).items() if isinstance(value, bool)}
    words = []
    for key, values in _meant(config, settings):
        option, rest = key, values
        if key in switches and values:
            state, *rest = values
            if state.lower() not in ("", "true", "false"):
                raise ConfigError(f"{key}={state}: this setting is on or off; use true or false")
            if state.lower() == "false":
                group, _, leaf = key.rpartition(".")
                option = f"{group}.no-{leaf}"
        words += [f"--{option}", *rest]
    return words


def _one_too_many(word: str) -> ConfigError:
    return ConfigError(f"{word}: one word too many; a setting is given as --group.key value")
