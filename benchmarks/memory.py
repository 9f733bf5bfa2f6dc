"""Peak memory of a run and of one with a stream ten times as long: all processes and the object store, as proportional set size."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
# a network small enough that the stream, not training, sets the pace
SMALL = [
    "--backbone.width=0.125",
    "--backbone.stem=imagenet",
    "--method.projector-hidden=64",
    "--method.num-prototypes=32",
    "--track.no-register",
    "--evaluate.knn-every=100000",
]


def total_pss(process: psutil.Process) -> int:
    """Bytes of a process and all that it started; shared pages, the object store among them, count once in all."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_full_info().pss
        except psutil.Error:  # it has ended meanwhile
            continue
    return total


def peak(steps: int, settings: list[str]) -> float:
    """Peak of one run in MB, sampled every half second."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "manyviews.py"), "pretrain", "swav-small", f"--train.steps={steps}", f"--runs-dir={folder}"]
        process = subprocess.Popen([*command, *SMALL, *settings], stdout=subprocess.DEVNULL)
        highest, watched = 0, psutil.Process(process.pid)
        while process.poll() is None:
            try:
                highest = max(highest, total_pss(watched))
            except psutil.Error:
                break
            time.sleep(0.5)
        if process.wait():
            raise SystemExit(f"the run of {steps} steps ended with exit code {process.returncode}")
    return highest / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    options, settings = parser.parse_known_args()
    short, long = peak(options.steps, settings), peak(10 * options.steps, settings)
    print(f"{options.steps} steps: {short:.0f} MB   {10 * options.steps} steps: {long:.0f} MB   ratio {long / short:.3f}")


if __name__ == "__main__":
    main()
