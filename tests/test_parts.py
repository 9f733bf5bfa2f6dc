"""`methods.parts`: one import gives a method all it needs, and settings and errors alone stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import methods.parts
from methods.parts import public

ROOT = Path(__file__).resolve().parents[1]
METHODS = [file for file in sorted((ROOT / "methods").glob("*.py")) if file.name != "__init__.py"]


def imports_of_parts(file: Path) -> list[ast.ImportFrom]:
    found = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    return [node for node in found if (node.module or "").startswith("methods.parts")]


@pytest.mark.parametrize("file", METHODS, ids=lambda file: file.stem)
def test_a_method_imports_its_parts_in_one_statement(file: Path) -> None:
    (statement,) = imports_of_parts(file)
    assert statement.module == "methods.parts"
    assert {alias.name for alias in statement.names} <= set(public.__all__)


def test_every_name_that_is_listed_is_there_and_no_other() -> None:
    listed = [alias.name for node in imports_of_parts(Path(public.__file__)) for alias in node.names]
    assert sorted(listed) == sorted(public.__all__)
    assert all(getattr(methods.parts, name) is getattr(public, name) for name in public.__all__)
    with pytest.raises(AttributeError):
        methods.parts.mpl  # noqa: B018


def test_errors_and_fields_load_without_torch() -> None:
    code = "import sys, methods.parts.errors, methods.parts.fields; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
