"""The house rules: which room may import which, no machine paths, a distribution that is whole, a README that tells the truth."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from pipeline.export.model_code import when_run

ROOT = Path(__file__).resolve().parents[1]
RANK = {"methods": 0, "pipeline": 1, "tuning": 2, "manyviews": 3}  # a room imports from its own rank or below
METHODS_MAY_IMPORT = {"torch", "timm", "methods"} | set(sys.stdlib_module_names)


# ---------------------------------------------------------------------------- imports run one way


def imported(tree: ast.Module, package: list[str]) -> Iterator[tuple[int, str]]:
    """Line and full name of every import of a file, in functions too, and of every import by a string that is known here."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            yield node.lineno, ".".join([*above, node.module or ""]).strip(".")
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            name = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            if called in ("import_module", "__import__") and isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, name.value


def violations(root: Path) -> list[str]:
    """Every import below `root` that runs against `manyviews.py -> tuning -> pipeline -> methods`, as `file:line: sentence`."""
    found = []
    files = [root / "manyviews.py", *(file for room in RANK for file in sorted((root / room).rglob("*.py")))]
    for file in filter(Path.exists, files):
        parts = file.relative_to(root).with_suffix("").parts
        room = parts[0]
        for line, name in imported(ast.parse(file.read_text()), list(parts[:-1])):
            top = name.split(".")[0]
            where = f"{file.relative_to(root)}:{line}"
            if RANK.get(top, 0) > RANK[room]:
                found.append(f"{where}: {room} imports {name}")
            elif room == "methods" and top not in METHODS_MAY_IMPORT:
                found.append(f"{where}: methods imports {name}; only torch and timm are allowed")
    return found


