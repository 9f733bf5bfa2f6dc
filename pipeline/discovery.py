"""Discovery of decorated functions without importing their files. A new recipe or figure needs its file only, and no list."""

from __future__ import annotations

import ast
import difflib
import importlib
from dataclasses import dataclass
from pathlib import Path

from methods.parts.errors import ConfigError


@dataclass(frozen=True)
class Entry:
    """A decorated function: its name in the decorator, the first line of its docstring, and its module."""

    name: str
    summary: str
    module: str


def import_entry(known: list[Entry], name: str, key: str, listing: str) -> None:
    """Import the module of the function of this name, so that its decorator registers it.

    Args:
        key: the kind of function, for the message.
        listing: the command that lists all.

    Raises:
        ConfigError: the name is unknown; the message gives the nearest names.
    """
    modules = {entry.name: entry.module for entry in known}
    if name not in modules:
        near = difflib.get_close_matches(name, list(modules), n=3, cutoff=0.4) or list(modules)
        raise ConfigError(f"{key}={name}: unknown; did you mean {' or '.join(near)}? `{listing}` lists all")
    importlib.import_module(modules[name])


def discover(folder: Path, package: str, decorator: str) -> list[Entry]:
    """Return every function below `@decorator("NAME", ...)` in the files of a package, in the order of files and lines."""
    found = []
    for path in sorted(folder.glob("*.py")):
        if path.name == "__init__.py":
            continue
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef):
                continue
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Name) and mark.func.id == decorator:
                    summary = (ast.get_docstring(node) or "").split("\n")[0]
                    found.append(Entry(ast.literal_eval(mark.args[0]), summary, f"{package}.{path.stem}"))
    return found
