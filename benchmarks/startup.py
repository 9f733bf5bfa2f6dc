"""Seconds, and CPU seconds of every kind of process, from a command to its first optimizer step.

For `--help`, for a run in one process and for one with two workers; then, for each of the two, from `resume` to the first new
step after the driver was killed with SIGKILL. Nothing else should run on the machine, except where CPU seconds are enough.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from pathlib import Path

import psutil

from pipeline.metrics_log import read_points

ROOT = Path(__file__).resolve().parent.parent
RUN = [
    "--track.no-register",
    "--train.threads=1",
    "--train.steps=100000",
    "--train.log-every=1",
    "--train.checkpoint-every=5",
    "--evaluate.knn-every=100000",
]
MARK = "MANYVIEWS_STARTUP"  # in the environment of everything that a measured command starts


class Processes:
    """CPU seconds of all processes that descend from one command, also of those that have ended, by their kind."""

    def __init__(self) -> None:
        self.key = uuid.uuid4().hex
        self.mine: dict[psutil.Process, bool] = {}
        self.seen: dict[psutil.Process, tuple[str, float]] = {}

    def look(self) -> None:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):  # it has ended, or is another user's
                if process not in self.mine:
                    self.mine[process] = process.environ().get(MARK) == self.key
                if self.mine[process]:
                    times = process.cpu_times()
                    self.seen[process] = (kind(process.cmdline()) or self.seen.get(process, ("ended", 0.0))[0], times.user + times.system)

    def by_kind(self) -> list[tuple[str, int, float]]:
        """Kind, how many there were, CPU seconds in sum; the most first."""
        seconds: Counter[str] = Counter()
        count = Counter(name for name, _ in self.seen.values())
        for name, cpu in self.seen.values():
            seconds[name] += cpu
        return [(name, count[name], cpu) for name, cpu in seconds.most_common()]

    def end(self) -> None:
        for process in self.seen:
            with contextlib.suppress(psutil.Error):
                process.kill()


def kind(words: list[str]) -> str:
    """What a process is, from its command."""
    line = " ".join(words)
    if "manyviews.py" in line:
        return "driver"
    named = re.search(
        r"ray::[\w.]+|gcs_server|raylet/raylet|dashboard/agent|runtime_env/agent|log_monitor|monitor\.py|default_worker", line
    )
    return named[0] if named else line[:40]


def start(arguments: list[str], processes: Processes) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "manyviews.py"), *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {MARK: processes.key})


def wait(process: subprocess.Popen[bytes], processes: Processes, run: Path, beyond: int) -> float:
    """Seconds until a point beyond this step is written."""
    began = time.monotonic()
    while not any(point["step"] > beyond for point in steps(run)):
        if process.poll() is not None or time.monotonic() - began > 600:
            processes.end()
            raise SystemExit(f"no step beyond {beyond}; exit code {process.poll()}")
        processes.look()
        time.sleep(0.2)
    processes.look()
    return time.monotonic() - began


def steps(run: Path) -> list[dict[str, int]]:
    return [point for point in read_points(run) if "loss" in point["metrics"]] if (run / "metrics.jsonl").exists() else []


def show(what: str, seconds: float, processes: Processes, details: bool) -> None:
    rows = processes.by_kind()
    print(f"{what}: {seconds:.1f} s, {sum(cpu for _, _, cpu in rows):.1f} CPU s", flush=True)
    for name, count, cpu in rows if details else []:
        print(f"    {cpu:6.1f} CPU s  {count} x {name}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["help", "0", "2"], help="`--help`, one process, two workers; default: all")
    parser.add_argument("--no-resume", action="store_true", help="leave out the recovery after a kill")
    options = parser.parse_args()
    if options.only in (None, "help"):
        processes, began = Processes(), time.monotonic()
        process = start(["pretrain", "--help"], processes)
        while process.poll() is None:
            processes.look()
            time.sleep(0.01)
        show("pretrain --help", time.monotonic() - began, processes, details=False)
    for workers in [int(options.only)] if options.only in ("0", "2") else [0, 2] if options.only is None else []:
        with tempfile.TemporaryDirectory() as folder:
            run, processes = Path(folder) / "it", Processes()
            where = f"--runs-dir={folder}"
            process = start(["pretrain", "swav-small", where, "--run=it", f"--train.workers={workers}", *RUN], processes)
            seconds = wait(process, processes, run, beyond=0)
            show(f"{workers or 'no'} workers, first step", seconds, processes, details=True)
            if options.no_resume:
                processes.end()
                continue
            wait(process, processes, run, beyond=6)
            process.send_signal(signal.SIGKILL)
            process.wait()
            processes.end()  # its workers would train on for some seconds
            last = steps(run)[-1]["step"]
            again = Processes()
            process = start(["resume", "it", where], again)
            seconds = wait(process, again, run, beyond=last)
            show(f"{workers or 'no'} workers, resumed after SIGKILL of the driver, first new step", seconds, again, details=True)
            processes.end()
            again.end()


if __name__ == "__main__":
    main()
