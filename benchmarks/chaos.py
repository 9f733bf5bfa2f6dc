"""Kill a run with SIGKILL at random moments, resume it each time, and compare its whole final state with an undisturbed run's.

With `--workers 2` a local cluster of three nodes loses a worker, then a node, then the driver, each inside an epoch; the run
recovers by itself from the first two and is resumed after the third. With `--jobs` the run of two workers is a submitted job:
it is stopped, submitted again, loses its driver, and is submitted again. With `--preempt` the node of the workers is announced to be
taken away, and is; the run writes a checkpoint at the notice and goes on on the other one. With `--elastic` a run of one to two workers
loses one of its two nodes and goes on with one worker.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from pipeline import checkpoint
from pipeline.run_folder import RunFolder

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


def start(arguments: list[str], runs: Path, **environment: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "manyviews.py"), *arguments, f"--runs-dir={runs}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | environment)


def finish(process: subprocess.Popen[bytes], what: str) -> None:
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"{what} ended with exit code {process.returncode}:\n{said.decode()[-3000:]}")


def facts(runs: Path, name: str) -> dict[str, object]:
    try:
        return dict(json.loads((runs / name / "run.json").read_text()))
    except FileNotFoundError:
        return {}


def undisturbed(runs: Path, name: str = "undisturbed", settings: list[str] = RUN) -> str:
    """Run to the end; returns the hash of the final state."""
    finish(start([*settings, f"--run={name}"], runs), "the undisturbed run")
    return checkpoint.hash_of_last(RunFolder(runs / name).checkpoints)


def disturbed(
    runs: Path, kills: int, seed: int, name: str = "killed", say: bool = False, settings: list[str] = RUN
) -> tuple[str, list[int]]:
    """Kill the run up to `kills` times, resuming after each; returns the final hash and the steps last saved at each kill."""
    chance, steps = random.Random(seed), []
    process = start([*settings, f"--run={name}"], runs)
    for _ in range(kills):
        before = facts(runs, name).get("step", 0)
        while process.poll() is None and facts(runs, name).get("step", 0) == before:
            time.sleep(0.02)  # until it has moved on, so that every life makes progress
        time.sleep(chance.uniform(0, 3.0))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        steps.append(int(str(facts(runs, name)["step"])))
        if say:
            print(f"killed after the checkpoint of step {steps[-1]}", flush=True)
        process = start(["resume", name], runs)
    finish(process, "the last resume")
    return checkpoint.hash_of_last(RunFolder(runs / name).checkpoints), steps


# ---------------------------------------------------------------------------- several workers

# half as many steps of the same run: every one costs two processes a few exchanges
WORKERS = [*RUN, "--train.workers=2", "--train.threads=1", "--train.steps=100", "--evaluate.knn-every=25"]


@contextlib.contextmanager
def cluster(**head: Any) -> Iterator[Any]:
    """A head without work and two nodes for workers and tasks, on this machine."""
    from ray.cluster_utils import Cluster

    store = {"object_store_memory": int(1e9)}  # Ray's test cluster has 0.15 GB: full of batches it would spill, as no real node does
    local = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **store, **head})
    try:
        nodes = [local.add_node(num_cpus=2, **store) for _ in range(2)]
        local.wait_for_nodes()
        yield local, nodes
    finally:
        local.shutdown()


def workers_of(node: Any) -> list[psutil.Process]:
    """The training workers on a node: children of its raylet."""
    found = []
    for child in psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if "TrainWorker" in " ".join(child.cmdline()):
                found.append(child)
    return found


def progress(process: subprocess.Popen[bytes], runs: Path, name: str, beyond: int, patience_s: float = 120.0) -> float:
    """Seconds until a checkpoint beyond this step is written."""
    began = time.monotonic()
    while int(str(facts(runs, name).get("step", 0))) <= beyond:
        if process.poll() is not None:
            finish(process, "the run")
            raise SystemExit(f"the run ended at step {facts(runs, name).get('step')}, before it could be disturbed again")
        if time.monotonic() - began > patience_s:
            process.kill()
            raise SystemExit(f"no checkpoint beyond step {beyond} in {patience_s:.0f} s")
        time.sleep(0.05)
    return time.monotonic() - began


def disturbed_workers(runs: Path, name: str = "lost") -> tuple[str, dict[str, float]]:
    """Lose a worker, a node and the driver; returns the final hash and the seconds each recovery took."""
    took: dict[str, float] = {}
    with cluster() as (local, nodes):
        address = {"RAY_ADDRESS": local.address}
        process = start([*WORKERS, f"--run={name}"], runs, **address)
        progress(process, runs, name, beyond=12)

        [busy, *_] = [node for node in nodes if workers_of(node)]
        workers_of(busy)[-1].kill()
        step = int(str(facts(runs, name)["step"]))
        took["worker"] = progress(process, runs, name, beyond=step + 2)

        [busy, *_] = [node for node in nodes if workers_of(node)]
        local.remove_node(busy, allow_graceful=False)
        step = int(str(facts(runs, name)["step"]))
        took["node"] = progress(process, runs, name, beyond=step + 2)

        process.send_signal(signal.SIGKILL)
        process.wait()
        step = int(str(facts(runs, name)["step"]))
        process = start(["resume", name], runs, **address)
        took["driver"] = progress(process, runs, name, beyond=step)
        finish(process, "the resumed run")
    return checkpoint.hash_of_last(RunFolder(runs / name).checkpoints), took


def preempted(runs: Path, name: str = "preempted") -> tuple[str, dict[str, float]]:
    """Announce that a node is taken away, and take it 30 s later; returns the final hash, and the seconds until the checkpoint and until
    the run had moved on."""
    took: dict[str, float] = {}
    with cluster() as (local, nodes):
        settings = [*WORKERS, "--train.checkpoint-every=1000", "--train.log-every=2"]  # only the notice makes a checkpoint
        process = start([*settings, f"--run={name}"], runs, RAY_ADDRESS=local.address)
        metrics = runs / name / "metrics.jsonl"
        while not (metrics.is_file() and '"loss"' in metrics.read_text()):
            if process.poll() is not None:
                finish(process, "the run")
            time.sleep(0.1)
        [busy, *_] = [node for node in nodes if workers_of(node)]
        notice = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "30"]
        command = [Path(sys.executable).parent / "ray", "drain-node", "--address", local.address, "--node-id", busy.node_id, *notice]
        subprocess.run(command, check=True, capture_output=True)
        took["checkpoint"] = progress(process, runs, name, beyond=0)
        began, size, gone = time.monotonic(), metrics.stat().st_size, False
        while metrics.stat().st_size <= size and process.poll() is None:
            if not gone and time.monotonic() - began > 30 - took["checkpoint"]:
                gone = True
                local.remove_node(busy, allow_graceful=False)
            time.sleep(0.1)
        took["moved on"] = time.monotonic() - began
        finish(process, "the run on the node that remains")
    return str(facts(runs, name)["state_sha256"]), took


def shrunk(runs: Path, name: str = "elastic") -> float:
    """A run of 1 to 2 workers loses a node by force; returns the seconds until it went on with one, and sees it finish."""
    # three quarters of a CPU for each worker: beside a whole one for the tasks, one node of two CPUs has room for one of them
    code = "import pipeline.train.placement as p, manyviews; p.CPU_WORKER['CPU'] = 0.75; raise SystemExit(manyviews.main())"
    with cluster() as (local, nodes):
        arguments = [*WORKERS, "--train.workers=1:2", f"--run={name}", f"--runs-dir={runs}"]
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=os.environ | {"RAY_ADDRESS": local.address},
        )
        progress(process, runs, name, beyond=12)
        if sum(len(workers_of(node)) for node in nodes) != 2:
            raise SystemExit("the run did not begin with two workers")
        gone, left = sorted(nodes, key=lambda node: len(workers_of(node)), reverse=True)
        local.remove_node(gone, allow_graceful=False)
        step = int(str(facts(runs, name)["step"]))
        seconds = progress(process, runs, name, beyond=step + 2)
        if len(workers_of(left)) != 1:
            raise SystemExit("the run did not go on with one worker")
        finish(process, "the run on the node that is left")
    return seconds


# ---------------------------------------------------------------------------- jobs


def disturbed_job(runs: Path, name: str = "stopped") -> tuple[str, dict[str, float]]:
    """Stop a job, then kill its driver, submitting again after each; returns the final hash and the seconds until it had moved on."""
    from ray.job_submission import JobSubmissionClient

    took: dict[str, float] = {}
    environment = {"working_dir": str(ROOT), "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}
    with cluster(include_dashboard=True, dashboard_port=free_port()) as (local, _):
        client = JobSubmissionClient(f"http://{local.webui_url}")

        def submit(*arguments: str) -> str:
            command = shlex.join([sys.executable, "manyviews.py", *arguments, f"--runs-dir={runs}"])
            return str(client.submit_job(entrypoint=command, runtime_env=environment))

        def moved(job: str, beyond: int, patience_s: float = 180.0) -> float:
            began = asked = time.monotonic()
            while int(str(facts(runs, name).get("step", 0))) <= beyond:
                if time.monotonic() - asked > 2:  # more often would take a part of a core
                    asked = time.monotonic()
                    if client.get_job_status(job).is_terminal() or asked - began > patience_s:
                        raise SystemExit(f"the job did not get beyond step {beyond}:\n{client.get_job_logs(job)[-3000:]}")
                time.sleep(0.05)
            return time.monotonic() - began

        def ended(job: str) -> int:
            while not client.get_job_status(job).is_terminal():
                time.sleep(0.1)
            return int(str(facts(runs, name)["step"]))

        job = submit(*WORKERS, f"--run={name}")
        moved(job, 12)
        client.stop_job(job)
        step = ended(job)
        job = submit("resume", name)
        took["stop"] = moved(job, step)

        [driver] = [p for p in psutil.process_iter() if "manyviews.py" in (words := argv(p)) and "resume" in words]
        driver.kill()
        step = ended(job)
        job = submit("resume", name)
        took["driver"] = moved(job, step)
        ended(job)
        if str(client.get_job_status(job)) != "SUCCEEDED":
            raise SystemExit(client.get_job_logs(job)[-3000:])
    return checkpoint.hash_of_last(RunFolder(runs / name).checkpoints), took


def argv(process: psutil.Process) -> list[str]:
    """The words of a process's command; none if it has gone. Of a shell that waits for another, none either."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return []
    return words if words and "python" in Path(words[0]).name else []


