"""A sweep in sentences and tables: what a reader must know first, the facts, the cost, every trial."""

from __future__ import annotations

import statistics
from typing import Any

import yaml

from pipeline.run_folder import command
from tuning.best import Best
from tuning.results import Results
from tuning.sweep import Trial, show_value

SEARCHES = {"random": "at random", "grid": "every combination", "optuna": "chosen by Optuna from the scores so far"}
SCHEDULERS = {
    "none": "every trial runs to the end",
    "asha": "ASHA: at each rung, trials that score low among those that were there are stopped",
    "pbt": "population based training: in mid-run, low trials take over the weights of high ones and change their values",
}


# ---------------------------------------------------------------------------- sentences


def warnings(results: Results, run: Best | None = None) -> list[str]:
    """Return what a reader must know before the numbers."""
    said, sweep, best = [], results.sweep, results.best
    status = sweep.facts.get("status")
    if status != "finished":
        go_on = "" if status == "running" else f"; go on with: {command('resume', sweep.name, runs_dir=sweep.path.parent)}"
        said.append(f"The search is {status}: these are the figures so far{go_on}.")
    steps = sorted({t.score_step for t in results.finals})
    if results.finals[0].status != "finished":
        said.append(
            f"No trial has finished: the best is the best of the {len(results.finals)} that were measured at step "
            f"{results.final_step:,} of {sweep.total_steps:,}, and need not stay so."
        )
    elif len(steps) > 1:
        said.append(
            f"Finished trials differ in length, {steps[0]:,} to {steps[-1]:,} steps, so a score may be higher for its length alone."
        )
    if len(best.scores) < sweep.seeds:
        said.append(f"The best setting has {len(best.scores)} of {sweep.seeds} seeds; the others failed, were stopped or still run.")
    if sweep.scheduler == "pbt":
        said.append("Values changed in mid-run: those below are the ones at the end, and a fresh run with them need not reach the score.")
    tied = [s for s in results.settings[1:] if s.mean == best.mean and len(s.scores) >= len(best.scores)]
    if tied:
        said.append(f"{len(tied) + 1} settings share the best score; the one that ran first is shown.")
    if run is not None and run.trouble:
        said.append(run.trouble[0].upper() + run.trouble[1:] + ".")
    return said


