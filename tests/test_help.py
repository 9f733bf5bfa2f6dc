"""Help and completion: of every verb, of every setting, without torch."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import io
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

import manyviews
from pipeline.cli.verb import RunsVerb, Verb
from tuning.cli import TuneOptions

ROOT = Path(__file__).parent.parent


def ends_with(arguments: list[str]) -> int | str | None:
    """The exit code of a call, returned or raised."""
    try:
        return manyviews.main(arguments)
    except SystemExit as ended:
        return ended.code


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("verb", manyviews.VERBS)
def test_every_verb_explains_itself(verb: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([verb, flag], [verb, "--runs-dir", "elsewhere", flag]):
        assert ends_with(arguments) == 0
        out, err = capsys.readouterr()
        assert err == "" and out.startswith(f"usage: manyviews {verb} ")


def test_help_and_lists_load_no_heavy_library() -> None:
    heavy = {"torch", "ray", "mlflow", "timm", "pandas"}
    code = f"""
import contextlib, sys, manyviews
for arguments in {[[], ["recipes"], *([verb, "--help"] for verb in manyviews.VERBS)]}:
    with contextlib.suppress(SystemExit):
        assert manyviews.main(arguments) == 0
assert not (loaded := {heavy} & set(sys.modules)), loaded"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_of_a_recipe_lists_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        manyviews.main(["pretrain", "swav-small", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for flag in ("--method.num-prototypes", "--views.local.scale", "--optim.base-lr", "--train.deterministic", "--data.held-out"):
        assert flag in shown
    assert re.search(r"--method\.num-prototypes INT.*?\(default:\s+64\)", shown, re.DOTALL)


def test_help_of_a_recipe_says_which_crops_are_the_large_ones(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert ends_with(["pretrain", "moco-v3-small", "--help"]) == 0
    assert "--views.global.KEY sets first and second" in capsys.readouterr().out
    assert ends_with(["pretrain", "swav-small", "--help"]) == 0
    assert "--views.global.KEY sets" not in capsys.readouterr().out


def config_classes() -> list[type]:
    """Every dataclass of settings."""
    from methods.parts.contract import registered
    from methods.parts.views import CropGroup
    from pipeline.config import RunConfig

    parts = [field.default_factory for field in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(field.default_factory)]
    return [*parts, CropGroup, *dict.fromkeys(entry.config for entry in registered().values())]


def own_comments(kind: type) -> dict[str, str]:
    """The comment beside each setting of a class or of its bases, or in the lines above it; by the setting's name."""
    bases = [base for base in reversed(kind.__mro__) if dataclasses.is_dataclass(base)]
    return {name: text for base in bases for name, text in comments_of(base).items()}


def comments_of(kind: type) -> dict[str, str]:
    lines = inspect.getsource(kind).splitlines()
    found = {}
    for node in ast.parse("\n".join(lines)).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign):
            before = itertools.takewhile(lambda line: line.strip().startswith("#"), reversed(lines[: node.lineno - 1]))
            above = " ".join(line.strip().lstrip("#: ") for line in reversed(list(before)))
            beside = lines[node.end_lineno - 1].partition("  # ")[2]
            assert not (above and beside), f"{kind.__name__}.{ast.unparse(node.target)}: one comment, beside the setting or above it"
            found[ast.unparse(node.target)] = beside or above
    return found


def shown_help(kind: type, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The help of each setting of a class as a screen shows it, without its default; by the setting's name."""
    with pytest.raises(SystemExit):
        tyro.cli(kind, args=["--help"])
    screen = "\n".join(line.strip("│╭╮╰╯─ ") for line in capsys.readouterr().out.splitlines())
    shown = re.findall(r"(?m)^--([a-z0-9-]+)[^\n]*?(?:\n| {2,})(.*)\(default:", screen)
    return {name.replace("-", "_"): text.strip() for name, text in shown}


@pytest.mark.parametrize("kind", config_classes(), ids=lambda kind: kind.__name__)
def test_the_help_of_a_setting_is_its_own_comment(kind: type, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "5000")
    suppressed = {"first_epoch"}
    assert shown_help(kind, capsys) == {name: text for name, text in own_comments(kind).items() if name not in suppressed}


@pytest.mark.parametrize("kind", [*manyviews.VERBS.values(), Verb, RunsVerb, TuneOptions], ids=lambda kind: kind.__name__)
def test_every_option_of_a_verb_has_a_help(kind: type) -> None:
    assert all(own_comments(kind).values())
    assert str(kind.__doc__).split("\n")[0].endswith(".")


@pytest.fixture(scope="module")
def completion_script() -> str:
    said = {shell: io.StringIO() for shell in ("bash", "zsh")}
    for shell, out in said.items():
        with contextlib.redirect_stdout(out):
            assert manyviews.main(["completion", shell]) == 0
    assert said["zsh"].getvalue().endswith(said["bash"].getvalue())
    return said["bash"].getvalue()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("manyviews pre", ["pretrain"]),
        ("manyviews pretrain swav-sm", ["swav-small"]),
        ("manyviews pretrain swav-small --method.temp", ["--method.temperature"]),
        ("manyviews views byol --views.global.flip", ["--views.global.flip"]),
        ("manyviews resume mi", ["mine"]),
        ("manyviews embed --bf", ["--bf16"]),
        ("manyviews figure sco", ["scores"]),
        ("manyviews study byol", ["byol-target"]),
        ("manyviews runs --method", []),
    ],
)
def test_a_shell_completes_commands(line: str, expected: list[str], tmp_path: Path, completion_script: str) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    words = line.split()
    ask = f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _manyviews manyviews {words[-1]}; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", completion_script + ask], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected
