"""Our own checkpoints: whole or absent, whatever kills the process.

checkpoints/step-00000300/state.pt    tensors and plain values only
checkpoints/step-00000300/NAME-0.pt   a piece of a table by image id, if the method has one
checkpoints/last.json, best.json      {"folder": "step-00000300", "step": 300, ...}, replaced after the folder is whole

torch is loaded where a state is read or written: to look where a run stands takes none.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods.parts.errors import ConfigError
from pipeline import mirror
from pipeline.runs import write_json

if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, Any]


class DiskFull(RuntimeError):
    """A checkpoint could not be written; the last one is still whole."""


def save(checkpoints: Path, state: State, *, step: int, best: bool = False, keep_every: int | None = None) -> Path:
    """Write the checkpoint of `step`, point `last` (and `best`) at it, and prune those that nothing points to.

    Raises:
        DiskFull: the file system refused; earlier checkpoints are untouched.
    """
    name = f"step-{step:08d}"
    folder, temporary = checkpoints / name, checkpoints / f".{name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        tables: dict[str, list[Tensor]] = state.get("id_tables", {})
        for table, pieces in tables.items():
            for i, piece in enumerate(pieces):
                _write(temporary / f"{table}-{i}.pt", piece.clone())  # torch writes the whole storage of a view
        _write(temporary / "state.pt", state | {"id_tables": {table: len(pieces) for table, pieces in tables.items()}})
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier life of this run
        os.replace(temporary, folder)
        pointer = {"folder": name, "step": step}
        write_json(checkpoints / "last.json", pointer)
        if best:
            write_json(checkpoints / "best.json", pointer)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(checkpoints).free / 1e6
        raise DiskFull(f"checkpoint of step {step} could not be written to {checkpoints} ({free:.0f} MB free): {error}") from error
    _prune(checkpoints, keep_every)
    return folder


def _write(path: Path, content: Any) -> None:
    import torch

    with open(path, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def send(run: Path, step: int, keep_every: int | None = None) -> None:
    """Send a run folder's news to the object store whose copy it is, if it is one.

    Args:
        keep_every: checkpoints of every n-th step stay there, as they do here.

    Raises:
        DiskFull: the store did not take it; what it holds is whole.
    """
    try:
        mirror.push(run, keep=lambda name: _kept(name, keep_every))
    except OSError as error:
        raise DiskFull(f"checkpoint of step {step} could not be sent: {error}") from None


class Uploads:
    """Sends checkpoints on a thread of its own, one at a time, so that training goes on meanwhile."""

    def __init__(self) -> None:
        self._last: Future[None] | None = None

    def begin(self, run: Path, step: int, keep_every: int | None = None) -> None:
        """Begin what `send` does; call `wait` before the run's checkpoints are changed again."""
        if mirror.remote_of(run) is not None:
            self.wait()
            pool = ThreadPoolExecutor(1, thread_name_prefix="upload")
            self._last = pool.submit(send, run, step, keep_every)
            pool.shutdown(wait=False)  # the thread ends with its work, and the process not before it

    def wait(self) -> None:
        """Until the last upload is complete.

        Raises:
            DiskFull: it failed, as in `send`.
        """
        last, self._last = self._last, None
        if last is not None:
            last.result()


def _prune(checkpoints: Path, keep_every: int | None) -> None:
    pointed = {pointed_to(checkpoints, which) for which in ("last", "best")}
    for folder in checkpoints.glob("step-*"):
        if folder not in pointed and not _kept(folder.name, keep_every):
            shutil.rmtree(folder, ignore_errors=True)
    for leftover in checkpoints.glob(".step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def _kept(name: str, keep_every: int | None) -> bool:
    return bool(keep_every) and int(name.split("-")[1]) % keep_every == 0  # type: ignore[operator]


def last_step(checkpoints: Path) -> int:
    """Completed steps of a run's last checkpoint; 0 without one."""
    pointed = pointed_to(checkpoints)
    return int(pointed.name.split("-")[1]) if pointed else 0


def pointed_to(checkpoints: Path, which: str = "last") -> Path | None:
    """The folder that `last` or `best` points to, or None."""
    try:
        folder = checkpoints / json.loads((checkpoints / f"{which}.json").read_text())["folder"]
    except FileNotFoundError:
        return None
    return folder if (folder / "state.pt").is_file() else None


def load(folder: Path) -> State:
    """Read a checkpoint; nothing in it can run code.

    Raises:
        ConfigError: the file is not readable as a checkpoint.
    """
    import torch

    try:
        state: State = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        counts = state.get("id_tables", {}).items()
        state["id_tables"] = {name: [_piece(folder / f"{name}-{i}.pt") for i in range(count)] for name, count in counts}
    except Exception as error:
        raise ConfigError(f"checkpoint={folder}: cannot be read ({error}); remove it to go on from an older one") from None
    return state


def _piece(path: Path) -> Tensor:
    import torch

    piece: Tensor = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # a worker reads its own rows only
    return piece


def state_hash(state: State) -> str:
    """SHA-256 over every value of a state, tensors by their bytes; independent of memory layout."""
    import torch

    digest = hashlib.sha256()
    for path, value in _leaves("", state):
        digest.update(path.encode())
        if isinstance(value, torch.Tensor):
            flat = value.detach().cpu().contiguous().flatten()
            digest.update(str(flat.dtype).encode() + flat.view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()


def _leaves(path: str, value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from _leaves(f"{path}/{key}", value[key])
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from _leaves(f"{path}/{i}", inner)
    else:
        yield path, value
