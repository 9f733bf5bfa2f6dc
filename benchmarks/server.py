"""An MLflow server that stops in mid-run and comes back: what the run loses in time, and whether every point arrives.

Two runs of the same recipe in turn, one with the server up throughout, one whose server is killed after a third of the
steps and started again after two thirds. Compared: the time from the first point to the last.
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

from pipeline.mlflow_client import mlflow_client
from pipeline.points import read_points

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


def run(folder: Path, port: int, name: str, steps: int, disturbed: bool) -> tuple[float, int, int]:
    """Seconds between the first and the last point of training, points of the run, and how many of them the server has."""
    server = start_server(folder, port)
    command = [sys.executable, str(ROOT / "manyviews.py"), "pretrain", "swav-small", f"--runs-dir={folder}", f"--run={name}"]
    command += [f"--track.uri=http://127.0.0.1:{port}", f"--train.steps={steps}", "--evaluate.knn-every=100000", "--track.no-register"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for part in (1, 2) if disturbed else ():
            while last_step(folder / name) < part * steps // 3:
                assert process.poll() is None, "the run ended early"
                time.sleep(0.1)
            if part == 1:
                kill(server)
            else:
                server = start_server(folder, port)
        assert process.wait() == 0, "the run failed"
        points = [point for point in read_points(folder / name) if "loss" in point["metrics"]]
        client = mlflow_client(f"http://127.0.0.1:{port}")
        experiment = client.get_experiment_by_name("manyviews")
        found = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
        assert [it.info.status for it in found] == ["FINISHED"]
        arrived = {metric.step for metric in client.get_metric_history(found[0].info.run_id, "loss")}
        return points[-1]["time"] - points[0]["time"], len(points), len(arrived & {point["step"] for point in points})
    finally:
        process.kill()
        kill(server)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        port = it.getsockname()[1]
    ratios = []
    for pair in range(options.pairs):
        with tempfile.TemporaryDirectory() as folder:
            rows = {name: run(Path(folder), port, name, options.steps, name == "disturbed") for name in ("undisturbed", "disturbed")}
        ratios.append(rows["disturbed"][0] / rows["undisturbed"][0])
        for name, (seconds, points, arrived) in rows.items():
            print(f"pair {pair}, server {name}: {seconds:.1f} s, {arrived} of {points} points arrived", flush=True)
    print(f"disturbed / undisturbed: median {statistics.median(ratios):.3f} of {', '.join(f'{r:.3f}' for r in ratios)}")


if __name__ == "__main__":
    main()
