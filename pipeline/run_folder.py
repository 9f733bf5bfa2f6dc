"""Run folders: the files of a run, its status and its lock.

RUNS/NAME/config.yaml  run.json  metrics.jsonl  bad_images.jsonl  checkpoints/  figures/  model/  evaluation.json
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import json
import os
import shlex
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from methods.parts.errors import ConfigError
from pipeline.shell import program
from pipeline.storage import mirror
from pipeline.storage.place import Place, write_atomic

_changing = threading.Lock()  # guards run.json, which the training thread and the checkpoint thread change


def as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, default=str) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, as_json(value))


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run.

    Args:
        location: a local folder, which may be the driver's copy of a folder in an object store; on workers, the URI of the latter.
            With a URI only `checkpoints`, `config_text`, `state`, `update` and `bad_images` can be used.
    """

    location: Path | str

    @property
    def path(self) -> Path:
        return Path(self.location)

    @property
    def place(self) -> Place:
        """The place of all files but checkpoints."""
        return Place(str(self.location))

    @property
    def shared(self) -> Place:
        """The place of the run for all workers: this folder, or the folder in an object store of which it is a copy."""
        return Place(mirror.remote_of(self.path) or str(self.path)) if not self.place.is_remote else self.place

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def checkpoints(self) -> Place:
        return self.shared / "checkpoints"

    @property
    def figures(self) -> Path:
        return self.path / "figures"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def bad_images(self) -> Place:
        return self.place / "bad_images.jsonl"

    def config_text(self) -> str:
        return (self.place / "config.yaml").read().decode()

    def state(self) -> dict[str, Any]:
        try:
            state: dict[str, Any] = json.loads((self.place / "run.json").read())
        except FileNotFoundError:
            return {}
        if state.get("status") == "running" and not self.place.is_remote and not self.locked():
            state["status"] = "interrupted"  # its process no longer exists
        return state

    def update_local(self, **changes: Any) -> None:
        """Change facts in `run.json`; if the folder is a copy, the next `push` sends them to the object store."""
        with _changing:
            (self.place / "run.json").write(as_json(self.state() | changes))

    def update(self, **changes: Any) -> None:
        """Change facts in `run.json`, and send them to the object store."""
        self.update_local(**changes)
        if not self.place.is_remote:
            with contextlib.suppress(ConfigError):  # the next checkpoint sends it or raises
                mirror.push(self.path, only="run.json")

    def record_checkpoint(self, *, step: int, bad_images: bytes = b"", **facts: Any) -> None:
        """Record a whole checkpoint and the images that could not be decoded so far, and send the small files to the object store.

        Raises:
            ConfigError: the store does not accept them.
        """
        if bad_images:
            self.bad_images.write(bad_images)
        self.update_local(step=step, **facts)
        if not self.place.is_remote:
            mirror.push(self.path)

    def locked(self) -> bool:
        """Return whether a process works on this run."""
        try:
            with open(self.path / ".lock") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Lock the run for this process and set its status; the lock ends with the process.

        Raises:
            ConfigError: another process works on it.
        """
        holder = self.state()
        with hold(self.path, f"run={self.name}: process {holder.get('pid')} on {holder.get('host')} is training it; stop that one first"):
            self.update(status="running", message="", ended=None, pid=os.getpid(), host=socket.gethostname())
            yield


@contextlib.contextmanager
def hold(folder: Path, refusal: str) -> Iterator[None]:
    """Hold the lock of a folder.

    Raises:
        ConfigError: another process holds it; the message is `refusal`.
    """
    with open(folder / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(refusal) from None
        yield


def create_run(runs_dir: Path, name: str | None, recipe: str) -> RunFolder:
    """Create an empty run folder; without a name, `RECIPE-DATE-TIME`.

    Raises:
        ConfigError: the name is taken or not a plain name.
    """
    folder = RunFolder(new_folder(runs_dir, name, recipe, "run"))
    folder.figures.mkdir()
    write_json(folder.path / "run.json", {"name": folder.name, "recipe": recipe, "created": time.time(), "status": "created"})
    return folder


def new_folder(runs_dir: Path, name: str | None, kind: str, option: str) -> Path:
    """Create an empty folder; without a name, `KIND-DATE-TIME`.

    Args:
        option: the command line option of `name`, for messages.

    Raises:
        ConfigError: the name is taken or not a plain name, or the folder cannot be written.
    """
    if name is not None and (not name or name in (".", "..") or "/" in name):
        raise ConfigError(f"{option}={name}: not a plain name; use letters, digits, - and _ (the folder is --runs-dir)")
    refuse_passing(runs_dir, "runs_dir", "--runs-dir /shared/runs")
    stem = name or f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}"
    candidates = [stem] if name else [stem, *(f"{stem}-{i}" for i in range(2, 100))]
    for candidate in candidates:
        path = runs_dir / candidate
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"runs_dir={runs_dir}: cannot be written ({error.strerror}); give another --runs-dir") from None
        return path.resolve()
    files = [file for file in (path / "run.json", path / "sweep.json") if file.is_file()]
    done = not files or json.loads(files[0].read_text()).get("status") == "finished"
    go_on = "" if done else f", or go on with: {command('resume', stem, runs_dir=runs_dir)}"
    raise ConfigError(f"{option}={stem}: already exists in {runs_dir}; choose another --{option}{go_on}")


def refuse_passing(folder: Path, key: str, remedy: str) -> None:
    """Refuse a folder inside the copy of the code in which Ray runs a submitted job, because Ray deletes that copy.

    Raises:
        ConfigError: `folder` is in such a copy.
    """
    if "working_dir_files" in folder.expanduser().resolve().parts:
        raise ConfigError(f"{key}={folder}: lies in the job's copy of the code, which Ray deletes; give a shared folder, e.g. {remedy}")


def find_run(reference: str, runs_dir: Path) -> RunFolder:
    """Return the folder of a run by name or path.

    Raises:
        ConfigError: there is no such run; the message gives near names.
    """
    for path in (runs_dir / reference, Path(reference)):
        if (path / "run.json").is_file():
            folder = RunFolder(path.resolve())
            if not folder.locked():
                mirror.pull(folder.path)
            return folder
    names = [folder.name for folder in list_runs(runs_dir)]
    near = difflib.get_close_matches(reference, names, n=3, cutoff=0.3) or names[-3:]
    hint = f"did you mean {' or '.join(near)}?" if near else f"`{command('runs', runs_dir=runs_dir)}` lists what there is"
    raise ConfigError(f"run={reference}: no such run in {runs_dir}; {hint}")


def list_runs(runs_dir: Path) -> list[RunFolder]:
    """Return every run of a folder, oldest first."""
    folders = [RunFolder(path.parent) for path in runs_dir.glob("*/run.json")]
    return sorted(folders, key=lambda folder: folder.state().get("created", 0.0))


def command(*words: str, runs_dir: Path) -> str:
    """Return a command of this program, with `--runs-dir` unless it is the default."""
    return f"{program()} {shlex.join(words)}{where_option(runs_dir)}"


def where_option(runs_dir: Path) -> str:
    """Return the option `--runs-dir`; an empty string for its default."""
    place = mirror.remote_of(runs_dir / "any")
    if place is None:
        return "" if runs_dir.resolve() == Path("runs").resolve() else f" --runs-dir {shlex.quote(str(runs_dir))}"
    return f" --runs-dir {shlex.quote(place.removesuffix('/any'))}"