def test_imports_run_one_way() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("methods/a.py", "import ray"),
        ("methods/a.py", "def f():\n    from pandas import DataFrame"),
        ("methods/parts/a.py", "import mlflow.pyfunc"),
        ("methods/a.py", "from pipeline.config import RunConfig"),
        ("methods/parts/a.py", "from ...pipeline import config"),
        ("methods/a.py", "import importlib\nimportlib.import_module('pyarrow')"),
        ("pipeline/a.py", "import tuning.search"),
        ("pipeline/train/a.py", "def f():\n    import manyviews"),
        ("pipeline/a.py", "from importlib import import_module\nimport_module(f'tuning.{1}')"),
        ("tuning/a.py", "from manyviews import main"),
        ("tuning/a.py", "__import__('manyviews')"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, line: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(line)
    (found,) = violations(tmp_path)
    assert found.startswith(f"{file}:")


def test_right_imports_pass(tmp_path: Path) -> None:
    for file, lines in {
        "manyviews.py": "import tuning.search, pipeline.config, methods",
        "tuning/search.py": "from pipeline.config import RunConfig\nimport ray",
        "pipeline/config.py": "from methods.parts.errors import ConfigError\nfrom . import runs\nimport mlflow",
        "methods/swav.py": "import math, torch, timm\nfrom .parts import views\nfrom methods.parts import heads",
    }.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(lines)
    assert violations(tmp_path) == []


# ---------------------------------------------------------------------------- levels inside pipeline/


def packages_used(root: Path) -> dict[str, set[str]]:
    """For each package of `pipeline/`, and each file beside them, the others that it imports, in functions too."""
    used: dict[str, set[str]] = {}
    for file in (root / "pipeline").rglob("*.py"):
        own = file.relative_to(root / "pipeline").parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        found = used.setdefault(own, set())
        for node in when_run(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pipeline":
                names = [alias.name for alias in node.names] if node.module == "pipeline" else [str(node.module).split(".")[1]]
                found |= set(names) - {own}
    return used


def levels(used: dict[str, set[str]]) -> dict[str, int]:
    """The level of each package: 1 without imports of others, else one above the highest that it imports.

    Raises:
        CycleError: imports run in a circle.
    """
    found: dict[str, int] = {}
    for name in TopologicalSorter(used).static_order():
        found[name] = 1 + max((found[other] for other in used.get(name, ())), default=0)
    return found


def test_pipeline_has_at_most_seven_levels_and_no_circle() -> None:
    found = levels(packages_used(ROOT))
    assert {"config", "data", "train", "doctor"} <= set(found)
    assert max(found.values()) <= 7, found


def test_a_circle_and_a_level_are_found(tmp_path: Path) -> None:
    files = {
        "a/x.py": "from pipeline.b.y import f",
        "b/y.py": "def f():\n    from pipeline import c",
        "c.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pipeline.a.x import g",
    }
    for name, lines in files.items():
        (tmp_path / "pipeline" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pipeline" / name).write_text(lines)
    assert levels(packages_used(tmp_path)) == {"c": 1, "b": 2, "a": 3}
    (tmp_path / "pipeline" / "c.py").write_text("def g():\n    from pipeline.a.x import h")
    with pytest.raises(CycleError):
        levels(packages_used(tmp_path))


def test_every_package_says_what_it_holds() -> None:
    for file in (ROOT / "pipeline").rglob("__init__.py"):
        text = ast.get_docstring(ast.parse(file.read_text())) or ""
        assert len(text.splitlines()) >= 3, f"{file.relative_to(ROOT)}: say in three lines what is here and what is not"


def test_the_front_door_opens_without_heavy_libraries() -> None:
    heavy = ("torch", "ray", "mlflow", "timm", "matplotlib", "sklearn", "pandas")
    code = f"import sys, manyviews; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------------------- nothing of one machine

TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".cfg", ".ini", ".txt", ".sh", ".json", ""}
# spelled so that this file does not accuse itself
FOREIGN = [
    # Ray's own default folder is the one exception: Unix sockets need a short path, wherever TMPDIR points
    re.compile(r"(?<![\w.~}>/-])(?!/tmp/ray\b)/(?:home|root|Users|work|mnt|opt|tmp|scratch|nfs)(?=/\w)"),
    re.compile(r"\b[A-Z]:\\Users\b"),
    re.compile(r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|conda\.anaconda\.org|--(?:extra-)?index-ur[l]|--find-link[s]"),
]


def foreign(text: str) -> list[str]:
    """Absolute paths of somebody's machine, and hosts or options of package registries."""
    return [match.group() for pattern in FOREIGN for match in pattern.finditer(text)]


def project_files() -> list[Path]:
    rooms = [ROOT / room for room in ("methods", "pipeline", "tuning", "tests", "benchmarks", "deploy", "docs", ".ci")]
    below = [file for room in rooms for file in room.rglob("*") if "__pycache__" not in file.parts]
    return [f for f in [*ROOT.iterdir(), *below] if f.is_file() and f.suffix in TEXT and f.name not in (".git", "LICENSE", ".env")]


def test_no_file_names_a_machine_or_a_registry() -> None:
    files = project_files()
    assert len(files) > 20
    found = {str(f.relative_to(ROOT)): hits for f in files if (hits := foreign(f.read_text(errors="replace")))}
    assert found == {}


def test_machine_paths_and_registries_are_found() -> None:
    slash = "/"
    assert foreign(f'open("{slash}home/me/photos")') and foreign(f"see {slash}Users/me/x") and foreign(f"({slash}tmp/run1)")
    assert foreign("pip install torch --index-" + "url x") and foreign("files." + "pythonhosted" + ".org")
    assert not foreign(f"a/home/x, runs{slash}tmp{slash}x, ~/work/x, {slash}dev/shm, {slash}proc/cpuinfo, http://127.0.0.1:5000/work/x")


# ---------------------------------------------------------------------------- the distribution


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_room_is_shipped() -> None:
    from setuptools import find_packages

    settings = pyproject()["tool"]["setuptools"]
    shipped = set(find_packages(str(ROOT), **settings["packages"]["find"]))
    folders = {file.parent for room in ("methods", "pipeline", "tuning") for file in (ROOT / room).rglob("*.py")}
    assert {".".join(folder.relative_to(ROOT).parts) for folder in folders} == shipped
    assert settings["py-modules"] == ["manyviews"] and (ROOT / "manyviews.py").exists()


def test_the_console_script_exists() -> None:
    module, function = pyproject()["project"]["scripts"]["manyviews"].split(":")
    found = importlib.util.find_spec(module)
    assert found is not None and found.origin is not None
    names = {node.name for node in ast.parse(Path(found.origin).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert function in names


def test_dependencies_have_both_bounds_and_cover_the_imports() -> None:
    from packaging.requirements import Requirement

    requirements = [Requirement(r) for r in pyproject()["project"]["dependencies"]]
    for requirement in requirements:
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators == {">=", "<"}, f"{requirement} needs a lower and an upper bound"
    modules = {"pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn", "scikit-image": "skimage"}
    covered = {modules.get(r.name, r.name) for r in requirements}
    used = set()
    for file in [ROOT / "manyviews.py", *(f for room in ("methods", "pipeline", "tuning") for f in (ROOT / room).rglob("*.py"))]:
        used |= {name.split(".")[0] for _, name in imported(ast.parse(file.read_text()), [])}
    optional = {"optuna", "huggingface_hub"}  # extras
    assert used - covered - optional - set(RANK) - set(sys.stdlib_module_names) - {""} == set()


def test_the_environment_meets_the_ranges() -> None:
    from importlib.metadata import PackageNotFoundError, version

    from packaging.requirements import Requirement

    wrong = []
    for requirement in map(Requirement, pyproject()["project"]["dependencies"]):
        try:
            if not requirement.specifier.contains(version(requirement.name), prereleases=True):
                wrong.append(f"{requirement.name} {version(requirement.name)}")
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} missing")
    assert wrong == []


# ---------------------------------------------------------------------------- the pages


def verbs_named(text: str) -> set[str]:
    """Verbs of the commands in a page: a line, or an inline code, that begins with `manyviews VERB`."""
    return set(re.findall(r"(?m)(?:^\s*(?:\$ )?|`|&& |-- )(?:python )?(?:\S*/)?manyviews(?:\.py)? ([a-z]+)\b", text))


def known_verbs() -> set[str]:
    import manyviews

    return set(manyviews.VERBS)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "Makefile", "CHANGELOG.md", "docs/cluster.md", "deploy/rayjob.yaml"])
def test_pages_name_verbs_that_exist(page: str) -> None:
    assert verbs_named((ROOT / page).read_text()) - known_verbs() == set()


def test_verbs_are_found_in_pages() -> None:
    page = "$ manyviews pretrain x\n    .venv/bin/manyviews embed\n`manyviews runs`\nManyviews trains\n-- python manyviews.py resume R"
    assert verbs_named(page) == {"pretrain", "embed", "runs", "resume"}


def test_make_explains_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    promised = {"demo", "test", "lint", "types", "unit", "e2e", "bench", "gpu", "study", "chaos", "clean", "help"}
    explained = set(re.findall(r"(?m)^([a-z0-9]+):.* ## ", text))
    assert promised <= explained
    assert set(re.search(r"(?m)^\.PHONY: (.*)$", text)[1].split()) == explained
