"""Tracking: nothing is lost, nothing blocks, no run is left running."""

from __future__ import annotations

import http.server
import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from methods.parts.errors import ConfigError
from pipeline.metrics_log import read_points
from pipeline.tracking.client import default_uri, mlflow_client
from pipeline.tracking.run_tracker import Tracker, sync

DEAD = "http://127.0.0.1:9"  # nothing listens on the discard port


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return default_uri(tmp_path_factory.mktemp("runs"))


def start(folder: Path, uri: str | None, **changes: Any) -> Tracker:
    settings: dict[str, Any] = {"experiment": "tests", "name": folder.name, "params": {"lr": 0.1}, "tags": {"method": "swav"}} | changes
    params = settings.pop("params")
    return Tracker.open(folder, uri=uri, params=lambda: params, **settings)


def state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "tracking.json").read_text())


def run_of(folder: Path, uri: str) -> Any:
    return mlflow_client(uri).get_run(state(folder)["run_id"])


def history(folder: Path, uri: str, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in mlflow_client(uri).get_metric_history(state(folder)["run_id"], key)]


def test_a_run_arrives_whole_and_is_ended(tmp_path: Path, uri: str) -> None:
    tracker = start(tmp_path / "a", uri, params={"views": (2, 4), "long": "x" * 9000})
    for step in range(1, 21):
        tracker.log(step, {"train/loss": 1 / step, "odd name@1": float(step)})
    figure = tmp_path / "curve.txt"
    figure.write_text("curve")
    tracker.artifact(figure, "figures")
    tracker.set_tags({"data": "abc"})
    assert tracker.close("FINISHED") == 0

    run = run_of(tmp_path / "a", uri)
    assert run.info.status == "FINISHED" and run.info.run_name == "a"
    assert run.data.params["views"] == "(2, 4)" and len(run.data.params["long"]) == 6000
    assert run.data.tags["method"] == "swav" and run.data.tags["data"] == "abc"
    assert history(tmp_path / "a", uri, "train/loss") == [(step, 1 / step) for step in range(1, 21)]
    assert len(history(tmp_path / "a", uri, "odd name_1")) == 20
    assert [f.path for f in mlflow_client(uri).list_artifacts(run.info.run_id, "figures")] == ["figures/curve.txt"]
    assert str(tmp_path.parent) in run.info.artifact_uri  # beside the database, not in the current folder


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_the_end_is_told(tmp_path: Path, uri: str, status: Any) -> None:
    tracker = start(tmp_path / "a", uri)
    assert tracker.close(status) == 0
    run = run_of(tmp_path / "a", uri)
    assert run.info.status == status and run.info.end_time >= run.info.start_time


