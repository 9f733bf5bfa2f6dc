"""Images per second of two workers on two cores beside one worker whose trainer and tasks share one core.

Four recipes: one bound by the network, with 512 images for each worker; the same with 128, so that the hundred exchanges
of batch norm and gradients in a step, which take as long for any batch, weigh four times as much; one bound by the data,
eight small views of JPEGs of 1000 x 750 for a tiny network; the same views of images that need no decoding, where that
network's exchanges weigh most. The rate is taken from the points that the run logs.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.data.sources.patches import FILES, load_photo
from pipeline.metrics_log import read_points

ROOT = Path(__file__).resolve().parent.parent
COMMON = [
    "--track.no-register",
    "--evaluate.knn-every=100000",
    "--train.checkpoint-every=100000",
    "--train.threads=1",
    "--train.steps=5000",
    "--train.log-every=1",
    "--data.held-out=0",
]
ROWS = {"network": 512, "exchanges": 128, "data": 128, "views": 128}  # images for each worker
EIGHT_VIEWS = [
    "--backbone.width=0.125",
    "--backbone.depth",
    *"1111",
    "--backbone.stem=imagenet",
    "--views.global.size=64",
    "--views.global.count=2",
    "--views.local.size=32",
    "--views.local.count=6",
]
BOUND_BY = {
    "network": ["--backbone.width=0.5"],  # four times the demo's work, so that it counts on fast machines too
    "exchanges": [],
    "data": [*EIGHT_VIEWS, "--data.path={folder}/photographs"],
    "views": [*EIGHT_VIEWS, "--data.path=patches:pixels=128"],
}


def photographs(folder: Path, count: int = 512) -> None:
    """JPEGs of 1000 x 750, cut at random from the built-in photographs."""
    chance = random.Random(0)
    folder.mkdir()
    for i in range(count):
        photo = load_photo(i % len(FILES)).convert("RGB")
        width = chance.uniform(0.5, 1) * min(photo.width, photo.height * 4 / 3)
        left, top = chance.uniform(0, photo.width - width), chance.uniform(0, photo.height - width * 3 / 4)
        photo.resize((1000, 750), Image.Resampling.BICUBIC, (left, top, left + width, top + width * 3 / 4)).save(folder / f"{i:03d}.jpg")


def rate(bound: str, workers: int, cores: set[int], seconds: float) -> float:
    """Images per second of a run on these cores, from its fourth step on; the run is then asked to end."""
    batch = ROWS[bound] * workers
    with tempfile.TemporaryDirectory() as folder:
        settings = [word.format(folder=folder) for word in BOUND_BY[bound]]
        if bound == "data":
            photographs(Path(folder) / "photographs")
        command = [sys.executable, str(ROOT / "manyviews.py"), "pretrain", "swav-small", f"--runs-dir={folder}", "--run=it"]
        command += [f"--train.workers={workers}", f"--train.global-batch-size={batch}", *COMMON, *settings]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, preexec_fn=lambda: os.sched_setaffinity(0, cores))
        points: list[dict[str, Any]] = []
        while len(points) < 2 or points[-1]["time"] - points[0]["time"] < seconds:
            if process.poll() is not None:
                raise SystemExit(f"the run ended early, with exit code {process.returncode}")
            time.sleep(0.5)
            points = [p for p in read_points(Path(folder) / "it") if "loss" in p["metrics"] and p["step"] >= 4]
        process.send_signal(signal.SIGINT)
        process.wait()
    return batch * (points[-1]["step"] - points[0]["step"]) / (points[-1]["time"] - points[0]["time"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1, help="repetitions, one after the other")
    parser.add_argument("--seconds", type=float, default=40, help="of training, for each figure")
    parser.add_argument("--only", choices=list(BOUND_BY))
    options = parser.parse_args()
    first, second, *_ = sorted(os.sched_getaffinity(0))
    for bound in [options.only] if options.only else BOUND_BY:
        for _ in range(options.pairs):
            one, two = rate(bound, 1, {first}, options.seconds), rate(bound, 2, {first, second}, options.seconds)
            print(f"bound by {bound}: 1 worker, 1 core {one:.0f} images/s; 2 workers, 2 cores {two:.0f}; ratio {two / one:.2f}", flush=True)


if __name__ == "__main__":
    main()
