"""What is said before a sweep, and what follows it: the best trial is registered, the ranking is shown."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

from rich.console import Console

from methods.parts.contract import find as find_method
from methods.parts.errors import ConfigError
from pipeline.config import RunConfig
from pipeline.export import registry
from pipeline.run_folder import command
from tuning.results import read_sweep
from tuning.sweep import ENDED, Sweep


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
    uri = sweep.facts()["track_uri"]
    try:
        read = read_sweep(sweep.path)
        number, values = read.best_trial.number, read.best.values
        run = sweep.trial(number).run
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
    from tuning.display import conclusion

    if status != "interrupted":
        shutil.rmtree(sweep.path / "ray", ignore_errors=True)
    conclusion(console, sweep, model)
    if unsent:
        console.print(f"{unsent} entries have not reached MLflow; they are kept in the trials' folders", highlight=False)
    if status == "interrupted":
        go_on = command("resume", sweep.name, runs_dir=sweep.path.parent)
        console.print(f"interrupted; go on with: {go_on}", highlight=False, soft_wrap=True)
    return 0 if status == "finished" else 1
