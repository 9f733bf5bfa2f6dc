"""An MLflow server that stops in mid-run and comes back: what the run loses in time, and whether every point arrives.

Two runs of the same recipe in turn. After a third of the steps a server is killed and after two thirds it is started again: in
the one run its own, in the other a second one that nobody uses, because a server that starts takes CPU seconds from the same
cores. Compared: the time from the first point to the last.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from pipeline.metrics_log import read_points
from pipeline.tracking.client import mlflow_client

ROOT = Path(__file__).resolve().parent.parent


def start_server(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """A server on this machine; returns when it answers."""
    command = [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={port}", "--workers=1"]
    command += [f"--backend-store-uri=sqlite:///{folder / 'mlflow.db'}", f"--artifacts-destination={folder / 'artifacts'}"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd=folder)
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return server
        except (urllib.error.URLError, OSError):
            assert server.poll() is None, "the server did not start"
            time.sleep(0.3)


def kill(server: subprocess.Popen[bytes]) -> None:
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def last_step(folder: Path) -> int:
    return max((point["step"] for point in read_points(folder)), default=0)


def run(folder: Path, name: str, steps: int, disturbed: bool) -> tuple[float, int, int]:
    """Seconds between the first and the last point of training, points of the run, and how many of them the server has."""
    places = {"own": (folder, free_port()), "unused": (folder / "unused", free_port())}
    places["unused"][0].mkdir(exist_ok=True)
    servers = {which: start_server(*place) for which, place in places.items()}
    lost = "own" if disturbed else "unused"
    uri = f"http://127.0.0.1:{places['own'][1]}"
    command = [sys.executable, str(ROOT / "manyviews.py"), "pretrain", "swav-small", f"--runs-dir={folder}", f"--run={name}"]
    command += [f"--track.uri={uri}", f"--train.steps={steps}", "--evaluate.knn-every=100000", "--track.no-register"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for part in (1, 2):
            while last_step(folder / name) < part * steps // 3:
                assert process.poll() is None, "the run ended early"
                time.sleep(0.1)
            if part == 1:
                kill(servers[lost])
            else:
                servers[lost] = start_server(*places[lost])
        assert process.wait() == 0, "the run failed"
        points = [point for point in read_points(folder / name) if "loss" in point["metrics"]]
        client = mlflow_client(uri)
        experiment = client.get_experiment_by_name("manyviews")
        found = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
        status = [it.info.status for it in found]
        assert status == ["FINISHED"], f"{status}: if the run ended before its server was back, give more --steps"
        arrived = {metric.step for metric in client.get_metric_history(found[0].info.run_id, "loss")}
        return points[-1]["time"] - points[0]["time"], len(points), len(arrived & {point["step"] for point in points})
    finally:
        process.kill()
        for server in servers.values():
            kill(server)


def free_port() -> int:
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return int(it.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    ratios = []
    for pair in range(options.pairs):
        with tempfile.TemporaryDirectory() as folder:
            rows = {name: run(Path(folder), name, options.steps, name == "disturbed") for name in ("undisturbed", "disturbed")}
        ratios.append(rows["disturbed"][0] / rows["undisturbed"][0])
        for name, (seconds, points, arrived) in rows.items():
            print(f"pair {pair}, server {name}: {seconds:.1f} s, {arrived} of {points} points arrived", flush=True)
    print(f"disturbed / undisturbed: median {statistics.median(ratios):.3f} of {', '.join(f'{r:.3f}' for r in ratios)}")


if __name__ == "__main__":
    main()
