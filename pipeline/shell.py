"""Names of programs in messages, as the shell of this process finds them. `run_folder.command` makes whole commands."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path


def program() -> str:
    """Return the command that started this program: `manyviews`, `.venv/bin/manyviews`, `python manyviews.py`, `python -m manyviews`."""
    script = Path(sys.argv[0])
    if script.name == "manyviews.py":
        return shlex.join(sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1])
    return _word(script, sys.argv[0]) if script.name == "manyviews" else "manyviews"


def installed(name: str) -> str:
    """Return the name of a script of this environment if the shell finds it by name, else its path."""
    script = Path(sys.executable).with_name(name)
    return _word(script, str(script)) if script.exists() else name


def install(extra: str) -> str:
    """Return the command that adds one of the project's extras to this environment: from the checkout, if this is one."""
    root = Path(__file__).resolve().parents[1]
    source = ["-e", f"{root}[{extra}]"] if (root / "pyproject.toml").is_file() else [f"manyviews[{extra}]"]
    return shlex.join([sys.executable, "-m", "pip", "install", *source])


def _word(script: Path, path: str) -> str:
    found = shutil.which(script.name)
    return script.name if found and script.exists() and script.samefile(found) else shlex.quote(path)
