"""Images per second of two workers on two cores beside one worker whose trainer and tasks share one core.

Two recipes: one bound by the network, one by cutting views. The rate is taken from the points that the run logs, from a
fifth of the run on, so that starting up does not count.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from pipeline.points import read_points

ROOT = Path(__file__).resolve().parent.parent
COMMON = [
    "--track.no-register",
    "--evaluate.knn-every=100000",
    "--train.checkpoint-every=100000",
    "--data.held-out=0",
    "--train.log-every=5",
]
BOUND_BY = {
    "network": ["--train.steps=100"],
    "views": [
        "--train.steps=150",
        "--backbone.width=0.125",
        "--backbone.depth=1 1 1 1",
        "--backbone.stem=imagenet",
        "--data.path=patches:pixels=128",
        "--views.global.size=64",
        "--views.global.count=2",
        "--views.local.size=32",
        "--views.local.count=6",
    ],
}


def rate(settings: list[str], workers: int, cores: set[int]) -> float:
    """Images per second of one run on these cores."""
    with tempfile.TemporaryDirectory() as folder:
        options = [part for setting in settings for part in (setting.replace("=", " ", 1).split(" ") if " " in setting else [setting])]
        command = [sys.executable, str(ROOT / "manyviews.py"), "pretrain", "swav-small", f"--runs-dir={folder}", "--run=it"]
        command += [f"--train.workers={workers}", "--train.threads=1", *COMMON, *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, preexec_fn=lambda: os.sched_setaffinity(0, cores))
        points = [p for p in read_points(Path(folder) / "it") if "loss" in p["metrics"]]
    points = points[len(points) // 5 :]
    return 128 * (points[-1]["step"] - points[0]["step"]) / (points[-1]["time"] - points[0]["time"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1, help="repetitions, one after the other")
    options = parser.parse_args()
    first, second, *_ = sorted(os.sched_getaffinity(0))
    for bound, settings in BOUND_BY.items():
        for _ in range(options.pairs):
            one, two = rate(settings, 1, {first}), rate(settings, 2, {first, second})
            print(
                f"bound by {bound}: 1 worker, 1 core {one:.0f} images/s; 2 workers, 2 cores {two:.0f} images/s; ratio {two / one:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
