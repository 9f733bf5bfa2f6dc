"""Tracking of a run: metrics, parameters and files are stored locally and sent to MLflow by a background thread.

`metrics.jsonl` has all metrics. `tracking.json` has everything needed to create the MLflow run, and the position up to which
metrics were sent. If the server did not answer, `sync` sends the rest later.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from methods.parts.errors import ConfigError
from pipeline.metrics_log import append_line, drop_torn_line, encode, parse, read_lines, read_points
from pipeline.run_folder import RunFolder, write_json
from pipeline.storage.place import write_atomic
from pipeline.tracking.client import default_uri, experiment_id, is_active, mlflow_client

__all__ = ["EndStatus", "Tracker", "default_uri", "read_points", "sync"]

EndStatus = Literal["FINISHED", "FAILED", "KILLED"]
METRICS_PER_CALL, PARAMS_PER_CALL, VALUE_CHARACTERS = 1000, 100, 6000  # MLflow's limits
# loading MLflow and making a database occupies a core for seconds, so the thread waits for the first metrics and some time after them
FIRST_POINT_S, SETTLING_S = 60.0, 10.0
LONGEST_PAUSE = 60.0  # s between two attempts to reach a server


class Tracker:
    """Tracks one run in one process, without blocking or stopping training.

    Call `open`, then `log`, `artifact` and `set_tags` any number of times, then `close` once.
    """

    def __init__(self, folder: Path, state: dict[str, Any]) -> None:
        self.folder = folder
        self._state = state
        self._lock = threading.Lock()  # guards the state and metrics.jsonl; not held during requests and disk writes
        self._saving = threading.Lock()  # guards the file tracking.json; acquired before `_lock`
        self._wake, self._asked, self._known, self._closing, self._stop = (threading.Event() for _ in range(5))
        self._rewinds = self._failures = 0
        self._client: Any = None
        self._params: Callable[[], Mapping[str, object]] = dict
        self._thread: threading.Thread | None = None
        self.problem: str | None = None  # the last failure, for the user
        if state["run_id"] and state["attached"]:
            self._known.set()

    # ------------------------------------------------------------------ open and close

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        uri: str | None,
        experiment: str,
        name: str,
        params: Callable[[], Mapping[str, object]],
        tags: Mapping[str, object],
    ) -> Tracker:
        """Start tracking, or continue the MLflow run in the folder's `tracking.json`.

        Args:
            params: called at the start of a run, and if the server no longer has the run.
            uri: tracking server; None = the SQLite database beside the run folder.
        """
        folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        uri = uri or default_uri(folder.parent)
        state: dict[str, Any] = {"uri": uri, "experiment": experiment, "name": name, "run_id": None, "sent": 0, "key": uuid.uuid4().hex}
        state |= {"started": time.time(), "params": {}, "artifacts": [], "tags": {}}
        former = _read_state(folder)
        if former and (former["uri"], former["experiment"]) == (uri, experiment):
            state |= former  # with the first parameters, which cannot change in MLflow
        else:
            state["params"] = _as_strings(params())
        state["tags"] |= _as_strings(tags)
        state |= {"status": "RUNNING", "ended": None, "attached": False}
        drop_torn_line(folder / "metrics.jsonl")
        tracker = cls(folder, state)
        tracker._params = params
        tracker._save()
        tracker._thread = threading.Thread(target=tracker._work, name="tracking", daemon=True)
        tracker._thread.start()
        return tracker

    def run_id(self, timeout: float = 60.0) -> str | None:
        """Return the id of the MLflow run. Wait at most `timeout` s; None if the server does not answer or fails twice in a row."""
        deadline = time.monotonic() + timeout
        self._asked.set()
        self._wake.set()
        while not self._known.wait(min(0.1, max(0.0, deadline - time.monotonic()))):
            if self._failures >= 2 or time.monotonic() >= deadline:
                return None
        run_id: str | None = self._state["run_id"]
        return run_id

    def close(self, status: EndStatus = "FINISHED", timeout_s: float = 30.0) -> int:
        """Send the remaining data and end the MLflow run, within `timeout_s` s; give up earlier if the server does not answer.

        Returns:
            Number of points, files, tags and parameters that were not sent.
        """
        with self._lock:
            self._state |= {"status": status, "ended": time.time()}
        self._save()
        self._closing.set()
        self._asked.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout_s)
        self._stop.set()
        return self.unsent()

    # ------------------------------------------------------------------ recording

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of `step` (completed optimizer steps) in `metrics.jsonl`; the thread sends them."""
        try:
            with self._lock:
                append_line(self.folder, encode(step, metrics))
        except OSError as error:  # a full disk stops the run at its next checkpoint, with a clear message
            self.problem = f"metrics.jsonl cannot be written: {error.strerror}"
        self._wake.set()

    def wake(self) -> None:
        """Send points that another process has appended."""
        self._wake.set()

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Send a file or folder, with its content at the time of sending, to `folder` among the artifacts of the run."""
        self._change(lambda state: state["artifacts"].append([str(path.resolve()), folder]))

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Set tags of the MLflow run."""
        self._change(lambda state: state["tags"].update(_as_strings(tags)))

    def rewind(self, step: int) -> None:
        """Remove every point after `step`, the step of the checkpoint from which the run is resumed."""
        path = self.folder / "metrics.jsonl"
        with self._lock, contextlib.suppress(OSError):
            kept, sent, position = [], 0, 0
            for line in path.read_bytes().splitlines(keepends=True):
                position += len(line)
                if (point := parse(line)) is not None and point["step"] <= step:
                    kept.append(line)
                    sent += len(line) if position <= self._state["sent"] else 0
            write_atomic(path, b"".join(kept))
            self._state["sent"] = sent
            self._rewinds += 1
        self._save()

    def unsent(self) -> int:
        """Return the number of points, files, tags and parameters that the server does not have."""
        with self._lock:
            state = self._state
            waiting = len(state["params"]) + len(state["tags"]) + len(state["artifacts"]) + (state["status"] is not None)
            points = 0
            with contextlib.suppress(OSError), open(self.folder / "metrics.jsonl", "rb") as file:
                file.seek(state["sent"])
                points = sum(1 for _ in file)
            return int(waiting + points)

    # ------------------------------------------------------------------ sending

    def _change(self, change: Callable[[dict[str, Any]], object]) -> None:
        with self._lock:
            change(self._state)
        self._save()
        self._wake.set()

    def _save(self) -> None:
        with self._saving, contextlib.suppress(OSError):
            with self._lock:
                state = copy.deepcopy(self._state)
            write_json(self.folder / "tracking.json", state)

    def _work(self) -> None:
        self._wake.wait(FIRST_POINT_S)
        self._asked.wait(SETTLING_S)
        while not self._stop.is_set():
            self._wake.clear()
            closing = self._closing.is_set()
            try:
                self.push()
                self._failures, self.problem = 0, None
                if closing:
                    return
                self._wake.wait()
                self._closing.wait(1.0)  # sends several points in one call
            except Exception as error:
                self._failures += 1
                self.problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
                if closing and self._failures >= 2:
                    return
                (self._stop if closing else self._closing).wait(1.0 if closing else min(LONGEST_PAUSE, 2.0 ** min(self._failures, 10)))

    def push(self) -> int:
        """Send everything in this thread. Return the number of points sent. Exceptions of MLflow are not caught."""
        self._attach()
        run_id, client = self._state["run_id"], self._client
        self._send_once("params", run_id)
        self._send_once("tags", run_id)
        sent = self._send_points(run_id)
        failed = self._send_artifacts(run_id)
        status = self._state["status"]
        if status not in (None, "RUNNING"):
            client.set_terminated(run_id, status, end_time=int(1000 * self._state["ended"]))
            self._state["status"] = None
            self._save()
        if failed is not None:
            raise failed
        return sent

    def _attach(self) -> None:
        """Find or create the MLflow run, once per process."""
        if self._client is not None and self._state["attached"]:
            return
        client = mlflow_client(self._state["uri"])
        run_id = self._state["run_id"]
        if run_id and not is_active(client, run_id):
            run_id, self._state["sent"] = None, 0  # deleted on the server: send everything to a new run
            self._state["params"] = _as_strings(self._params()) | self._state["params"]
        if run_id is None:
            experiment = experiment_id(client, self._state["uri"], self._state["experiment"])
            # a request that timed out may have created the run
            found = client.search_runs([experiment], f"tags.`manyviews.key` = '{self._state['key']}'", max_results=1)
            if not found:
                tags, begun = {"manyviews.key": self._state["key"]}, int(1000 * self._state["started"])
                found = [client.create_run(experiment, start_time=begun, tags=tags, run_name=self._state["name"])]
            run_id = found[0].info.run_id
        elif self._state["status"] == "RUNNING":
            client.update_run(run_id, status="RUNNING")
        self._client = client
        with self._lock:
            self._state |= {"run_id": run_id, "attached": True}
            if self._state["status"] == "RUNNING":
                self._state["status"] = None
        self._save()
        self._known.set()

    def _send_once(self, what: Literal["params", "tags"], run_id: str) -> None:
        from mlflow.entities import Param, RunTag

        kind = {"params": Param, "tags": RunTag}[what]
        with self._lock:
            waiting = dict(self._state[what])
        for some in _batched(waiting.items()):
            self._client.log_batch(run_id, **{what: [kind(_mlflow_name(key), value) for key, value in some]})
        with self._lock:
            self._state[what] = {key: value for key, value in self._state[what].items() if waiting.get(key) != value}
        if waiting:
            self._save()

    def _send_points(self, run_id: str) -> int:
        from mlflow.exceptions import MlflowException

        total = 0
        while True:
            with self._lock:
                start, rewinds = self._state["sent"], self._rewinds
                lines = read_lines(self.folder / "metrics.jsonl", start, METRICS_PER_CALL)
            if not lines:
                return total
            try:
                self._client.log_batch(run_id, metrics=_mlflow_metrics(lines))
            except MlflowException as error:
                if error.error_code != "INVALID_PARAMETER_VALUE":
                    raise
                for line in lines:  # one by one, to leave out only points that the server rejects
                    with contextlib.suppress(MlflowException):
                        self._client.log_batch(run_id, metrics=_mlflow_metrics([line]))
            total += len(lines)
            with self._lock:
                if self._rewinds == rewinds:
                    self._state["sent"] = start + sum(map(len, lines))
            self._save()

    def _send_artifacts(self, run_id: str) -> Exception | None:
        failed = None
        for entry in list(self._state["artifacts"]):
            path, folder = entry
            try:
                if Path(path).is_dir():
                    self._client.log_artifacts(run_id, path, artifact_path=folder or Path(path).name)
                elif Path(path).is_file():
                    self._client.log_artifact(run_id, path, artifact_path=folder)
            except Exception as error:  # the run is ended all the same
                failed = error
                continue
            with self._lock:
                self._state["artifacts"].remove(entry)
            self._save()
        return failed


