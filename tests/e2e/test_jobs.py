"""Every verb as a submitted job: a real head with token authentication, the code uploaded, results in a shared folder."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from tests.conftest import USERS_ENV

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        importlib.util.find_spec("aiohttp_cors") is None, reason="a head that takes jobs needs ray[default]: pip install -e '.[cluster]'"
    ),
]
ROOT = Path(__file__).parent.parent.parent
TINY = [
    "swav-small",
    "--data.path=patches:per_photo=16",
    "--train.global-batch-size=32",
    "--backbone.width=0.125",
    "--method.projector-hidden=64",
    "--method.num-prototypes=16",
]


@dataclass(frozen=True)
class Head:
    """A Ray head of this test's own; nothing of the machine's other Rays is touched."""

    process: subprocess.Popen[bytes]
    token: str
    url: str
    client: Any

    def submit(self, command: str, **env_vars: str) -> str:
        end = time.monotonic() + 60
        while True:
            try:
                return str(self.client.submit_job(entrypoint=command, runtime_env={"working_dir": str(ROOT), "env_vars": env_vars}))
            except RuntimeError as error:  # the dashboard answers before the agent that starts jobs is there
                if "No available agent" not in str(error) or time.monotonic() > end:
                    raise
            time.sleep(0.5)

    def finish(self, job: str, timeout_s: float = 480.0) -> tuple[str, str]:
        """Status and log of a job when it has ended."""
        wait_until(lambda: self.client.get_job_status(job).is_terminal(), timeout_s, lambda: self.client.get_job_logs(job))
        return str(self.client.get_job_status(job)), self.client.get_job_logs(job)

    def run(self, *arguments: str) -> str:
        """Run a verb to its good end; returns the log."""
        status, log = self.finish(self.submit(shlex.join(["python", "manyviews.py", *arguments])))
        assert status == "SUCCEEDED", log
        assert_readable(log)
        return log

    def processes(self) -> list[psutil.Process]:
        """Every living process that descends from the head: they all inherit the token in their environment."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.pid != os.getpid() and process.environ().get("RAY_AUTH_TOKEN") == self.token:
                    found.append(process)
            except psutil.Error:  # gone, or another user's
                continue
        return found

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=60)


def wait_until(done: Callable[[], bool], timeout_s: float, words: Callable[[], str]) -> None:
    end = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < end, words()
        time.sleep(0.2)


def assert_readable(log: str) -> None:
    """Short lines about the run: no traces, no control codes, nothing of Ray's own after its two opening lines."""
    assert "\x1b" not in log and "\r" not in log
    assert not re.search(r"Traceback|Warning|WARNING|\(raylet|\(pid=|\(autoscaler|ray\.data|it/s\]", log), log


def free_port() -> int:
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return int(it.getsockname()[1])


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    from ray.job_submission import JobSubmissionClient

    token, port = uuid.uuid4().hex, free_port()
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # short, because Unix sockets allow 107 bytes
    environment = {k: v for k, v in USERS_ENV.items() if k != "PYTHONPATH"}
    # the mode is given, not left to Ray's default, which depends on its version and on files of the account
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    options = {
        "port": 0, "dashboard-port": port, "dashboard-agent-listen-port": free_port(), "ray-client-server-port": free_port(),
        "min-worker-port": 0, "max-worker-port": 0, "num-cpus": 2, "object-store-memory": 300_000_000, "temp-dir": folder,
    }  # fmt: skip
    ray = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]
    command = [*ray, "start", "--head", "--block", "--disable-usage-stats", *(f"--{k}={v}" for k, v in options.items())]
    log = folder / "head.log"
    with open(log, "wb") as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    it = None
    try:

        def answers() -> bool:
            assert process.poll() is None, log.read_text()
            try:
                return ask(url, token) == 200
            except OSError:
                return False

        wait_until(answers, 120, log.read_text)
        it = Head(process, token, url, JobSubmissionClient(url, headers={"Authorization": f"Bearer {token}"}))
        yield it
    finally:
        process.kill()
        process.wait()
        for left in it.processes() if it else []:
            left.kill()
        shutil.rmtree(folder, ignore_errors=True)


