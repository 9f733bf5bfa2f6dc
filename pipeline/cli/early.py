"""Mistakes that are answered before torch is loaded, which takes seconds: keys that no config has, paths that do not exist."""

from __future__ import annotations

import ast
from pathlib import Path

from methods.parts.errors import ConfigError, unknown_key

ROOT = Path(__file__).parents[2]
GROUPS = ("data", "optim", "train", "evaluate", "track")  # of pipeline/config.py


def check(settings: list[tuple[str, list[str]]], recipe: str | None) -> None:
    """Raise ConfigError if a setting's name occurs in no config, or a path of images does not exist.

    Args:
        settings: names, dotted, with their values.
        recipe: whose method's settings are proposed; None = those of all methods.
    """
    known = {leaf for names in declared().values() for leaf in names} if settings else set()
    for given, values in settings:
        key = given.replace("-", "_")
        prefix, _, leaf = key.rpartition(".")
        if leaf.removeprefix("no_") not in known:
            own = declared(recipe)
            group = prefix.partition(".")[0]
            raise unknown_key(key, [f"{prefix}.{name}" for name in own[group]] if group in own else all_settings())
        if key in ("data.path", "evaluate.path") and values:
            require_exists(key, values[0])


def require_exists(key: str, path: str) -> None:
    """Raise ConfigError if `path` is one of this machine, and nothing is there."""
    from pipeline.data.sources.base import is_local_path, nothing_at

    if is_local_path(path) and "*" not in Path(path).name and not Path(path).expanduser().exists():
        raise ConfigError(nothing_at(path, key))


def all_settings() -> list[str]:
    """Return every setting by its dotted name; of the crops those of `global` and `local`, which all recipes know."""
    groups = declared()
    crops = groups.pop("views")
    return [f"{group}.{name}" for group, names in (groups | {"views.global": crops, "views.local": crops}).items() for name in names]


def declared(recipe: str | None = None) -> dict[str, list[str]]:
    """Return the names of the settings of each group, read from the files that declare them, as importing those loads torch.

    Args:
        recipe: whose method's settings `method` has; None = those of all methods.
    """
    from pipeline.recipes import entries

    modules = {f"{entry.module.replace('.', '/')}.py" for entry in entries() if recipe in (None, entry.name)}
    uses = "".join((ROOT / module).read_text() for module in modules)
    methods = [file for file in sorted((ROOT / "methods").glob("*.py")) if f"methods.{file.stem} " in uses]
    of_run = _settings(ROOT / "pipeline" / "config.py")
    return {group: of_run[f"{group.title()}Config"] for group in GROUPS} | {
        "backbone": _settings(ROOT / "methods" / "parts" / "backbones.py")["BackboneConfig"],
        "views": _settings(ROOT / "methods" / "parts" / "views.py")["CropGroup"],
        "method": list(dict.fromkeys(name for file in methods for names in _settings(file).values() for name in names)),
    }


def _settings(file: Path) -> dict[str, list[str]]:
    """Return the settings that each config class of a file declares."""
    classes = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)]
    return {
        node.name: [ast.unparse(field.target) for field in node.body if isinstance(field, ast.AnnAssign)]
        for node in classes
        if node.name.endswith(("Config", "CropGroup"))
    }
