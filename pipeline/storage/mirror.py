"""Run folders in an object store: the driver works on a local copy of the small files of a run.

RUNS may be `s3://BUCKET/RUNS` or `gs://...`. The copy is in the cache folder, and its file `.remote` has the URI of RUNS. It
holds everything but checkpoints, which workers write to the store and read from it.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

from pipeline.storage import files

_sent: dict[Path, tuple[int, int]] = {}  # time (ns) and size of every file that this process has sent
_sending = threading.Lock()  # keeps versions of a file in order


def local_copy(runs_dir: str) -> Path:
    """Return the local folder for `--runs-dir`: the folder itself, or the local copy of one in an object store with every `run.json`.

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
        listed = files.tree(uri, missing_ok=True)  # first, because it fails within seconds
        files.write(files.join(uri, ".manyviews"), b"run folders of Manyviews\n")  # fails now if the store is not writable
        _fetch(uri, folder, [file.name for file in listed if file.name.partition("/")[2] == "run.json"])
    return folder


def remote_of(run: Path) -> str | None:
    """Return the URI of a run's folder in an object store; None for a local run."""
    try:
        return files.join((run.parent / ".remote").read_text(), run.name)
    except FileNotFoundError:
        return None


def pull(run: Path) -> None:
    """Update the local copy of the small files of a run. Do nothing for a local run.

    Raises:
        ConfigError: the store does not answer.
    """
    uri = remote_of(run)
    if uri is not None:
        with files.explained(uri, "runs_dir"):
            _fetch(uri, run, [file.name for file in files.tree(uri) if not file.name.startswith("checkpoints/")])


def push(run: Path, only: str | None = None) -> None:
    """Send the small files that have changed since this process sent them, `run.json` last. Do nothing for a local run.

    Args:
        only: name of one file to send instead of all.

    Raises:
        ConfigError: the store does not accept them.
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
