"""The best setting of a sweep as something to run: a command, a YAML of all settings, a recipe in Python."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from methods.parts.errors import ConfigError
from pipeline.shell import program
from tuning.results import Results

# where a sweep was tracked and what it was called is no part of what it found
LEFT_OUT = ("recipe", "track.")


@dataclass(frozen=True)
class Best:
    """How to run the best setting."""

    command: str
    recipe: str  # source of a recipe file
    yaml: str | None  # every setting; None where the sweep's own settings cannot be read
    trouble: str = ""  # why not


def best_recipe(results: Results) -> Best:
    """Return the best setting of a sweep, with the settings that the sweep itself was given."""
    from pipeline.config import flatten, override, to_yaml
    from pipeline.recipes import load_recipe

    sweep = results.sweep
    changes, text, trouble = dict(results.best.values), None, ""
    try:
        config = override(sweep.config(), results.best.values)
        text = to_yaml(config)
        start, wanted = flatten(load_recipe(sweep.facts["recipe"])), flatten(config)
        given = {k: v for k, v in wanted.items() if not k.startswith(LEFT_OUT) and (k not in start or start[k] != v)}
        changes |= {k: v for k, v in given.items() if k not in changes}
    except FileNotFoundError:
        trouble = "config.yaml is missing from the sweep, so only the searched values are here"
    except (ConfigError, KeyError) as error:
        trouble = f"this version reads the sweep's settings differently, so only the searched values are here ({error})"
    recipe = str(sweep.facts.get("recipe") or "RECIPE")
    command = f"{program()} pretrain {shlex.quote(recipe)} {settings_line(changes)}"
    return Best(command, _source(results, recipe, changes), text, trouble)


def settings_line(values: Mapping[str, Any]) -> str:
    """Settings as `--key value ...` on a command line."""
    return " ".join(shlex.quote(word) for key, value in values.items() for word in option(key, value))


def option(key: str, value: Any) -> list[str]:
    """A setting as words of the command line, spelt as `--help` spells them."""
    key = key.replace("_", "-")
    if isinstance(value, bool):
        *groups, leaf = key.split(".")
        return ["--" + ".".join([*groups, leaf if value else f"no-{leaf}"])]
    values = value if isinstance(value, (tuple, list)) else [value]
    return [f"--{key}", *map(str, values)]


def _source(results: Results, recipe: str, changes: dict[str, Any]) -> str:
    """A file for `pipeline/recipes/`."""
    settings = "".join(f"        {_quoted(key)}: {_quoted(value)},\n" for key, value in changes.items())
    name = re.sub(r"[^\w.-]", "-", results.sweep.name)
    return f'''"""What the sweep {name} found best.

As a file of pipeline/recipes/ it gives: manyviews pretrain {recipe}-tuned
"""

from __future__ import annotations

from pipeline.config import RunConfig, override
from pipeline.recipes import load_recipe, recipe


@recipe("{recipe}-tuned")
def tuned() -> RunConfig:
    """The best of {len(results.trials)} trials: {results.best_score()}."""
    settings = {{
{settings}    }}
    return override(load_recipe("{recipe}"), settings)
'''


def _quoted(value: Any) -> str:
    """A Python literal, strings in double quotes."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def write_best(results: Results, folder: Path) -> Best:
    """Write `best_recipe.py` and `best.yaml` into `folder`."""
    from pipeline.storage.place import write_atomic

    best = best_recipe(results)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "best_recipe.py", best.recipe.encode())
    if best.yaml is not None:
        write_atomic(folder / "best.yaml", best.yaml.encode())
    return best
