"""The driver's local copy of run folders in an object store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from methods.parts.errors import ConfigError
from pipeline import checkpoint
from pipeline.run_folder import create_run, find_run
from pipeline.storage import mirror
from pipeline.storage.place import Place
from tests.store import s3_store

URI = "s3://lake/runs"


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Any, dict[str, str]]]:
    with s3_store() as store:
        yield store


@pytest.fixture
def client(server: tuple[Any, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    for key, value in server[1].items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("MANYVIEWS_CACHE", str(tmp_path / "cache"))
    return server[0]


def stored(client: Any, key: str) -> bytes:
    return client.get_object(Bucket="lake", Key=f"runs/{key}")["Body"].read()


def test_small_files_go_to_the_store_and_checkpoints_never_lie_in_the_copy(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = create_run(mirror.local_copy(URI), "mine", "toy")
    (folder.path / "metrics.jsonl").write_bytes(b"{}\n")
    (folder.figures / "curves.png").write_bytes(b"picture")
    assert folder.checkpoints == Place(f"{URI}/mine/checkpoints")
    checkpoint.save(folder.checkpoints, {"step": 2}, step=2)
    folder.record_checkpoint(step=2)
    assert json.loads(stored(client, "mine/run.json"))["step"] == 2
    assert (stored(client, "mine/metrics.jsonl"), stored(client, "mine/figures/curves.png")) == (b"{}\n", b"picture")
    assert not list(folder.path.rglob("*.pt"))

    monkeypatch.setenv("MANYVIEWS_CACHE", str(tmp_path / "elsewhere"))
    there = mirror.local_copy(URI)
    assert there != folder.path.parent
    found = find_run("mine", there)
    assert (found.figures / "curves.png").read_bytes() == b"picture" and found.state()["step"] == 2
    assert checkpoint.last_step(found.checkpoints) == 2
    assert not list(found.path.rglob("*.pt"))


def test_only_what_has_changed_is_sent_and_the_facts_last(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = create_run(mirror.local_copy(URI), "changed", "toy")
    (folder.path / "zebra.json").write_bytes(b"1")
    mirror.push(folder.path)
    sent: list[str] = []
    copy = mirror.files.copy
    monkeypatch.setattr(mirror.files, "copy", lambda source, to: sent.append(Path(source).name) or copy(source, to))
    mirror.push(folder.path)
    assert sent == []
    folder.update_local(step=4)
    (folder.path / "zebra.json").write_bytes(b"22")
    mirror.push(folder.path)
    assert sent == ["zebra.json", "run.json"]
    assert stored(client, "changed/zebra.json") == b"22"


def test_a_local_run_is_left_alone(tmp_path: Path) -> None:
    folder = create_run(tmp_path, "mine", "toy")
    folder.record_checkpoint(step=2)
    mirror.pull(folder.path)
    assert folder.checkpoints == Place.of(tmp_path / "mine/checkpoints") and folder.state()["step"] == 2


def test_a_store_that_does_not_take_files_is_said_in_one_sentence(client: Any) -> None:
    folder = create_run(mirror.local_copy(URI), "refused", "toy")
    (folder.path.parent / ".remote").write_text("s3://no-such-lake/runs")
    with pytest.raises(ConfigError, match=r"runs_dir=s3://no-such-lake/runs/refused: there is no such bucket"):
        mirror.push(folder.path)
    folder.update(step=1)  # the next checkpoint says it
    assert folder.state()["step"] == 1
