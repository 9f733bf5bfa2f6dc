"""From ranges to a ranked sweep: `tune` begins one, `resume` goes on with it. Ray Tune runs the trials; the folder is the truth."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from methods.parts.contract import find as find_method
from methods.parts.errors import ConfigError
from pipeline import registry
from pipeline.config import RunConfig, resolve
from pipeline.ingest.manifest import Manifest
from pipeline.ingest.sources import open_source
from pipeline.ingest.stream import start_ray
from pipeline.points import read_points
from pipeline.runs import hold
from pipeline.tracking import Tracker
from pipeline.train.launch import interruptible
from pipeline.train.prepare import with_absolute_paths
from tuning import draws
from tuning.spaces import Knob, parse_space
from tuning.sweep import ENDED, LOSS_WORDS, SCORE_WORDS, Sweep, create, score_words, settings_ranked, track_uri

SEARCHES, SCHEDULERS = ("random", "grid", "optuna"), ("asha", "none", "pbt")
LOCAL_SHARE = 0.25  # logical CPUs of a trial on one machine, whose cores its torch threads and the image tasks share by priority
SLOT = "trials"  # a resource of a local Ray
QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed has no score
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours asks trials to end with whole checkpoints
    "TUNE_GLOBAL_CHECKPOINT_S": "600",  # its snapshots are not what a sweep goes on from
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


@dataclass(frozen=True)
class Asked:
    """What the command line says of a search."""

    space: tuple[str, ...] = ()
    trials: int | None = None  # settings to try; None = 12, of a grid all
    search: str = "random"
    scheduler: str = "asha"
    score: str = "knn"
    seeds: int = 1  # trials of each setting
    seed: int = 0  # of the draws
    grace: int | None = None  # steps before ASHA cuts, or between PBT's exchanges; None = by rule
    points: int = 4  # of a grid on a range
    concurrent: int | None = None  # trials at the same time; None = by rule
    gpus: float | None = None  # of a trial's worker, a part of one allowed
    command: str = "manyviews tune"


def tune(config: RunConfig, asked: Asked, *, runs_dir: Path, name: str | None, console: Console) -> tuple[Sweep, int]:
    """A new sweep. Returns its folder and the exit code.

    Raises:
        ConfigError: anything that cannot work, before Ray is started where it can be known.
    """
    check_words(asked)
    knobs = parse_space(asked.space, config)
    config = with_absolute_paths(config)
    manifest = open_source(config.data)
    training = manifest.num_training(config.data.held_out)
    ids = None if training is None else len(manifest)
    check = draws.checker(config, training, ids)
    draws.check_corners(knobs, check)
    settings = drawn(asked, knobs)
    count = (len(settings) or asked.trials or 12) * asked.seeds
    plan = planned(config, asked, training, ids)
    if asked.search == "optuna":
        from tuning.schedulers import Optuna

        Optuna(knobs, asked.seed, [])  # refuses where it is not installed
    if asked.scheduler == "pbt":
        if config.train.worker_range[1]:
            raise ConfigError(
                "--scheduler pbt: works in process only, where starting anew from another's state is quick; use train.workers=0"
            )
        if count < 2:
            raise ConfigError(f"--trials {count}: pbt needs a population; use 4 or more")
        draws.fixed_shapes(knobs, config, training, ids)
    facts: dict[str, Any] = {
        "recipe": config.recipe,
        "method": find_method(config.method).name,
        "command": asked.command,
        "score": asked.score,
        "score_words": score_words(asked.score, config, asked_images(asked.score, config, manifest)),
        "mode": "max",
        "space": {knob.key: knob.to_dict() for knob in knobs},
        "search": asked.search,
        "scheduler": asked.scheduler,
        "trials": count,
        "seed": asked.seed,
        "seeds": asked.seeds,
        "workers": config.train.worker_range[1],
        "asked_concurrent": asked.concurrent,
        "gpus": asked.gpus,
        "cores": os.cpu_count() or 1,
        "track_uri": track_uri(config, runs_dir),
        "mlflow_run": None,
        **plan,
    }
    sweep = create(runs_dir, name, config, facts | room(config, asked.concurrent, asked.gpus, count))
    for number, values in enumerate(v for v in settings for _ in range(asked.seeds)):
        sweep.add(number, values, config.train.seed + number % asked.seeds, refusal(check, values))
    return sweep, fit(sweep, console)


def resume(sweep: Sweep, console: Console) -> int:
    """Go on with a sweep: ended trials are kept, half-done ones go on from their last checkpoints.

    Raises:
        ConfigError: it is finished, or another process is at work on it.
    """
    if sweep.facts()["status"] == "finished":
        raise ConfigError(
            f"sweep={sweep.name}: it is finished; `manyviews report {sweep.name}` shows it, a new search needs another --name"
        )
    return fit(sweep, console)


# ---------------------------------------------------------------------------- before Ray is started


def check_words(asked: Asked) -> None:
    """Refuse what no search can do."""
    if asked.score not in SCORE_WORDS:
        if "loss" in asked.score:
            raise ConfigError(LOSS_WORDS)
        raise ConfigError(f"--score {asked.score}: unknown; use {', '.join(SCORE_WORDS)}")
    for option, value, known in (("search", asked.search, SEARCHES), ("scheduler", asked.scheduler, SCHEDULERS)):
        if value not in known:
            raise ConfigError(f"--{option} {value}: unknown; use {', '.join(known)}")
    for option in ("trials", "seeds", "grace", "concurrent"):
        value = getattr(asked, option)
        if value is not None and value < 1:
            raise ConfigError(f"--{option} {value}: use 1 or more")
    if asked.points < 2:
        raise ConfigError(f"--points {asked.points}: use 2 or more values of each range")
    if asked.gpus is not None and (asked.gpus <= 0 or asked.gpus > 1):
        raise ConfigError(
            f"--gpus {asked.gpus:g}: a trial's worker uses one GPU or a part of it; use 0 < GPUS <= 1, more with train.workers"
        )
    if asked.search == "grid" and asked.trials is not None:
        raise ConfigError(f"--trials {asked.trials}: a grid tries all its combinations; leave it out, or set --points")
    if asked.scheduler == "pbt" and asked.seeds > 1:
        raise ConfigError(f"--seeds {asked.seeds}: pbt changes a trial's values in mid-run, so none is repeated; use 1")


def drawn(asked: Asked, knobs: list[Knob]) -> list[dict[str, Any]]:
    """The settings that are known beforehand; none with Optuna."""
    if asked.search == "grid":
        return draws.grid_values(knobs, asked.points)
    return [draws.random_values(knobs, asked.seed, n) for n in range(asked.trials or 12)] if asked.search == "random" else []


def planned(config: RunConfig, asked: Asked, training: int | None, ids: int | None) -> dict[str, Any]:
    """Length of a trial, steps between measurements, and where the scheduler decides.

    The first decision comes after the warm-up, after a queue is in use and after prototypes move, and with room for two more.

    Raises:
        ConfigError: a grace period that is longer than a trial.
    """
    resolved = resolve(config, training, ids)
    facts = resolved.facts
    total, every = facts.total_steps, min(resolved.knn_every, facts.total_steps)
    method = config.method
    queue = getattr(method, "queue_length", 0)
    filled = getattr(method, "queue_start_epoch", 0) * facts.steps_per_epoch + queue / facts.global_batch_size if queue else 0
    frozen = getattr(method, "freeze_prototypes_epochs", 0) * facts.steps_per_epoch
    needed = [resolved.idle_steps + resolved.warmup_steps, filled, frozen, total / 9]
    wanted = asked.grace or max(step for step in needed if step < total)
    grace = every * math.ceil(wanted / every)
    if asked.grace is not None and grace >= total and asked.scheduler != "none":
        raise ConfigError(f"--grace {asked.grace}: not below the {total} steps of a trial; use fewer, or --scheduler none")
    rungs: list[int] = []
    if asked.scheduler == "asha":
        from tuning.schedulers import rungs as of

        rungs = of(grace, total)
    elif asked.scheduler == "pbt":
        rungs = list(range(grace, total, grace))
        if not rungs:
            raise ConfigError(f"train.steps={total}: no exchange fits in; use --grace below it, or more steps")
    return {"total_steps": total, "measure_every": every, "rungs": rungs}


def refusal(check: draws.Check, values: dict[str, Any]) -> str | None:
    """Why a setting cannot work, or None."""
    try:
        check(values)
    except ConfigError as error:
        return str(error)
    return None


def asked_images(score: str, config: RunConfig, manifest: Manifest) -> int:
    """How many held-out images have labels.

    Raises:
        ConfigError: the score needs labels, and there are none.
    """
    count = int((manifest.labels[manifest.held_out_ids(config.data.held_out)] >= 0).sum())
    if score != "rankme" and not count:
        raise ConfigError(f"--score {score}: {config.data.path} has no labels, or data.held_out=0; use --score rankme")
    return count


# ---------------------------------------------------------------------------- with Ray


def fit(sweep: Sweep, console: Console) -> int:
    """Run every trial that has not ended, then rank them and register the best. Returns the exit code."""
    with hold(sweep.path, f"sweep={sweep.name}: another process is at work on it; stop that one first"):
        (sweep.path / ".stop").unlink(missing_ok=True)
        status, unsent = "failed", 0
        facts, config = sweep.facts(), sweep.config()
        sweep.update(status="running", ended=None, **room(config, facts["asked_concurrent"], facts["gpus"], facts["trials"]))
        parent = Tracker.open(
            sweep.path,
            uri=facts["track_uri"],
            experiment=config.track.experiment,
            name=sweep.name,
            params={f"space.{key}": range_["text"] for key, range_ in facts["space"].items()}
            | {key: facts[key] for key in ("search", "scheduler", "score", "trials", "seeds", "seed", "total_steps", "workers")},
            tags={"recipe": facts["recipe"], "method": facts["method"], "kind": "sweep"},
        )
        from tuning.book import Book, settle
        from tuning.screen import Screen

        settle(sweep)
        sweep.update(mlflow_run=parent.run_id(timeout=60.0))
        screen = Screen(console, [t.facts() for t in sweep.trials()], facts["total_steps"], facts["trials"])
        book = Book(sweep, parent, screen)
        model = None
        try:
            introduce(sweep, console)
            with interruptible() as stop, stopping(sweep, stop), screen:
                run_trials(sweep, config, book, stop)
            trials = [t.facts() for t in sweep.trials()]
            left = len(trials) < sweep.facts()["trials"] or any(t["status"] not in ENDED for t in trials)
            status = "interrupted" if left else "finished" if any(t["status"] == "finished" for t in trials) else "failed"
            if status == "finished" and config.track.register:
                model = champion(sweep, config, console)
        except KeyboardInterrupt:
            status = "interrupted"
        finally:
            unsent = book.close("finished" if status == "finished" else status)
            sweep.update(status=status, ended=time.time())
    return conclude(sweep, console, status, model, unsent)


def room(config: RunConfig, asked: int | None, gpus_asked: float | None, trials: int) -> dict[str, Any]:
    """Start or join Ray and settle how many trials run at the same time, so that one whole CPU stays free for cutting images.

    Returns:
        `concurrent`, `cluster`, and the resources of a trial, or of each of its workers, as `share`.

    Raises:
        ConfigError: so many do not fit.
    """
    import ray

    from pipeline.ingest.ray_data import joins_cluster
    from pipeline.train.workers import CPU_WORKER, GPU_WORKER, fits

    workers, cores = config.train.worker_range[0], os.cpu_count() or 1
    cluster = joins_cluster()
    concurrent = asked or (1 if workers else max(1, cores // 4))
    start_ray(extra_cpus=math.ceil(LOCAL_SHARE * max(1, workers) * concurrent), resources={SLOT: concurrent})
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = any(node.get("GPU", 0) for node in nodes)
    if gpus_asked and not gpus:
        raise ConfigError(f"--gpus {gpus_asked:g}: there is no GPU here; leave it out")
    share = dict(GPU_WORKER if gpus else CPU_WORKER) if workers else {"CPU": 1.0 if cluster or gpus else LOCAL_SHARE}
    if gpus and not workers:
        share["GPU"] = gpus_asked or 1.0
    elif workers and gpus_asked:
        raise ConfigError(f"--gpus {gpus_asked:g}: each worker of train.workers={config.train.workers} takes a whole GPU; leave it out")
    group = max(1, workers)
    if not asked and (cluster or gpus):
        concurrent = max((n for n in range(1, trials + 1) if fits(n * group, share, nodes)), default=1)
    if not fits(concurrent * group, share, nodes):
        there = "; ".join(f"{node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU" for node in nodes)
        each = ", ".join(f"{amount:g} {key}" for key, amount in share.items())
        raise ConfigError(
            f"--concurrent {concurrent}: {concurrent * group} workers with {each} each, beside one whole free CPU for cutting images, "
            f"do not fit on the nodes there are ({there}); use fewer, or --gpus below 1"
        )
    if not workers and ray.cluster_resources().get(SLOT, 0) >= concurrent:  # limits a population, all of whose trials are there at once
        share[SLOT] = 1
    return {"concurrent": concurrent, "cluster": cluster, "share": share}


def run_trials(sweep: Sweep, config: RunConfig, book: Any, stop: threading.Event) -> None:
    """Ray Tune over all trials that have not ended."""
    os.environ.update({key: value for key, value in QUIET.items() if key not in os.environ})
    import ray
    from ray import tune as ray_tune

    from tuning import schedulers
    from tuning.trial import InProcess, by_group

    for name in ("ray.tune", "ray.train", "ray.air", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    facts = sweep.facts()
    knobs = parse_space([f"{key}={range_['text']}" for key, range_ in facts["space"].items()], config)
    total = facts["total_steps"]
    spare = ray.cluster_resources().get("CPU", 1) - facts["concurrent"] * facts["share"]["CPU"]
    common = {"sweep": str(sweep.path), "concurrent": facts["concurrent"], "from": []}
    common["tasks"] = None if facts["cluster"] else max(1, round(spare / facts["concurrent"]))

    scheduler: Any = None
    if facts["scheduler"] == "asha" and facts["rungs"]:
        scheduler = schedulers.Halving(facts["rungs"][0], total)
    elif facts["scheduler"] == "pbt":
        scheduler = schedulers.Population(facts["rungs"][0], knobs, facts["seed"] + len(list(sweep.path.glob("ray/*"))))
    waiting = []
    for of in sweep.trials():
        trial = of.facts()
        if trial["status"] not in ENDED:
            waiting.append(common | {key: trial[key] for key in ("number", "values", "seed")} | {"from": trial["from"] or []})
            if (of.path / "tracking.json").is_file():
                book.reopen(of)
        scores = [(p["step"], p["metrics"]["score"]) for p in read_points(of.path) if "score" in p["metrics"]]
        if isinstance(scheduler, schedulers.Halving) and scores:
            scheduler.replay(trial["number"], scores)

    optuna = schedulers.Optuna(knobs, facts["seed"], [t.facts() for t in sweep.trials()]) if facts["search"] == "optuna" else None
    check = checker_of(config) if optuna else None

    def more() -> Any:
        """Optuna's next trial; a setting that cannot work is written down and another one asked for."""
        number = len(sweep.trials())
        while optuna is not None and check is not None and not stop.is_set() and number < facts["trials"]:
            repeat = number % facts["seeds"]
            values = sweep.trial(number - 1).facts()["values"] if repeat else optuna.ask(number)
            seed, error = config.train.seed + repeat, refusal(check, values)
            of = sweep.add(number, values, seed, error)
            if error is None:
                return common | {"number": number, "values": values, "seed": seed}
            optuna.tell(number, {})
            book.screen.ended(of.facts())
            number += 1
        return None

    limited = facts["scheduler"] != "pbt"  # a population must all be there to be compared: resources limit it
    group = bool(facts["workers"])
    trainable: Any = ray_tune.with_resources(by_group, {"CPU": 0.01}) if group else ray_tune.with_resources(InProcess, facts["share"])
    restarts = 0 if group else config.train.max_restarts  # a group starts its workers again by itself
    storage = sweep.path / "ray"
    tuner = ray_tune.Tuner(
        trainable,
        tune_config=ray_tune.TuneConfig(
            scheduler=scheduler,
            search_alg=schedulers.Queue(waiting, more, optuna.tell if optuna else lambda number, result: None, stop.is_set),
            num_samples=max(1, len(waiting)) if optuna is None else facts["trials"],
            max_concurrent_trials=facts["concurrent"] if limited else None,
            reuse_actors=not group,
            trial_name_creator=lambda trial: f"trial-{trial.config['number']:03d}",
            trial_dirname_creator=lambda trial: f"trial-{trial.config['number']:03d}",
        ),
        run_config=ray_tune.RunConfig(
            name=f"life-{len(list(storage.glob('life-*'))):03d}",
            storage_path=str(storage),
            callbacks=[book],
            failure_config=ray_tune.FailureConfig(max_failures=restarts),
            verbose=0,
        ),
    )
    if not waiting and optuna is None:
        return
    with quiet():
        tuner.fit()


