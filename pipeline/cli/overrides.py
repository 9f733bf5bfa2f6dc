"""Settings from a command line over a recipe: `--group.key value`, with mistakes as one sentence."""

from __future__ import annotations

import contextlib
import io
import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.config import RunConfig


def configured(recipe: str, settings: list[str]) -> RunConfig:
    """A recipe with settings from the command line."""
    from pipeline.config import override
    from pipeline.recipes import load_recipe

    config = parse_settings(load_recipe(recipe), settings, f"manyviews pretrain {recipe}")
    server = os.environ.get("MLFLOW_TRACKING_URI")  # as MLflow's own tools do; it becomes a setting of the run, for resume and sync
    return override(config, {"track.uri": server}) if server and config.track.uri is None else config


def parse_settings(config: RunConfig, settings: list[str], prog: str) -> RunConfig:
    """Settings given as `--group.key value` over a config.

    Raises:
        ConfigError: an unknown key, with the nearest names, or a value that does not fit, as one sentence.
    """
    import tyro

    from methods.parts.errors import ConfigError
    from pipeline.config import RunConfig, flatten, length_given, unknown_key

    if "--help" in settings:
        about = f"Every setting of {config.recipe or 'this run'}, with its type and default."
        tyro.cli(RunConfig, default=config, args=["--help"], prog=prog, description=about)  # exits
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            args = _switches(settings, {key for key, value in flatten(config).items() if isinstance(value, bool)})
            parsed, unknown = tyro.cli(RunConfig, default=config, args=args, prog=prog, return_unknown_args=True)
    except SystemExit:
        raise ConfigError(_sentence(said.getvalue())) from None
    if unknown:
        raise unknown_key(unknown[0].removeprefix("--").replace("-", "_").split("=")[0], flatten(config))
    return length_given(parsed, keys(settings))


def keys(settings: list[str]) -> set[str]:
    """Dotted names of the settings given as `--group.key value`."""
    return {s.removeprefix("--").replace("-", "_").split("=")[0] for s in settings if s.startswith("--")}


def _switches(settings: list[str], switches: set[str]) -> list[str]:
    """A switch with a value, `--group.key false` or `--group.key=false`, as the flag that tyro knows, `--group.no-key`."""
    from methods.parts.errors import ConfigError

    words, rest = [], list(settings)
    while rest:
        word = rest.pop(0)
        name, given, value = word.partition("=")
        if name.startswith("--") and name[2:].replace("-", "_") in switches:
            if not given and rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            if value.lower() not in ("", "true", "false"):
                raise ConfigError(f"{name[2:]}={value}: this setting is on or off; use true or false")
            group, _, key = name.rpartition(".")
            word = f"{group}.no-{key}" if value.lower() == "false" else name
        words.append(word)
    return words


def _sentence(boxed: str) -> str:
    """tyro's message without its box and its footer."""
    lines = [re.sub(r"^[│|]\s?|\s*[│|]$", "", line).strip() for line in boxed.splitlines() if not re.match(r"^[╭╰]", line)]
    kept = []
    for line in lines:
        if re.match(r"^─+$", line) or line.startswith(("For full help", "Got errors")):
            break
        kept.append(line)
    text = re.sub(r"\s+", " ", " ".join(kept)).strip()
    match = re.match(r"Error parsing (--)?(\S+): (.*)", text)
    if not match:
        return text
    where, what = match[2], match[3]
    return what if what.startswith(where.split(".")[0] + ".") else f"{where}: {what}"
