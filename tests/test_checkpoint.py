"""Checkpoints on a disk and in an object store: written beside training, whole or absent."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import checkpoint
from pipeline.checkpoint import CheckpointWriter
from pipeline.run_folder import RunFolder
from pipeline.storage import files
from pipeline.storage.place import Place
from tests.store import s3_store


@pytest.fixture(scope="module")
def bucket() -> Iterator[tuple[Any, dict[str, str]]]:
    with s3_store() as store:
        yield store


@pytest.fixture(params=["disk", "store"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """An empty folder for checkpoints, on a disk and in a store."""
    if request.param == "disk":
        return Place.of(tmp_path / "checkpoints")
    for key, value in request.getfixturevalue("bucket")[1].items():
        monkeypatch.setenv(key, value)
    return Place.of(f"s3://lake/{tmp_path.name}/checkpoints")


class Gate:
    """Holds every write until it is opened; notes what has been written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.written = threading.Event(), []
        write = torch.save

        def slow(content: Any, file: Any) -> None:
            assert self.open.wait(60)
            write(content, file)
            self.written.append(content)

        monkeypatch.setattr(torch, "save", slow)


def test_a_checkpoint_comes_back_as_it_was_and_its_tables_in_pieces(place: Place) -> None:
    state = {
        "method": torch.nn.BatchNorm1d(3).state_dict(),
        "optimizer": {"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
        "position": {"step": 3, "bad": {5: ("a.jpg", "truncated")}},
        "id_tables": {"labels": [torch.arange(4), torch.arange(2)]},
    }
    assert checkpoint.pointed_to(place) is None and checkpoint.last_step(place) == 0
    folder = checkpoint.save(place, state, step=3)
    assert checkpoint.pointed_to(place) == folder and checkpoint.last_step(place) == 3
    loaded = checkpoint.load(folder)
    assert checkpoint.state_hash(loaded) == checkpoint.state_hash(state) == checkpoint.hash_of_last(place)
    assert [piece.tolist() for piece in loaded["id_tables"]["labels"]] == [[0, 1, 2, 3], [0, 1]]
    del loaded["method"]["num_batches_tracked"]
    with pytest.raises(RuntimeError, match="num_batches_tracked"):  # states tell their version: only one of the first may lack it
        torch.nn.BatchNorm1d(3).load_state_dict(loaded["method"])


def test_only_what_is_pointed_to_or_every_nth_is_kept(place: Place) -> None:
    for step in (2, 4, 6, 8, 10):
        checkpoint.save(place, {"step": step}, step=step, best=step == 6, keep_every=4)
    assert place.folders() == ["step-00000004", "step-00000006", "step-00000008", "step-00000010"]
    pointed = [checkpoint.pointed_to(place, which) for which in ("last", "best")]
    assert [checkpoint.load(folder)["step"] for folder in pointed if folder] == [10, 6]


def test_training_goes_on_during_a_write_and_later_steps_are_not_in_it(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, writer, said = Gate(monkeypatch), CheckpointWriter(place), []
    weights, position = torch.zeros(3), {"step": 2, "bad": {}}
    writer.save({"method": {"w": weights}, "position": position}, step=2, then=lambda: said.append(checkpoint.last_step(place)))
    weights.add_(1)  # the next step
    position["step"] = 3
    position["bad"][7] = ("a.jpg", "empty")
    assert (gate.written, said, checkpoint.last_step(place)) == ([], [], 0), "training has gone on, and nothing is written or told yet"
    gate.open.set()
    writer.wait()
    assert said == [2], "a checkpoint is told of when it is whole"
    loaded = checkpoint.load(checkpoint.pointed_to(place))
    assert loaded["method"]["w"].tolist() == [0, 0, 0] and loaded["position"] == {"step": 2, "bad": {}}


def test_the_next_save_waits_for_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place.of(tmp_path)
    gate, writer = Gate(monkeypatch), CheckpointWriter(place, keep_every=2)
    writer.save({"step": 2}, step=2)
    second = threading.Thread(target=lambda: writer.save({"step": 4}, step=4))
    second.start()
    second.join(0.2)
    assert second.is_alive() and not gate.written
    gate.open.set()
    second.join(60)
    writer.wait()
    assert [content["step"] for content in gate.written] == [2, 4]
    assert place.folders() == ["step-00000002", "step-00000004"] and checkpoint.last_step(place) == 4


def test_a_failed_write_is_raised_by_the_next_save_and_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, said = CheckpointWriter(Place.of(tmp_path)), []
    with monkeypatch.context() as patch:

        def full(content: object, file: Any) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(torch, "save", full)
        writer.save({"step": 2}, step=2, then=lambda: said.append(2))
        with pytest.raises(checkpoint.DiskFull, match=r"checkpoint of step 2 could not be written .*No space left"):
            writer.save({"step": 4}, step=4)
        writer.wait()
        writer.save({"step": 4}, step=4)
        with pytest.raises(checkpoint.DiskFull, match="step 4"):
            writer.wait()
    writer.save({"step": 6}, step=6)
    writer.wait()
    assert said == [] and checkpoint.last_step(Place.of(tmp_path)) == 6


def test_a_store_that_refuses_leaves_the_last_checkpoint_whole(bucket: tuple[Any, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    client, environment = bucket
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    place = Place.of("s3://lake/refused/checkpoints")
    checkpoint.save(place, {"step": 1}, step=1)
    opened = files.open_output

    def half(path: str) -> Any:
        if path.endswith("state.pt"):
            raise PermissionError("no rights")
        return opened(path)

    monkeypatch.setattr(files, "open_output", half)
    with pytest.raises(checkpoint.DiskFull, match=r"step 2 could not be written to s3://lake/refused/checkpoints: no rights"):
        checkpoint.save(place, {"id_tables": {"labels": [torch.ones(3)]}}, step=2)
    assert checkpoint.last_step(place) == 1
    keys = [item["Key"] for item in client.list_objects_v2(Bucket="lake", Prefix="refused/")["Contents"]]
    assert not any("step-00000002" in key for key in keys)


@pytest.mark.parametrize(("broken", "last", "best"), [
    ("labels-0.pt", 1, 1), ("state.pt", 1, 1), ("last.json", 1, 1), ("best.json", 2, 1),
])  # fmt: skip
def test_whichever_write_fails_every_pointer_leads_to_a_whole_checkpoint(
    place: Place, monkeypatch: pytest.MonkeyPatch, broken: str, last: int, best: int
) -> None:
    def state(step: int) -> dict[str, Any]:
        return {"step": step, "id_tables": {"labels": [torch.full((2,), step)]}}

    def failing(original: Any) -> Any:
        def write(file: Place, *content: Any) -> Any:
            if file.name == broken:
                raise OSError("no space left")
            return original(file, *content)

        return write

    checkpoint.save(place, state(1), step=1, best=True)
    with monkeypatch.context() as patch:
        patch.setattr(Place, "writing", failing(Place.writing))
        patch.setattr(Place, "write", failing(Place.write))
        with pytest.raises(checkpoint.DiskFull, match=r"step 2 could not be written .*no space left"):
            checkpoint.save(place, state(2), step=2, best=True)
    for which, step in (("last", last), ("best", best)):
        found = checkpoint.load(checkpoint.pointed_to(place, which))
        assert found["step"] == step and found["id_tables"]["labels"][0].tolist() == [step, step]


KILLED = """
import sys, time, torch
from pipeline.storage.place import Place
from pipeline import checkpoint
place = Place.of(sys.argv[1])
checkpoint.save(place, {"w": torch.ones(1000)}, step=1)
write = torch.save
def half(content, file):
    file.write(b"PK half of it")
    file.flush()
    print("writing", flush=True)
    time.sleep(60)
torch.save = half
writer = checkpoint.CheckpointWriter(place)
writer.save({"w": torch.zeros(1000)}, step=2)
writer.wait()
"""


def test_a_process_killed_in_the_middle_of_a_write_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    place = Place.of(tmp_path)
    assert place.folders() == ["step-00000001", "step-00000002"], "half of the second lies there"
    assert checkpoint.last_step(place) == 1
    assert checkpoint.load(checkpoint.pointed_to(place))["w"].sum() == 1000
    checkpoint.save(place, {"w": torch.zeros(3)}, step=3, keep_every=1)
    assert place.folders() == ["step-00000001", "step-00000003"], "what is not whole is not kept"


def test_a_worker_reads_and_changes_a_run_by_its_uri(bucket: tuple[Any, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    client, environment = bucket
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    client.put_object(Bucket="lake", Key="seen/mine/config.yaml", Body=b"method: x\n")
    client.put_object(Bucket="lake", Key="seen/mine/run.json", Body=b'{"status": "running", "recipe": "toy"}')
    run = RunFolder("s3://lake/seen/mine")
    assert (run.name, run.config_text(), run.state()["status"]) == ("mine", "method: x\n", "running")
    assert run.checkpoints == Place("s3://lake/seen/mine/checkpoints")
    run.record_checkpoint(step=4, bad_images=b'{"id": 3}\n', total_steps=8)
    found = json.loads(client.get_object(Bucket="lake", Key="seen/mine/run.json")["Body"].read())
    assert found == {"status": "running", "recipe": "toy", "step": 4, "total_steps": 8}
    assert run.bad_images.read() == b'{"id": 3}\n'
