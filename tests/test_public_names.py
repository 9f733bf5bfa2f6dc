"""Of Ray, MLflow and timm only public names are used, and nothing in their modules is replaced."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = {"ray", "mlflow", "timm"}
FOLDERS = ("methods", "pipeline", "tuning", "benchmarks")


def private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def root_of(node: ast.expr) -> tuple[str | None, bool]:
    """The name at the beginning of `a.b(c).d[e]`, and whether there are only attributes behind it."""
    plain = True
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
        plain = plain and isinstance(node, ast.Attribute)
        node = node.func if isinstance(node, ast.Call) else node.value
    return (node.id if isinstance(node, ast.Name) else None), plain


def own_private_names(trees: list[ast.Module]) -> set[str]:
    """Private names that our own code defines: functions, methods, attributes of `self`, fields."""
    own: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            own.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and root_of(node)[0] == "self":
            own.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
    return own


def inner_names(tree: ast.Module, own: set[str]) -> Iterator[tuple[int, str]]:
    """Line and words of every use of an inner name of a library, and of every assignment into one of its modules."""
    bound: set[str] = set()  # names that stand for a library or a part of it
    others = {"torch"} | set(sys.stdlib_module_names)  # torch documents torch._foreach_*, Python os._exit
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                path = f"{module}.{alias.name}".strip(".").split(".")
                name = alias.asname or (path[-1] if module else path[0])
                if path[0] in LIBRARIES and not (isinstance(node, ast.ImportFrom) and node.level):
                    bound.add(name)
                    if any(map(private, path)):
                        yield node.lineno, f"imports {'.'.join(path)}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, plain = root_of(node)
            if private(node.attr) and root in bound:
                yield node.lineno, f"uses {ast.unparse(node)}"
            elif private(node.attr) and root not in others and node.attr not in own:
                yield node.lineno, f"uses {ast.unparse(node)}, which is not ours"
            elif isinstance(node.ctx, ast.Store | ast.Del) and root in bound and plain:
                yield node.lineno, f"assigns to {ast.unparse(node)}"
        elif isinstance(node, ast.Call):
            root, _ = root_of(node.func)
            if root in bound:
                yield from ((node.lineno, f"gives {k.arg} to {ast.unparse(node.func)}") for k in node.keywords if k.arg and private(k.arg))
            if isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr") and len(node.args) > 1:
                name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
                if root_of(node.args[0])[0] in bound and (private(str(name)) or node.func.id == "setattr"):
                    yield node.lineno, ast.unparse(node)


def test_only_public_names_of_libraries_are_used() -> None:
    files = [ROOT / "manyviews.py", *(file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py")))]
    trees = {file: ast.parse(file.read_text()) for file in files}
    own = own_private_names(list(trees.values()))
    found = [f"{file.relative_to(ROOT)}:{line}: {words}" for file, tree in trees.items() for line, words in inner_names(tree, own)]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "from ray.train.v2._internal.execution import controller",
        "import ray._private.state",
        "from ray.data import _internal",
        "import ray\nray._private.state",
        "import ray.data as data\ndata._internal.x",
        "from ray.data import DataContext\nDataContext.get_current()._execution_idx",
        "from ray.data import DataContext\ncontext = DataContext.get_current()\ncontext._execution_idx = 1",
        "import ray\nray.init(_temp_dir='x')",
        "import ray\nray.get = None",
        "from ray.train import x as worker_group\nworker_group.Actor = Mine",
        "import mlflow\ngetattr(mlflow, '_tracking')",
        "import mlflow\nsetattr(mlflow, 'log_metric', None)",
        "from timm.models import _builder",
        "import timm\ntimm.models._registry",
    ],
)
def test_an_inner_name_is_found(code: str) -> None:
    assert list(inner_names(ast.parse(code), set()))


@pytest.mark.parametrize(
    "code",
    [
        "import ray\nray.data.DataContext.get_current().enable_progress_bars = False",
        "import torch\ntorch._foreach_mul_([], 1)",
        "import ray\nray.__version__",
        "import mlflow\nmlflow.get_tracking_uri()",
    ],
)
def test_public_names_pass(code: str) -> None:
    assert not list(inner_names(ast.parse(code), set()))
