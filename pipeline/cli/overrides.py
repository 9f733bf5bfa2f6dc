"""Settings from a command line over a recipe: `--group.key value`, with mistakes as one sentence."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
from typing import TYPE_CHECKING

from methods.parts.errors import ConfigError, unknown_key

if TYPE_CHECKING:
    from pipeline.config import RunConfig


def configured(recipe: str, settings: list[str]) -> RunConfig:
    """A recipe with settings from the command line."""
    from pipeline.recipes import load_recipe

    start = load_recipe(recipe)  # a misspelt one is answered before torch is loaded
    from pipeline.config import override

    config = parse_settings(start, settings, f"manyviews pretrain {recipe}")
    server = os.environ.get("MLFLOW_TRACKING_URI")  # as MLflow's own tools do; it becomes a setting of the run, for resume and sync
    return override(config, {"track.uri": server}) if server and config.track.uri is None else config


def parse_settings(config: RunConfig, settings: list[str], prog: str) -> RunConfig:
    """Settings given as `--group.key value` over a config.

    Raises:
        ConfigError: an unknown key, with the nearest names, or a value that does not fit, as one sentence.
    """
    import tyro

    from pipeline.config import RunConfig, flatten, length_given

    if "--help" in settings:
        about = f"Every setting of {config.recipe or 'this run'}, with its type and default."
        tyro.cli(RunConfig, default=config, args=["--help"], prog=prog, description=about)  # exits
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            parsed, unknown = tyro.cli(RunConfig, default=config, args=_words(config, settings), prog=prog, return_unknown_args=True)
    except SystemExit:
        raise ConfigError(_sentence(said.getvalue())) from None
    if unknown and not unknown[0].startswith("--"):
        raise _one_too_many(unknown[0])
    if unknown:
        raise unknown_key(unknown[0].removeprefix("--").replace("-", "_").split("=")[0], flatten(config))
    return length_given(parsed, keys(config, settings))


def split(settings: list[str]) -> list[tuple[str, list[str]]]:
    """Each setting's dotted name, as it was spelt, with its values.

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


def keys(config: RunConfig, settings: list[str]) -> set[str]:
    """Dotted names of the settings that were given."""
    from pipeline.config import keys_meant

    return {key.replace("-", "_") for name, _ in split(settings) for key in keys_meant(config, name)}


def _words(config: RunConfig, settings: list[str]) -> list[str]:
    """Settings as tyro knows them: with the recipe's own groups of crops, and a switch that is false as `--group.no-key`."""
    from pipeline.config import flatten, keys_meant

    switches = {key for key, value in flatten(config).items() if isinstance(value, bool)}
    words = []
    for name, values in split(settings):
        for key in keys_meant(config, name):
            rest = values
            if key.replace("-", "_") in switches and values:
                state, *rest = values
                if state.lower() not in ("", "true", "false"):
                    raise ConfigError(f"{key}={state}: this setting is on or off; use true or false")
                group, _, leaf = key.rpartition(".")
                key = f"{group}.no-{leaf}" if state.lower() == "false" else key
            words += [f"--{key}", *rest]
    return words


def _one_too_many(word: str) -> ConfigError:
    return ConfigError(f"{word}: one word too many; a setting is given as --group.key value")


# tyro's messages and ours: key=value: remedy
SENTENCES = (
    (r"Error parsing \S+: (\w+\.\S+=.*)", r"\1"),
    (r"Error parsing (\S+): (\w+=.*)", r"\1.\2"),
    (r"Error parsing --(\S+): could not convert string to float: '(.*)'", r"\1=\2: use a number"),
    (r"Error parsing --(\S+): invalid literal for int\(\) with base 10: '(.*)'", r"\1=\2: use a whole number"),
    (r"Error parsing --(\S+): no type matching \{None\}\|(\w+) could be instantiated from \['(.*)'\]\.", r"\1=\3: use None or \2"),
    (r"Error parsing --(\S+): Could not .*?\[(.*?)\].*", r"\1=\2: use numbers"),
    (r"Error parsing (?:--)?(\S+): (.*)", r"\1: \2"),
    (r"invalid choice '(.*)' for argument '--(\S+)'\. Expected one of \((.*)\)\.", r"\2=\1: use one of \3"),
    (r"Missing value for argument '--(\S+)'\. Expected (\d+) values\.", r"\1: a value is missing; it needs \2"),
)


def _sentence(said: str) -> str:
    """tyro's message as one sentence: what stands below its title and above the first rule."""
    lines = [line.strip("│╭╮╰╯─- ") for line in said.strip().splitlines()]
    text = " ".join(itertools.takewhile(bool, itertools.dropwhile(lambda line: not line, lines[1:])))
    for theirs, ours in SENTENCES:
        if match := re.fullmatch(theirs, text):
            key, mark, rest = re.split("([=:])", match.expand(ours), maxsplit=1)
            return key.replace("-", "_") + mark + rest
    return text