def test_numbers_that_are_not_finite_survive(tmp_path: Path, uri: str) -> None:
    folder = tmp_path / "a"
    tracker = start(folder, uri)
    tracker.log(1, {"loss": math.nan, "up": math.inf, "down": -math.inf, "fine": 2.0})
    assert tracker.close() == 0

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for line in (folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    point = read_points(folder)[0]["metrics"]
    assert math.isnan(point["loss"]) and point["up"] == math.inf and point["down"] == -math.inf and point["fine"] == 2.0
    assert math.isnan(history(folder, uri, "loss")[0][1]) and history(folder, uri, "fine") == [(1, 2.0)]


def test_a_resumed_run_goes_on_and_has_each_step_once(tmp_path: Path, uri: str) -> None:
    folder = tmp_path / "a"
    first = start(folder, uri)
    run_id = first.run_id()
    for step in (10, 20, 30, 40):
        first.log(step, {"loss": float(step)})
    assert first.close("FAILED") == 0
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 50, "ti')  # killed in the middle of a line

    second = start(folder, uri, params={"lr": 0.2})  # a parameter that cannot change must not stop anything
    second.rewind(20)
    assert [p["step"] for p in read_points(folder)] == [10, 20]
    assert second.run_id() == run_id
    assert run_of(folder, uri).info.status == "RUNNING"
    for step in (30, 40, 50):
        second.log(step, {"loss": float(step)})
    assert second.close() == 0
    assert [p["step"] for p in read_points(folder)] == [10, 20, 30, 40, 50]
    assert sorted(set(history(folder, uri, "loss"))) == [(s, float(s)) for s in (10, 20, 30, 40, 50)]
    run = run_of(folder, uri)
    assert run.info.status == "FINISHED" and run.data.params["lr"] == "0.1"


def test_another_server_gets_a_run_of_its_own(tmp_path: Path, uri: str) -> None:
    folder = tmp_path / "a"
    first = start(folder, DEAD)
    first.log(1, {"loss": 1.0})
    assert first.close() > 0
    second = start(folder, uri)
    second.log(2, {"loss": 2.0})
    assert second.close() == 0
    assert history(folder, uri, "loss") == [(1, 1.0), (2, 2.0)]


def test_a_dead_server_costs_nothing_and_sync_replays(tmp_path: Path, uri: str) -> None:
    folder = tmp_path / "a"
    begun = time.monotonic()
    tracker = start(folder, DEAD)
    for step in range(1, 1501):  # more than one call may carry
        tracker.log(step, {"loss": float(step)})
    assert time.monotonic() - begun < 2
    assert tracker.run_id(timeout=0.1) is None
    asked = time.monotonic()
    assert tracker.run_id(timeout=60) is None and time.monotonic() - asked < 20  # two failures are an answer
    begun = time.monotonic()
    assert tracker.close("FINISHED", timeout_s=20) >= 1500
    assert time.monotonic() - begun < 20 and tracker.problem
    with pytest.raises(ConfigError, match=r"track\.uri=http://127\.0\.0\.1:9"):
        sync(folder)

    (folder / "tracking.json").write_text(json.dumps(state(folder) | {"uri": uri}))  # the server is up again
    assert sync(folder) == 1500
    assert sync(folder) == 0
    assert [step for step, _ in history(folder, uri, "loss")] == list(range(1, 1501))
    run = run_of(folder, uri)
    assert run.info.status == "FINISHED" and run.data.params["lr"] == "0.1" and run.data.tags["method"] == "swav"


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that takes every request and never answers."""
    release = threading.Event()

    class Silent(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            release.wait(30)

        do_POST = do_GET

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    release.set()
    server.shutdown()
    server.server_close()


def test_a_server_that_hangs_cannot_hold_the_end_of_a_run(tmp_path: Path, silent_server: str) -> None:
    begun = time.monotonic()
    tracker = start(tmp_path / "a", silent_server)
    tracker.log(1, {"loss": 1.0})
    assert tracker.close(timeout_s=1) > 0
    assert time.monotonic() - begun < 4
    assert [p["step"] for p in read_points(tmp_path / "a")] == [1]


def test_a_killed_run_is_ended_by_sync(tmp_path: Path, uri: str) -> None:
    folder = tmp_path / "a"
    tracker = start(folder, uri)
    assert tracker.run_id() is not None
    tracker._stop.set()  # the process is gone: nothing more is sent, nothing is closed
    tracker._wake.set()
    assert tracker._thread is not None
    tracker._thread.join(10)
    tracker.log(7, {"loss": 7.0})
    assert sync(folder) == 1
    assert run_of(folder, uri).info.status == "KILLED"


def test_a_point_that_the_server_refuses_does_not_hold_up_the_others(tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.tracking.run_tracker._mlflow_name", lambda key: key)  # as if a server had stricter rules than we know
    tracker = start(tmp_path / "a", uri)
    tracker.log(1, {"loss": 1.0})
    tracker.log(2, {"not@allowed": 1.0})
    tracker.log(3, {"loss": 3.0})
    assert tracker.close() == 0
    assert history(tmp_path / "a", uri, "loss") == [(1, 1.0), (3, 3.0)]


def test_a_run_deleted_on_the_server_is_made_anew(tmp_path: Path, uri: str) -> None:
    folder = tmp_path / "a"
    first = start(folder, uri)
    first.log(1, {"loss": 1.0})
    assert first.close() == 0
    gone = state(folder)["run_id"]
    mlflow_client(uri).delete_run(gone)
    second = start(folder, uri)
    second.log(2, {"loss": 2.0})
    assert second.close() == 0
    assert state(folder)["run_id"] != gone
    assert run_of(folder, uri).data.params["lr"] == "0.1"
    assert history(folder, uri, "loss") == [(1, 1.0), (2, 2.0)]


def test_a_request_lost_on_the_way_back_makes_no_second_run(tmp_path: Path, uri: str) -> None:
    folder = tmp_path / "a"
    tracker = start(folder, uri)
    run_id = tracker.run_id()
    assert tracker.close() == 0
    (folder / "tracking.json").write_text(json.dumps(state(folder) | {"run_id": None, "sent": 0}))
    again = start(folder, uri)
    assert again.run_id() == run_id
    again.close()


def test_a_full_disk_does_not_stop_the_loop_and_is_told(tmp_path: Path, uri: str) -> None:
    points = tmp_path / "a" / "metrics.jsonl"
    tracker = start(tmp_path / "a", uri)
    tracker.log(1, {"loss": 1.0})
    points.rename(tmp_path / "kept")
    points.mkdir()  # cannot be written, for whatever reason
    tracker.log(2, {"loss": 2.0})
    assert tracker.problem == "metrics.jsonl cannot be written: Is a directory"
    points.rmdir()
    (tmp_path / "kept").rename(points)
    tracker.log(3, {"loss": 3.0})
    assert tracker.close() == 0
    assert history(tmp_path / "a", uri, "loss") == [(1, 1.0), (3, 3.0)]


def test_logging_waits_for_nobody(tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(path: Path, value: Any) -> None:
        time.sleep(0.3)
        path.write_text(json.dumps(value))

    tracker = start(tmp_path / "a", uri)
    assert tracker.run_id() is not None
    monkeypatch.setattr("pipeline.tracking.run_tracker.write_json", slow)  # a disk that takes its time to flush
    begun, longest = time.monotonic(), 0.0
    while time.monotonic() - begun < 2:
        asked = time.monotonic()
        tracker.log(1, {"loss": 1.0})
        longest = max(longest, time.monotonic() - asked)
        time.sleep(0.01)
    assert longest < 0.2
    assert tracker.close() == 0


def test_only_a_tracked_run_can_be_sent(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tracking\.json"):
        sync(tmp_path)