def ask(url: str, token: str | None) -> int:
    """HTTP status of the job list."""
    request = urllib.request.Request(f"{url}/api/jobs/", headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture(scope="module")
def finished(head: Head, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A shared runs folder with a run `first`: stopped with its job, resumed by another; and the logs of both."""
    runs = tmp_path_factory.mktemp("shared") / "runs"
    settings = ["--train.steps=4000", "--train.checkpoint-every=10000"]
    # time for the current step and its checkpoint; Ray's own limit of 3 s would often do
    command = ["python", "manyviews.py", "pretrain", *TINY, f"--runs-dir={runs}", "--run=first", *settings]
    job = head.submit(shlex.join(command), RAY_JOB_STOP_WAIT_TIME_S="60")
    points = runs / "first" / "metrics.jsonl"

    def trains() -> bool:
        assert not head.client.get_job_status(job).is_terminal(), head.client.get_job_logs(job)
        return points.exists() and '"loss"' in points.read_text()

    wait_until(trains, 240, lambda: head.client.get_job_logs(job))
    assert head.client.stop_job(job)
    status, stopped = head.finish(job)
    assert status == "STOPPED"
    config = runs / "first" / "config.yaml"
    config.write_text(config.read_text().replace("steps: 4000", f"steps: {last_step(runs) + 5}"))  # the rest need not take long
    return runs, stopped, head.run("resume", "first", f"--runs-dir={runs}", f"--json={runs / 'first.json'}")


def last_step(runs: Path) -> int:
    return int(json.loads((runs / "first" / "checkpoints" / "last.json").read_text())["step"])


def test_a_stranger_without_the_token_is_refused(head: Head) -> None:
    assert ask(head.url, head.token) == 200
    assert ask(head.url, None) == 401
    assert ask(head.url, uuid.uuid4().hex) == 403


def test_workers_get_the_uploaded_code_and_nothing_of_the_submitting_machine(head: Head) -> None:
    code = (
        "import json, os, ray\n"
        "from pipeline.data.ray_data import start_ray\n"
        "start_ray()\n"
        "@ray.remote\n"
        "def look():\n"
        "    import methods\n"
        "    return methods.__file__, os.environ['PYTHONPATH'], os.environ['OMP_NUM_THREADS'], os.environ['OMP_WAIT_POLICY']\n"
        "print('FOUND', json.dumps([os.listdir(), *ray.get(look.remote())]))\n"
    )
    # OMP_NUM_THREADS is ours too: what the job was submitted with stands, and Ray does not refuse the pair
    status, log = head.finish(head.submit(shlex.join(["python", "-c", code]), OMP_NUM_THREADS="3"))
    assert status == "SUCCEEDED", log
    assert_readable(log)
    files, imported, path, threads, policy = json.loads(log.split("FOUND ")[1])
    assert {"manyviews.py", "pipeline", "methods", "tuning", "pyproject.toml"} <= set(files)
    assert not {".git", ".venv", "runs", "mlruns", "build", ".pytest_cache"} & set(files), "see .rayignore"
    assert "runtime_resources" in imported
    assert str(ROOT) not in path
    assert (threads, policy) == ("3", "PASSIVE")


def test_a_job_stopped_in_the_middle_is_resumed_by_another(finished: tuple[Path, str, str]) -> None:
    runs, stopped, log = finished
    assert_readable(stopped)
    assert " resume first" in stopped
    end = last_step(runs)
    assert 15 <= end < 4000 and f"from step {end - 5}" in log
    assert re.search(rf"^step {end}/{end} .* loss [\d.]+ \(ln K 2\.773\) .* eta 0:00$", log, re.M)
    assert "kNN top-1, test images" in log
    assert json.loads((runs / "first.json").read_text())["status"] == "finished"
    assert (runs / "first" / "model" / "backbone.safetensors").is_file()
    assert not (ROOT / "first").exists() and not (ROOT / "runs" / "first").exists()


def test_evaluate_and_embed_as_jobs(head: Head, finished: tuple[Path, str, str]) -> None:
    runs, _, _ = finished
    head.run("evaluate", "first", f"--runs-dir={runs}", f"--json={runs / 'scores.json'}")
    trained = json.loads((runs / "first" / "evaluation.json").read_text())["trained"]
    assert json.loads((runs / "scores.json").read_text())["trained"] == pytest.approx(trained, abs=1e-6)
    log = head.run("embed", "first", f"--runs-dir={runs}", "--data.path=patches:per_photo=16", f"--to={runs / 'features'}")
    assert "361 embeddings" in log
    assert sum(pq.read_metadata(part).num_rows for part in (runs / "features").glob("part-*.parquet")) == 361


def test_a_search_as_a_job_whose_trials_are_groups_of_two_workers(head: Head, tmp_path: Path) -> None:
    """One after the other; the second learns nothing and is cut: its group is killed, and the job ends all the same."""
    search = ["--space", "optim.base_lr=choice:6e-3,1e-9", "--search=grid", "--grace=8", "--concurrent=1", "--name=groups"]
    settings = ["--train.steps=12", "--evaluate.knn-every=4", "--train.workers=2", "--train.threads=1", f"--runs-dir={tmp_path}"]
    # Ray's own warning about the number of processes may be in the log: each group brings four beside its workers
    status, log = head.finish(head.submit(shlex.join(["python", "manyviews.py", "tune", *TINY, *settings, *search])), timeout_s=800)
    assert status == "SUCCEEDED", log
    trials = [json.loads(path.read_text()) for path in sorted((tmp_path / "groups").glob("trial-*/trial.json"))]
    assert [(t["status"], t["step"]) for t in trials] == [("finished", 12), ("stopped", 8)], log
    assert "alias champion" in log and "[2/2 ended" in log
    wait_until(lambda: not [p for p in head.processes() if "RayTrainWorker" in " ".join(p.cmdline())], 30, lambda: "a group lives on")


def test_a_wrong_setting_fails_the_job_with_one_sentence(head: Head) -> None:
    status, log = head.finish(head.submit("python manyviews.py pretrain swav-small --data.num_shrads 4"))
    assert status == "FAILED"
    assert_readable(log)
    assert "data.num_shrads" in log and "data.num_shards" in log


def test_a_stopped_head_leaves_no_process_behind(head: Head) -> None:
    assert head.processes()
    head.stop()
    wait_until(lambda: not head.processes(), 30, lambda: str([p.cmdline() for p in head.processes()]))
