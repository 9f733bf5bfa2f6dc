"""Run folders in an object store: the driver works on a local copy of a run's small files.

RUNS may be `s3://BUCKET/RUNS` or `gs://...`. The copy lies in the cache folder and says in `.remote` whose copy it is. It
holds everything but checkpoints, which workers write to the store and read from it themselves.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

from pipeline.storage import files

_sent: dict[Path, tuple[int, int]] = {}  # of this process: time (ns) and size of every file as it was sent
_sending = threading.Lock()  # no older version may overtake a newer one


def local_copy(runs_dir: str) -> Path:
    """Return the folder to work in for `--runs-dir`: a local one as it is, or the copy of one in an object store, with what `runs` shows.

    Raises:
        ConfigError: the store does not answer, has no such bucket, or may not be written.
    """
    if not files.is_remote(runs_dir):
        return Path(runs_dir)
    uri = files.resolve(runs_dir, "runs_dir")
    folder = files.cache_folder() / "runs" / hashlib.blake2b(uri.encode(), digest_size=6).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".remote").write_text(uri)
    with files.explained(uri, "runs_dir"):
        listed = files.tree(uri, missing_ok=True)  # first: says within seconds what cannot be reached
        files.write(files.join(uri, ".manyviews"), b"run folders of Manyviews\n")  # says now what may not be written
        _fetch(uri, folder, [file.name for file in listed if file.name.partition("/")[2] == "run.json"])
    return folder


def remote_of(run: Path) -> str | None:
    """Return the URI of a run's folder in an object store; None for a plain local run."""
    try:
        return files.join((run.parent / ".remote").read_text(), run.name)
    except FileNotFoundError:
        return None


def pull(run: Path) -> None:
    """Bring the local copy of a run's small files up to date. A plain run is left alone.

    Raises:
        ConfigError: the store does not answer.
    """
    uri = remote_of(run)
    if uri is not None:
        with files.explained(uri, "runs_dir"):
            _fetch(uri, run, [file.name for file in files.tree(uri) if not file.name.startswith("checkpoints/")])


def push(run: Path, only: str | None = None) -> None:
    """Send the small files that have changed since this process sent them last, `run.json` after all others. A plain run is left alone.

    Args:
        only: one file by its name, instead of all.

    Raises:
        ConfigError: the store does not take them.
    """
    uri = remote_of(run)
    if uri is None:
        return
    with _sending, files.explained(uri, "runs_dir"):
        for file in sorted([run / only] if only else _files(run), key=lambda file: (file.name == "run.json", str(file))):
            mark = file.stat().st_mtime_ns, file.stat().st_size
            if _sent.get(file) != mark:
                files.copy(str(file), files.join(uri, file.relative_to(run).as_posix()))
                _sent[file] = mark


def _fetch(uri: str, folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    files.each(lambda name: files.copy(files.join(uri, name), str(folder / name)), names)


def _files(run: Path) -> Iterator[Path]:
    for path in run.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(run).parts):
            yield path
