"""A sweep against the same runs one by one: wall time of both as a user starts them, and how soon trials start.

    python benchmarks/sweeps.py --trials 4 --steps 60

The single runs are `manyviews pretrain` with each trial's values, in the same order; nothing is cut. Both share the machine
with whatever else runs, so half of the single runs come before the sweep and half after it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tuning.best import settings_line

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--recipe", default="swav-small")
    arguments.add_argument("--trials", type=int, default=4)
    arguments.add_argument("--steps", type=int, default=60)
    arguments.add_argument("--space", nargs="+", default=["method.temperature=log:0.05:0.5"])
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        common = [f"--train.steps={options.steps}", f"--evaluate.knn-every={max(1, options.steps // 5)}", f"--runs-dir={folder}"]
        from pipeline.recipes import load_recipe
        from tuning.sampling import random_values
        from tuning.space import parse_space

        params = parse_space(options.space, load_recipe(options.recipe))
        values = [random_values(params, 0, n) for n in range(options.trials)]

        def single(number: int) -> float:
            return timed("pretrain", options.recipe, *settings_line(values[number]).split(), *common, "--track.no-register")

        half = options.trials // 2
        one_by_one = sum(single(number) for number in range(half))
        count = [f"--trials={options.trials}", "--scheduler=none", "--name=sweep", "--track.no-register"]
        together = timed("tune", options.recipe, "--space", *options.space, *count, *common)
        one_by_one += sum(single(number) for number in range(half, options.trials))
        trials = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("sweep/trial-*/trial.json"))]
    starts = ", ".join(f"{trial['start_seconds']:.1f}" for trial in trials)
    print(f"one by one {one_by_one:.0f} s, as a sweep {together:.0f} s: {together / one_by_one:.2f} times")
    print(f"training of the trials {sum(trial['seconds'] for trial in trials):.0f} s; starts of the trials {starts} s")


def timed(*command: str) -> float:
    """Wall seconds of a verb in a process of its own."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / "manyviews.py"), *command], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
