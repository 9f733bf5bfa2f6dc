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
    known = declared()
    for given, values in settings:
        key = given.replace("-", "_")
        prefix, _, leaf = key.rpartition(".")
        if not any(leaf.removeprefix("no_") in names for names in known.values()):
            own = declared(recipe).get(prefix.partition(".")[0])
            near = [f"{prefix}.{name}" for name in own] if own else [f"{group}.{name}" for group in known for name in known[group]]
            raise unknown_key(key, near)
        if key in ("data.path", "evaluate.path") and values:
            require_exists(key, values[0])


def require_exists(key: str, path: str) -> None:
    """Raise ConfigError if `path` is one of this machine, and nothing is there."""
    from pipeline.data.sources.base import is_local_path, nothing_at

    if is_local_path(path) and "*" not in Path(path).name and not Path(path).expanduser().exists():
        raise ConfigError(nothing_at(path, key))


def declared(recipe: str | None = None) -> dict[str, list[str]]:
    """The names of the settings of each group, read from the files that declare them; `method` has those of a recipe or of all."""
    from pipeline.recipes import entries

    uses = "".join((ROOT / f"{entry.module.replace('.', '/')}.py").read_text() for entry in entries() if entry.name == recipe)
    methods = [file for file in sorted((ROOT / "methods").glob("*.py")) if not uses or f"methods.{file.stem} " in uses]
    found = {name.removesuffix("Config").lower(): names for name, names in _fields(ROOT / "pipeline" / "config.py").items()}
    return {group: found[group] for group in GROUPS} | {
        "backbone": _fields(ROOT / "methods" / "parts" / "backbones.py")["BackboneConfig"],
        "views": _fields(ROOT / "methods" / "parts" / "views.py")["CropGroup"],
        "method": list(dict.fromkeys(name for file in methods for names in _fields(file).values() for name in names)),
    }


def _fields(file: Path) -> dict[str, list[str]]:
    """The settings of each config class of a file."""
    nodes = ast.parse(file.read_text()).body
    classes = [node for node in nodes if isinstance(node, ast.ClassDef) and node.name.endswith(("Config", "CropGroup"))]
    return {node.name: [ast.unparse(field.target) for field in node.body if isinstance(field, ast.AnnAssign)] for node in classes}
