"""Checkpoints on a disk or in an object store. A killed process leaves no partial checkpoint.

checkpoints/step-00000300/state.pt    tensors and plain values only
checkpoints/step-00000300/NAME-0.pt   a shard of a memory bank, if the method has one
checkpoints/last.json, best.json      pointers: {"folder": "step-00000300", "step": 300, ...}, replaced after the folder is whole

A folder is a checkpoint once a pointer names it, and is not written to again. torch is imported only to read or write a state.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods.parts.errors import ConfigError
from pipeline.storage import files
from pipeline.storage.place import Place

if TYPE_CHECKING:
    from torch import Tensor
    from torch.cuda import Event

State = dict[str, Any]
STATE = "state.pt"  # written last, so a folder with it is whole


class DiskFull(RuntimeError):
    """A checkpoint could not be written; the last one is still whole."""


# ---------------------------------------------------------------------------- writing


class CheckpointWriter:
    """Writes checkpoints in a thread, one at a time, while training goes on. Only rank 0 writes.

    It holds one copy of the state in memory while it writes.
    """

    def __init__(self, checkpoints: Place, keep_every: int | None = None) -> None:
        self.checkpoints, self.keep_every = checkpoints, keep_every
        self._writing: Future[None] | None = None

    def save(
        self, state: State, *, step: int, best: bool = False, copied: bool = False, then: Callable[[], None] = lambda: None
    ) -> None:
        """Wait until the earlier checkpoint is whole, copy the state, and start to write it.

        Args:
            state: its memory banks are copies already, as `MemoryBank.pieces` returns them.
            copied: all of it is, on the CPU.
            then: called in the thread when the checkpoint is whole.

        Raises:
            DiskFull: the earlier checkpoint could not be written.
        """
        self.wait()
        kept, ready = (state, None) if copied else snapshot(state)
        pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing = pool.submit(self._write, kept, ready, step, best, then)
        pool.shutdown(wait=False)  # the thread ends after its work, and the process waits for it

    def _write(self, state: State, ready: Event | None, step: int, best: bool, then: Callable[[], None]) -> None:
        if ready is not None:
            ready.synchronize()
        save(self.checkpoints, state, step=step, best=best, keep_every=self.keep_every)
        then()

    def wait(self) -> None:
        """Wait until the last checkpoint is whole.

        Raises:
            DiskFull: it could not be written. Raised once.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


def snapshot(state: State) -> tuple[State, Event | None]:
    """Return a copy of a state on the CPU, and the CUDA event after which it is complete; None if it is complete.

    Copies from CUDA go to pinned memory on the current stream, so they end before a later step changes the tensors.
    """
    import torch

    on_device = False

    def copied(value: Tensor) -> Tensor:
        nonlocal on_device
        if value.device.type != "cuda":
            return value.detach().to("cpu", copy=True)
        on_device = True
        return torch.empty_like(value, device="cpu", pin_memory=True, requires_grad=False).copy_(value.detach(), non_blocking=True)

    whole = map_tensors(copied, state)
    if not on_device:
        return whole, None
    event = torch.cuda.Event()
    event.record()
    return whole, event