def sync(folder: Path) -> int:
    """Send the data that an earlier process could not send, and end the MLflow run. Return the number of points sent.

    Raises:
        ConfigError: the run was not tracked, is in progress, or the server does not answer.
    """
    folder = folder.resolve()
    state = _read_state(folder)
    if state is None:
        raise ConfigError(f"run={folder.name}: has no tracking.json; only a run that was tracked can be sent")
    if RunFolder(folder).locked():
        raise ConfigError(f"run={folder.name}: is in progress and sends by itself; wait for its end")
    if state["status"] == "RUNNING" or (state["status"] is None and state["ended"] is None):
        state |= {"status": "KILLED", "ended": time.time()}  # its process was killed
    drop_torn_line(folder / "metrics.jsonl")
    tracker = Tracker(folder, state | {"attached": False})
    try:
        return tracker.push()
    except ConfigError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ConfigError(f"track.uri={state['uri']}: does not take the points ({reason}); try again when it is up") from None


def _mlflow_metrics(lines: Iterable[bytes]) -> list[Any]:
    from mlflow.entities import Metric

    points = [point for line in lines if (point := parse(line)) is not None]
    return [
        Metric(_mlflow_name(key), float(value), int(1000 * point["time"]), point["step"])
        for point in points
        for key, value in point["metrics"].items()
    ]


def _as_strings(values: Mapping[str, object]) -> dict[str, str]:
    """Return values as strings, cut at MLflow's limit."""
    return {key: str(value)[:VALUE_CHARACTERS] for key, value in values.items()}


def _mlflow_name(key: str) -> str:
    return re.sub(r"[^\w\-. /:]", "_", key)[:250]


def _batched(items: Iterable[tuple[str, str]]) -> Iterable[list[tuple[str, str]]]:
    rows = list(items)
    return (rows[i : i + PARAMS_PER_CALL] for i in range(0, len(rows), PARAMS_PER_CALL))


def _read_state(folder: Path) -> dict[str, Any] | None:
    try:
        state: dict[str, Any] = json.loads((folder / "tracking.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    return state