def checker_of(config: RunConfig) -> draws.Check:
    manifest = open_source(config.data)
    training = manifest.num_training(config.data.held_out)
    return draws.checker(config, training, None if training is None else len(manifest))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Ray Tune's own words stay out of the user's screen."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@contextlib.contextmanager
def stopping(sweep: Sweep, stop: threading.Event) -> Iterator[None]:
    """Pass the wish to stop on to all trials, wherever they run."""
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            if stop.wait(0.2):
                (sweep.path / ".stop").touch()
                return

    thread = threading.Thread(target=watch, name="stopping", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


# ---------------------------------------------------------------------------- words and the end


def introduce(sweep: Sweep, console: Console) -> None:
    """What is about to happen, in a few lines."""
    facts = sweep.facts()
    say = lambda key, text: console.print(f"[bold]{key:9}[/bold] {text}", highlight=False, soft_wrap=True)  # noqa: E731
    say("sweep", str(sweep.path))
    for key, range_ in facts["space"].items():
        say("search", f"{key} {range_['text']}" + (f" ({range_['reason']})" if range_["reason"] else ""))
    ended = sum(t.facts()["status"] in ENDED for t in sweep.trials())
    seeds = f", {facts['seeds']} seeds of each setting" if facts["seeds"] > 1 else ""
    kept = f", of which {ended} have ended" if ended else ""
    where = f"{facts['workers']} workers each" if facts["workers"] else "in process"
    say("trials", f"{facts['trials']} by {facts['search']} search{seeds}{kept}; {facts['concurrent']} at a time, {where}")
    rungs = ", ".join(map(str, facts["rungs"][:6])) + (" ..." if len(facts["rungs"]) > 6 else "")
    words = {"asha": f"asha cuts at steps {rungs}: the best third goes on", "pbt": f"pbt exchanges at steps {rungs}", "none": "none is cut"}
    cut = words[facts["scheduler"]] if rungs or facts["scheduler"] == "none" else "none is cut: a trial is too short"
    say("plan", f"at most {facts['total_steps']} steps each, measured every {facts['measure_every']}; {cut}")
    say("score", facts["score_words"])


def champion(sweep: Sweep, config: RunConfig, console: Console) -> str | None:
    """Register the best trial's backbone; a registry that is down must not fail the sweep."""
    best = settings_ranked([t.facts() for t in sweep.trials()])
    if not best:
        return None
    values, _, _, group = best[0]
    number = max(group, key=lambda trial: trial["score"])["number"]
    run = sweep.trial(number).run
    uri = sweep.facts()["track_uri"]
    try:
        _, spec = registry.read_export(run.model)
        tags = {key: str(value) for key, value in spec.facts.items() if value is not None}
        model = registry.register(
            run.model,
            name=config.track.model_name or config.recipe or find_method(config.method).name,
            uri=uri,
            run_id=_run_id(run.path),
            tags=tags | {"sweep": sweep.name, "trial": run.name} | {key: str(value) for key, value in values.items()},
            held_out_knn=spec.facts.get("knn_held_out"),
            experiment=config.track.experiment,
        )
        registry.set_alias(model, "champion", uri)
    except ConfigError as error:
        console.print(f"not registered: {error}", highlight=False, soft_wrap=True)
        return None
    run.update(model=model.uri, model_version=model.version)
    sweep.update(best=number, model=model.uri)
    return model.uri


def _run_id(folder: Path) -> str | None:
    with contextlib.suppress(OSError, ValueError, KeyError):
        found: str | None = json.loads((folder / "tracking.json").read_text())["run_id"]
        return found
    return None


def conclude(sweep: Sweep, console: Console, status: str, model: str | None, unsent: int) -> int:
    from tuning.screen import conclusion

    facts, trials = sweep.facts(), [t.facts() for t in sweep.trials()]
    if status != "interrupted":
        shutil.rmtree(sweep.path / "ray", ignore_errors=True)
    where = "" if sweep.path.parent == Path("runs").resolve() else f" --runs-dir {sweep.path.parent}"
    conclusion(console, facts, trials, where, model)
    if unsent:
        console.print(f"{unsent} entries have not reached MLflow; they are kept in the trials' folders", highlight=False)
    if status == "interrupted":
        console.print(f"interrupted; go on with: manyviews resume {sweep.name}{where}", highlight=False, soft_wrap=True)
    return 0 if status == "finished" else 1