def map_tensors(change: Callable[[Tensor], Any], state: State) -> State:
    """Return a state with every tensor changed, but for memory banks, which are copies already."""
    import torch

    def changed(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return change(value)
        if isinstance(value, dict):
            same = copy.copy(value)  # keeps the attribute of a state_dict with the versions of its modules
            same.update((key, changed(inner)) for key, inner in value.items())
            return same
        if isinstance(value, list | tuple):
            return type(value)(map(changed, value))
        return value

    return {key: value if key == "id_tables" else changed(value) for key, value in state.items()}


def save(checkpoints: Place, state: State, *, step: int, best: bool = False, keep_every: int | None = None) -> Place:
    """Write the checkpoint of `step`, point `last` (and `best`) to it, and prune checkpoints without a pointer.

    Raises:
        DiskFull: the disk or the store refused; earlier checkpoints are untouched.
    """
    folder = checkpoints
    try:
        pointed = _pointed(checkpoints)
        names = (f"step-{step:08d}" + (f"-{i}" if i else "") for i in itertools.count())
        folder = checkpoints / next(name for name in names if name not in pointed)
        folder.remove()  # a partial one of a killed process
        tables: dict[str, list[Tensor]] = state.get("id_tables", {})
        for table, pieces in tables.items():
            for i, piece in enumerate(pieces):
                _write(folder / f"{table}-{i}.pt", piece)
        _write(folder / STATE, state | {"id_tables": {table: len(pieces) for table, pieces in tables.items()}})
        pointer = (json.dumps({"folder": folder.name, "step": step}) + "\n").encode()
        for which in ["last"] + ["best"] * best:
            (checkpoints / f"{which}.json").write(pointer)
        _prune(checkpoints, keep_every)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        with contextlib.suppress(OSError):  # else the next checkpoint removes it
            if folder != checkpoints and folder.name not in _pointed(checkpoints):
                folder.remove()
        free = "" if checkpoints.is_remote else f" ({shutil.disk_usage(Path(checkpoints.uri).parent).free / 1e6:.0f} MB free)"
        raise DiskFull(f"checkpoint of step {step} could not be written to {checkpoints}{free}: {error}") from error
    return folder


def _write(file: Place, content: Any) -> None:
    import torch

    with file.writing() as out:
        torch.save(content, out)


def _prune(checkpoints: Place, keep_every: int | None) -> None:
    """Remove checkpoints without a pointer, except whole ones of every `keep_every`-th step."""
    pointed = _pointed(checkpoints)
    for name in (name for name in checkpoints.folders() if name.startswith("step-")):
        kept = keep_every and _step(name) % keep_every == 0 and (checkpoints / name / STATE).is_file()
        if name not in pointed and not kept:
            (checkpoints / name).remove()


def _pointed(checkpoints: Place) -> set[str]:
    return {name for which in ("last", "best") if (name := _named(checkpoints, which))}


# ---------------------------------------------------------------------------- reading


def _step(name: str) -> int:
    return int(name.split("-")[1])


def _named(checkpoints: Place, which: str = "last") -> str | None:
    """Return the name of the folder that `last` or `best` points to, or None."""
    try:
        return str(json.loads((checkpoints / f"{which}.json").read())["folder"])
    except FileNotFoundError:
        return None


def last_step(checkpoints: Place) -> int:
    """Return the completed steps of a run's last checkpoint; 0 without one."""
    pointed = pointed_to(checkpoints)
    return _step(pointed.name) if pointed else 0


def pointed_to(checkpoints: Place, which: str = "last") -> Place | None:
    """Return the folder that `last` or `best` points to, or None.

    Raises:
        ConfigError: the store does not answer.
    """
    with files.explained(checkpoints.uri, "runs_dir"):
        name = _named(checkpoints, which)
        return checkpoints / name if name and (checkpoints / name / STATE).is_file() else None


def load(folder: Place, mapped: bool = False) -> State:
    """Read a checkpoint without running code from it. Memory banks are memory-mapped, so a worker reads its own rows only.

    A checkpoint in an object store is copied to a temporary folder. Its disk space is freed when nothing of it is mapped.

    Args:
        mapped: memory-map all of it, for a worker that reads its own shares of the tensors. Checksums are not compared then.

    Raises:
        ConfigError: the file is not readable as a checkpoint, or the store does not answer.
    """
    import torch

    try:
        with tempfile.TemporaryDirectory(prefix="manyviews-") as scratch:
            path = scratch if folder.is_remote else folder.uri
            if folder.is_remote:
                with files.explained(folder.uri, "checkpoint"):
                    files.copy(folder.uri, scratch)
            state: State = torch.load(Path(path, STATE), map_location="cpu", weights_only=True, mmap=mapped)
            counts = state.get("id_tables", {}).items()
            state["id_tables"] = {
                name: [torch.load(Path(path, f"{name}-{i}.pt"), map_location="cpu", weights_only=True, mmap=True) for i in range(count)]
                for name, count in counts
            }
    except ConfigError:  # the store does not answer
        raise
    except Exception as error:
        raise ConfigError(f"checkpoint={folder}: cannot be read ({error}); remove it to go on from an older one") from None
    return state


def hash_of_last(checkpoints: Place) -> str:
    """Return the `state_hash` of a run's last checkpoint, to compare runs bit by bit.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    pointed = pointed_to(checkpoints)
    if pointed is None:
        raise ConfigError(f"checkpoint={checkpoints}: there is none; train first")
    return state_hash(load(pointed))


def state_hash(state: State) -> str:
    """Return the SHA-256 of every value of a state, of tensors by their bytes; it does not depend on memory layout."""
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
