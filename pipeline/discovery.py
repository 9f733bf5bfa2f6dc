"""Functions found by the decorator above them, without importing the files that hold them: a new one is its file, and no list is kept."""

from __future__ import annotations

import ast
import difflib
import importlib
from dataclasses import dataclass
from pathlib import Path

from methods.parts.errors import ConfigError


@dataclass(frozen=True)
class Entry:
    """A function as its file declares it: the name its decorator gives, the first line of its docstring, the file's module."""

    name: str
    summary: str
    module: str


def import_entry(known: list[Entry], name: str, key: str, listing: str) -> None:
    """Import the file that holds the function of this name, whose decorator then makes it known.

    Args:
        key: what is named, for the message; `listing`: the command that lists all.

    Raises:
        ConfigError: there is none of that name; the message gives the nearest.
    """
    modules = {entry.name: entry.module for entry in known}
    if name not in modules:
        near = difflib.get_close_matches(name, list(modules), n=3, cutoff=0.4) or list(modules)
        raise ConfigError(f"{key}={name}: unknown; did you mean {' or '.join(near)}? `{listing}` lists all")
    importlib.import_module(modules[name])


def discover(folder: Path, package: str, decorator: str) -> list[Entry]:
    """Every function of a package's files that stands under `@decorator("NAME", ...)`, in the order of files and lines."""
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
