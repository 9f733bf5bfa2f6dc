"""What a recipe learns and what it costs: kNN beside its baselines over several seeds, with wall and CPU time of the whole command."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def once(recipe: str, seed: int, settings: list[str], folder: Path) -> dict[str, float]:
    """One run in a process of its own: its scores in points, wall time and CPU time (its own and its children's) in s."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    result = folder / f"{seed}.json"
    command = [sys.executable, str(ROOT / "manyviews.py"), "pretrain", recipe, f"--train.seed={seed}", f"--runs-dir={folder}"]
    subprocess.run([*command, f"--json={result}", *settings], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    scores = {key: 100 * value for key, value in json.loads(result.read_text())["scores"].items() if isinstance(value, float)}
    best = max(scores[key] for key in ("raw_l2", "untrained", "untrained_calibrated"))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink()) / 1e6
    return scores | {"gain": scores["trained"] - best, "wall": time.monotonic() - began, "cpu": cpu, "disk_mb": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?", default="swav-small")
    parser.add_argument("--seeds", type=int, default=3)
    options, settings = parser.parse_known_args()
    rows = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(once(options.recipe, seed, settings, Path(folder)))
        print(f"seed {seed}: " + "  ".join(f"{key} {value:.1f}" for key, value in rows[-1].items()), flush=True)
    for key in rows[0]:
        values = [row[key] for row in rows]
        print(f"{key:22} mean {statistics.mean(values):7.1f}   min {min(values):7.1f}   max {max(values):7.1f}")


if __name__ == "__main__":
    main()
