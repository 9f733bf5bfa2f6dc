"""Run folders in an object store: worked on in a local copy, sent up after every checkpoint, fetched where a run goes on.

RUNS may be `s3://BUCKET/RUNS` or `gs://...`. Its local copy lies in the cache folder and says in `.remote` whose copy it
is. What points to other files (`last.json`, `best.json`, `run.json`) is sent last, so that a reader finds whole checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.ingest import files

POINTERS = ("last.json", "best.json", "run.json")
_sent: dict[Path, tuple[int, int]] = {}  # of this process: time (ns) and size of every file as it was sent
_sending: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)  # no older version may overtake a newer one


def local_copy(runs_dir: str) -> Path:
    """The folder to work in for `--runs-dir`: a local one as it is, or the copy of one in an object store, with what `runs` shows.

    Raises:
        ConfigError: the store does not answer, has no such bucket, or may not be written.
    """
    if not files.is_remote(runs_dir):
        return Path(runs_dir)
    uri = files.resolve(runs_dir, "runs_dir")
    folder = _place(uri) / "driver"
    attach(folder, uri)
    with files.explained(uri, "runs_dir"):
        files.write(files.join(uri, ".manyviews"), b"run folders of Manyviews\n")  # says now what may not be written
        for file in files.tree(uri):
            if file.name.partition("/")[2] == "run.json":
                fetch(uri, folder, file.name)
    return folder


def attach(folder: Path, uri: str) -> None:
    """Make a folder the local copy of one in an object store."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".remote").write_text(uri)


def remote_of(run: Path) -> str | None:
    """The URI of a run's folder in an object store; None for a plain local run."""
    try:
        return files.join((run.parent / ".remote").read_text(), run.name)
    except FileNotFoundError:
        return None


def second_copy(run_uri: str, owner: str) -> Path:
    """A local copy of a run for a process that may lie on the same machine as another one's."""
    uri, _, name = run_uri.rpartition("/")
    folder = _place(uri) / owner
    attach(folder, uri)
    pull(folder / name)
    return folder / name


def _place(uri: str) -> Path:
    return files.cache_folder() / "runs" / hashlib.blake2b(uri.encode(), digest_size=6).hexdigest()


def fetch(uri: str, folder: Path, name: str) -> None:
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    (data,) = files.read_all([files.Part(files.join(uri, name))])
    target.write_bytes(data)


def pull(run: Path) -> None:
    """Bring the local copy of a run up to date: its small files, and the checkpoints that are pointed to. A plain run is left alone.

    Raises:
        ConfigError: the store does not answer.
    """
    uri = remote_of(run)
    if uri is None:
        return
    with files.explained(uri, "runs_dir"):
        listed = {file.name: file.size for file in files.tree(uri)}
        for name in listed:
            if not name.startswith("checkpoints/step-"):
                fetch(uri, run, name)
        wanted = {
            json.loads((run / name).read_text())["folder"] for name in listed if name in ("checkpoints/last.json", "checkpoints/best.json")
        }
        for name, size in listed.items():
            local = run / name
            if name.startswith("checkpoints/step-") and name.split("/")[1] in wanted:
                if not local.is_file() or local.stat().st_size != size:
                    fetch(uri, run, name)
                _sent[local] = _mark(local)


def push(run: Path, only: str | None = None, keep: Callable[[str], bool] = lambda name: False) -> None:
    """Send what has changed since this process sent it last; remove checkpoints that were pruned here. A plain run is left alone.

    Args:
        only: one file by its name, instead of everything.
        keep: whether a checkpoint folder of this name stays in the store though it is not here: a local copy holds the last ones only.

    Raises:
        OSError: the store did not take it.
    """
    uri = remote_of(run)
    if uri is None:
        return
    changed = [file for file in ([run / only] if only else _files(run)) if _sent.get(file) != _mark(file)]
    for file in sorted(changed, key=lambda file: (file.name in POINTERS, file.name == "run.json", str(file))):
        with _sending[file]:
            mark = _mark(file)
            try:
                files.write(files.join(uri, file.relative_to(run).as_posix()), file.read_bytes())
            except Exception as error:  # whatever the store's client raises
                raise OSError(f"{uri}: {files.short(error)}") from None
            _sent[file] = mark
    if not only:
        here = {path.name for path in (run / "checkpoints").glob("step-*")}
        there = {file.name.split("/")[1] for file in files.tree(uri) if file.name.startswith("checkpoints/step-")}
        for gone in filter(lambda name: not keep(name), there - here):
            files.remove_tree(files.join(uri, f"checkpoints/{gone}"))


def _files(run: Path) -> Iterator[Path]:
    for path in run.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(run).parts):
            yield path


def _mark(file: Path) -> tuple[int, int]:
    facts: Any = file.stat()
    return facts.st_mtime_ns, facts.st_size
