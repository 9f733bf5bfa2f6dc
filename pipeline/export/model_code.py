"""The code of a registered model: `served_model.py` with the sources of the served class and of the project's modules it imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).parents[2]
SERVED = "pipeline.export.pyfunc"
EMPTY = "SOURCES: dict[str, str] = {}"


def model_code() -> str:
    """Return one Python file with the served model, which needs torch, timm and MLflow only."""
    texts = "".join(f"{name!r}: {_literal(text)},\n" for name, text in sorted(sources(SERVED).items()))
    before, after = Path(__file__).with_name("served_model.py").read_text().split(EMPTY)
    return f"{before}{EMPTY[:-1]}\n{texts}}}{after}"


def sources(*modules: str) -> dict[str, str]:
    """Return the sources of modules, of the project's modules that they import, in functions too, and of their packages."""
    found: dict[str, str] = {}
    wanted = list(modules)
    while wanted:
        name = wanted.pop()
        file = PROJECT.joinpath(*name.split("."))
        file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
        if name in found or not file.is_file():  # no file: the name of a function or class
            continue
        found[name] = file.read_text()
        wanted.append(name.rpartition(".")[0])
        for node in when_run(ast.parse(found[name])):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in ("methods", "pipeline"):
                wanted += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def when_run(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield every node below `tree`, except those under `if TYPE_CHECKING:`."""
    skipped = tree.body if isinstance(tree, ast.If) and ast.unparse(tree.test) == "TYPE_CHECKING" else []
    for node in ast.iter_child_nodes(tree):
        if node not in skipped:
            yield node
            yield from when_run(node)


def _literal(text: str) -> str:
    """Return `text` as a readable Python literal."""
    return f"r'''{text}'''" if "'''" not in text and not text.endswith(("'", "\\")) else repr(text)
