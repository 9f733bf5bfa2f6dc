"""Run folders in an object store, here a folder that plays one."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from pipeline import mirror
from pipeline.ingest import files
from pipeline.train import checkpoint

URI = "s3://lake/runs"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "store"

    def at(uri: str) -> Path:
        return root / uri.removeprefix("s3://")

    def write(uri: str, data: bytes) -> None:
        at(uri).parent.mkdir(parents=True, exist_ok=True)
        at(uri).write_bytes(data)

    monkeypatch.setenv("MANYVIEWS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "write", write)
    monkeypatch.setattr(files, "tree", lambda uri: sorted(files._walk(str(at(uri)))))
    monkeypatch.setattr(files, "read_all", lambda parts: [at(part.path).read_bytes() for part in parts])
    monkeypatch.setattr(files, "remove_tree", lambda uri: shutil.rmtree(at(uri)))
    return root / "lake/runs/a/checkpoints"


def save(run: Path, step: int, best: bool = False) -> None:
    checkpoint.save(run / "checkpoints", {"step": step}, step=step, best=best, keep_every=4)
    checkpoint.send(run, step, keep_every=4)


def names(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("step-*"))


def test_a_copy_elsewhere_holds_the_last_checkpoints_and_the_store_all_that_are_kept(store: Path, tmp_path: Path) -> None:
    first = mirror.second_copy(f"{URI}/a", "one")
    for step in (2, 4, 6, 8, 10):
        save(first, step, best=step == 6)
    assert names(store) == [4, 6, 8, 10]
    second = mirror.second_copy(f"{URI}/a", "two")
    assert names(second / "checkpoints") == [6, 10]
    pointed = checkpoint.pointed_to(second / "checkpoints")
    assert pointed is not None and checkpoint.load(pointed)["step"] == 10
    save(second, 12)
    assert names(store) == [4, 6, 8, 12], "every fourth stays though it was never here; the one that was replaced is gone"


def test_a_local_run_is_left_alone(store: Path, tmp_path: Path) -> None:
    run = tmp_path / "local" / "a"
    save(run, 2)
    mirror.pull(run)
    assert names(run / "checkpoints") == [2] and not store.exists()


def test_training_goes_on_during_an_upload_and_the_next_save_waits(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, uploads = mirror.second_copy(f"{URI}/a", "one"), checkpoint.Uploads()
    write, order, go_on = files.write, [], threading.Event()

    def slow(uri: str, data: bytes) -> None:
        assert go_on.wait(60)
        order.append(uri.rpartition("/")[2])
        write(uri, data)

    monkeypatch.setattr(files, "write", slow)
    checkpoint.save(run / "checkpoints", {"step": 2}, step=2)
    uploads.begin(run, 2)
    assert not order, "the caller has gone on, and nothing is sent yet"
    waiting = threading.Thread(target=uploads.wait)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive(), "the next save waits"
    go_on.set()
    waiting.join(60)
    assert order == ["state.pt", "last.json"], "what points to a folder is sent after it"
    assert names(store) == [2]


def test_an_upload_that_fails_stops_the_next_save(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, uploads = mirror.second_copy(f"{URI}/a", "one"), checkpoint.Uploads()

    def refuse(uri: str, data: bytes) -> None:
        raise PermissionError("no rights")

    monkeypatch.setattr(files, "write", refuse)
    checkpoint.save(run / "checkpoints", {"step": 2}, step=2)
    uploads.begin(run, 2)
    with pytest.raises(checkpoint.DiskFull, match=r"step 2 could not be sent: .*no rights"):
        uploads.wait()
    uploads.wait()  # said once