def duration(seconds: float) -> str:
    """Return a time in s, min or h."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def cost(results: Results) -> list[tuple[str, str]]:
    """Return what the search took, as name and words."""
    lines, wall = [], results.wall
    if wall:
        rate = f", {results.images / wall:,.0f} images/s" if results.images else ""
        together = int(results.sweep.facts.get("concurrent") or 1)
        lines.append(("wall time", f"{duration(wall)}{rate}, {together} at a time; pauses between interruptions count"))
    if results.images:
        lines.append(("images", f"{results.images:,}, all trials together"))
    each = sorted(t.seconds for t in results.trials if t.seconds > 0)
    if each:
        words = f"{duration(sum(each))} in all; {duration(each[0])} to {duration(each[-1])}, median {duration(statistics.median(each))}"
        lines.append(("training time of trials", words))
    if results.saved is not None:
        counted = results.count("finished") + results.count("stopped")
        words = f"{100 * results.saved:.0f} % of the steps that the {counted} finished and stopped trials would have taken to the end"
        lines.append(("saved by early stopping", words))
    return lines


def tiles(results: Results) -> list[tuple[str, str]]:
    """Return the largest numbers of the page, each with its words."""
    best = results.best
    spread = "" if best.std is None else f" ± {results.gap(best.std)}"
    n = f", mean of {len(best.scores)} seeds" if len(best.scores) > 1 else ""
    found = [
        (results.show(best.mean) + spread, f"best {results.score_name}{n}"),
        (str(len(results.trials)), f"trials: {results.states()}"),
    ]
    if results.wall:
        found.append((duration(results.wall), "wall time"))
        if results.images:
            found.append((f"{results.images / results.wall:,.0f}", "images/s, all trials together"))
    if results.saved is not None:
        found.append((f"{100 * results.saved:.0f} %", "of the steps saved by early stopping"))
    return found


def facts(results: Results, run: Best) -> list[tuple[str, str]]:
    """Return what was searched and how, as name and words."""
    sweep, given = results.sweep, results.sweep.facts
    score = str(given.get("score_words") or results.score_name).rstrip(".") + "."
    if len(results.trials) > 1:
        score += f" The best of {len(results.trials)} trials flatters: chosen for its score, it will on average score lower when run again."
    rungs = f"; rungs at steps {', '.join(f'{r:,}' for r in sweep.rungs)}" if sweep.rungs else ""
    workers = f"{given['workers']} workers a trial" if given.get("workers") else "in process"
    data = (yaml.safe_load(run.yaml) or {}).get("data", {}) if run.yaml else {}
    found = [
        ("recipe", f"{given.get('recipe')} (method {given.get('method')})"),
        ("data", str(data.get("path", ""))),
        ("score", score),
        ("length of a trial", f"{sweep.total_steps:,} optimizer steps"),
        ("values", f"{SEARCHES.get(str(given.get('search')), given.get('search'))}, seed {given.get('seed')}"),
        ("early stopping", SCHEDULERS.get(sweep.scheduler, sweep.scheduler) + rungs),
        ("training seeds", f"{sweep.seeds} for each setting" if sweep.seeds > 1 else "one for each setting"),
        ("trials", f"{results.states()}; {workers}, on {given.get('cores')} cores"),
        *cost(results),
        ("command", str(given.get("command") or "")),
    ]
    return [(name, words) for name, words in found if words]


def describe_order(results: Results) -> str:
    """Say how the table of trials is sorted."""
    first = "Best first, by the mean over seeds" if results.sweep.seeds > 1 else "Best first"
    if not results.cut:
        return first + "."
    return f"{first}; then those that ended before step {results.final_step:,}, later steps first, since scores grow with steps."


# ---------------------------------------------------------------------------- table of trials


def ordered(results: Results) -> list[Trial]:
    """Return the trials by setting, best first; then those that ended earlier; then those without a score."""
    place = {t.number: i for i, setting in enumerate(results.settings) for t in setting.trials if t in results.finals}
    ranked = sorted(results.ranked, key=lambda t: place.get(t.number, len(place)))  # stable: the others keep their order
    return [*ranked, *(t for t in results.trials if not t.ranked)]


def rows(results: Results) -> list[dict[str, tuple[Any, str]]]:
    """Return the cells of every trial by column: a key to sort by, and words."""
    order = ordered(results)
    settings = {t.number: setting for setting in results.settings for t in setting.trials}
    rank = {t.number: i + 1 for i, t in enumerate(order) if t.ranked}
    rank |= {t.number: i + 1 for i, setting in enumerate(results.settings) for t in setting.trials if t in results.finals}
    repeated, copied = any(s.std is not None for s in results.settings), any(t.copied_from for t in results.trials)
    found = []
    for trial in order:
        row: dict[str, tuple[Any, str]] = {
            "rank": (rank.get(trial.number, ""), str(rank.get(trial.number, "–"))),
            "trial": (trial.number, str(trial.number)),
        }
        for key, label in results.sweep.labels.items():
            row[label] = (trial.values.get(key, ""), show_value(trial.values.get(key, "")))
        row[results.score_name] = ("" if trial.score is None else trial.score, results.show(trial.score))
        if repeated:
            setting = settings.get(trial.number)
            spread = setting and setting.std
            words = f"{results.show(setting.mean)} ± {results.gap(spread)} (n = {len(setting.scores)})" if setting and spread else ""
            row["over seeds"] = (setting.mean if setting else "", words)
            row["seed"] = (trial.seed, str(trial.seed))
        row["at step"] = (trial.score_step, f"{trial.score_step:,}")
        row["state"] = (trial.status, trial.status)
        row["training time"] = (trial.seconds, duration(trial.seconds))
        if copied:
            row["weights from"] = (len(trial.copied_from), ", ".join(map(str, trial.copied_from)))
        found.append(row)
    return found


TEXT = ("state", "weights from")  # columns that are no numbers


def leads(results: Results, trial: Trial) -> bool:
    """Return whether a trial is a seed of the best setting that counts."""
    return trial in results.finals and trial in results.best.trials
