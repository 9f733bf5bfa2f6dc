"""Kill a run with SIGKILL at random moments, resume it each time, and compare its whole final state with an undisturbed run's."""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = 200
# eleven steps make an epoch, a checkpoint is written every other step: kills fall inside epochs and into writes
RUN = [
    "pretrain",
    "swav-small",
    "--data.path=patches:per_photo=40",
    "--train.deterministic",
    f"--train.steps={STEPS}",
    "--train.global-batch-size=64",
    "--train.checkpoint-every=2",
    "--evaluate.knn-every=50",
    "--backbone.width=0.125",
    "--backbone.stem=imagenet",
    "--optim.base-lr=0.001",
    "--method.projector-hidden=64",
    "--method.num-prototypes=32",
    "--method.queue-length=128",
    "--method.queue-start-epoch=1",
    "--method.freeze-prototypes-epochs=1",
    "--track.no-register",
]


def start(arguments: list[str], runs: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "manyviews.py"), *arguments, f"--runs-dir={runs}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes], what: str) -> None:
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"{what} ended with exit code {process.returncode}:\n{said.decode()[-3000:]}")


def facts(runs: Path, name: str) -> dict[str, object]:
    try:
        return dict(json.loads((runs / name / "run.json").read_text()))
    except FileNotFoundError:
        return {}


def undisturbed(runs: Path, name: str = "undisturbed") -> str:
    """Run to the end; returns the hash of the final state."""
    finish(start([*RUN, f"--run={name}"], runs), "the undisturbed run")
    return str(facts(runs, name)["state_sha256"])


def disturbed(runs: Path, kills: int, seed: int, name: str = "killed", say: bool = False) -> tuple[str, list[int]]:
    """Kill the run up to `kills` times, resuming after each; returns the final hash and the steps last saved at each kill."""
    chance, steps = random.Random(seed), []
    process = start([*RUN, f"--run={name}"], runs)
    for _ in range(kills):
        before = facts(runs, name).get("step", 0)
        while process.poll() is None and facts(runs, name).get("step", 0) == before:
            time.sleep(0.02)  # until it has moved on, so that every life makes progress
        time.sleep(chance.uniform(0, 1.0))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        steps.append(int(str(facts(runs, name)["step"])))
        if say:
            print(f"killed after the checkpoint of step {steps[-1]} of {STEPS}", flush=True)
        process = start(["resume", name], runs)
    finish(process, "the last resume")
    return str(facts(runs, name)["state_sha256"]), steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        want = undisturbed(Path(folder))
        print(f"undisturbed: {want}", flush=True)
        got, steps = disturbed(Path(folder), options.kills, options.seed, say=True)
        print(f"killed {len(steps)} times: {got}\n{'equal' if got == want else 'DIFFERENT'}")
    raise SystemExit(got != want)


if __name__ == "__main__":
    main()