def free_port() -> int:
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return int(it.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, choices=[0, 2], default=0)
    parser.add_argument("--elastic", action="store_true", help="one to two workers: a node is lost, and the other goes on")
    parser.add_argument("--preempt", action="store_true", help="two workers whose node is announced to be taken away")
    parser.add_argument("--jobs", action="store_true", help="two workers, as a job that is stopped and loses its driver")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.elastic:
            print(f"two workers lost a node; one went on after {shrunk(Path(folder)):.0f} s, to the end")
            return
        want = undisturbed(Path(folder), settings=WORKERS if options.workers or options.jobs or options.preempt else RUN)
        print(f"undisturbed: {want}", flush=True)
        if options.jobs:
            got, took = disturbed_job(Path(folder))
            print(f"submitted again after a stop, moved on in {took['stop']:.0f} s; after the driver's death in {took['driver']:.0f} s")
        elif options.preempt:
            got, took = preempted(Path(folder))
            print(f"checkpoint {took['checkpoint']:.0f} s after the notice; moved on {took['moved on']:.0f} s later")
        elif options.workers:
            got, took = disturbed_workers(Path(folder))
            print(
                "recovered after the loss of "
                + ", ".join(f"a {what} in {s:.0f} s" for what, s in took.items()).replace("a driver", "the driver")
            )
        else:
            got, steps = disturbed(Path(folder), options.kills, options.seed, say=True)
            print(f"killed {len(steps)} times")
        print(f"disturbed:   {got}\n{'equal' if got == want else 'DIFFERENT'}")
    raise SystemExit(got != want)


if __name__ == "__main__":
    main()
