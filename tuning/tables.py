"""A sweep in words and tables: what a reader must know first, the facts, the cost, every trial."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.run_folder import command
from tuning.best import Best
from tuning.results import STATUSES, Knob, Setting, Sweep, Trial, show_value

SEARCH_WORDS = {"random": "at random", "grid": "every combination", "optuna": "chosen by Optuna from the scores so far"}
SCHEDULER_WORDS = {
    "none": "every trial runs to the end",
    "asha": "ASHA: at each rung, trials that score low among those that were there are stopped",
    "pbt": "population based training: in mid-run, low trials take over the weights of high ones and change their values",
}


# ---------------------------------------------------------------------------- words


def warnings(sweep: Sweep, run: Best | None = None) -> list[str]:
    """What a reader must know before the figures."""
    said = []
    if sweep.facts.get("status") != "finished":
        resume = command("resume", sweep.name, runs_dir=sweep.folder.parent)
        go_on = "" if sweep.facts.get("status") == "running" else f"; go on with: {resume}"
        said.append(f"The search is {sweep.facts.get('status')}: these are the figures so far{go_on}.")
    if sweep.finals[0].status != "finished":
        said.append(
            f"No trial has finished: the best is the best of the {len(sweep.finals)} that were measured at step "
            f"{sweep.final_step:,} of {sweep.total_steps:,}, and need not stay so."
        )
    elif len({t.score_step for t in sweep.finals}) > 1:
        steps = sorted({t.score_step for t in sweep.finals})
        said.append(
            f"Finished trials differ in length, {steps[0]:,} to {steps[-1]:,} steps, so a score may be higher for its length alone."
        )
    if len(sweep.best.scores) < sweep.seeds:
        said.append(f"The best setting has {len(sweep.best.scores)} of {sweep.seeds} seeds; the others failed, were stopped or still run.")
    if sweep.scheduler == "pbt":
        said.append("Values changed in mid-run: those below are the ones at the end, and a fresh run with them need not reach the score.")
    tied = [s for s in sweep.settings[1:] if s.mean == sweep.best.mean and len(s.scores) >= len(sweep.best.scores)]
    if tied:
        said.append(f"{len(tied) + 1} settings share the best score; the one that ran first is shown.")
    if run is not None and run.trouble:
        said.append(run.trouble[0].upper() + run.trouble[1:] + ".")
    return said


def states(sweep: Sweep) -> str:
    """Trials by state, e.g. `4 finished, 8 stopped`."""
    return ", ".join(f"{sweep.count(s)} {s}" for s in STATUSES if sweep.count(s))


def duration(seconds: float) -> str:
    """A time as people say it."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def cost(sweep: Sweep) -> list[tuple[str, str]]:
    """What the search took, as name and words."""
    ran = [t for t in sweep.trials if t.seconds > 0]
    lines = []
    if sweep.wall:
        rate = f", {sweep.images / sweep.wall:,.0f} images/s" if sweep.images else ""
        together = int(sweep.facts.get("concurrent") or 1)
        lines.append(("wall time", f"{duration(sweep.wall)}{rate}, {together} at a time; pauses between interruptions count"))
    if sweep.images:
        lines.append(("images", f"{sweep.images:,}, all trials together"))
    if ran:
        each = sorted(t.seconds for t in ran)
        words = f"{duration(sum(each))} in all; {duration(each[0])} to {duration(each[-1])}, median {duration(statistics.median(each))}"
        lines.append(("training time of trials", words))
    if sweep.saved is not None:
        counted = sweep.count("finished") + sweep.count("stopped")
        words = f"{100 * sweep.saved:.0f} % of the steps that the {counted} finished and stopped trials would have taken to the end"
        lines.append(("saved by early stopping", words))
    return lines


def tiles(sweep: Sweep) -> list[dict[str, str]]:
    spread = "" if sweep.best.std is None else f" ± {sweep.gap(sweep.best.std)}"
    n = f", mean of {len(sweep.best.scores)} seeds" if len(sweep.best.scores) > 1 else ""
    found = [(sweep.show(sweep.best.mean) + spread, f"best {sweep.score_name}{n}"), (str(len(sweep.trials)), f"trials: {states(sweep)}")]
    if sweep.wall:
        found.append((duration(sweep.wall), "wall time"))
        if sweep.images:
            found.append((f"{sweep.images / sweep.wall:,.0f}", "images/s, all trials together"))
    if sweep.saved is not None:
        found.append((f"{100 * sweep.saved:.0f} %", "of the steps saved by early stopping"))
    return [{"value": value, "words": words} for value, words in found]


def facts(sweep: Sweep, run: Best) -> list[tuple[str, str]]:
    given = sweep.facts
    score = str(given.get("score_words") or sweep.score_name).rstrip(".") + "."
    if len(sweep.trials) > 1:
        score += f" The best of {len(sweep.trials)} trials flatters: chosen for its score, it will on average score lower when run again."
    scheduler = SCHEDULER_WORDS.get(sweep.scheduler, sweep.scheduler)
    rungs = f"; rungs at steps {', '.join(f'{r:,}' for r in sweep.rungs)}" if sweep.rungs else ""
    search = SEARCH_WORDS.get(str(given.get("search")), str(given.get("search")))
    seeds = f"{sweep.seeds} for each setting" if sweep.seeds > 1 else "one for each setting"
    workers = f"{given['workers']} workers a trial" if given.get("workers") else "in process"
    found = [
        ("recipe", f"{given.get('recipe')} (method {given.get('method')})"),
        ("data", _data(run)),
        ("score", score),
        ("length of a trial", f"{sweep.total_steps:,} optimizer steps"),
        ("values", f"{search}, seed {given.get('seed')}"),
        ("early stopping", scheduler + rungs),
        ("training seeds", seeds),
        ("trials", f"{states(sweep)}; {workers}, on {given.get('cores')} cores"),
        *cost(sweep),
        ("command", str(given.get("command") or "")),
    ]
    return [(name, words) for name, words in found if words]


def _data(run: Best) -> str:
    import yaml

    data = (yaml.safe_load(run.yaml) or {}).get("data", {}) if run.yaml else {}
    return str(data.get("path", ""))


def order_words(sweep: Sweep) -> str:
    first = "Best first, by the mean over seeds" if sweep.seeds > 1 else "Best first"
    if all(t in sweep.finals for t in sweep.ranked):
        return first + "."
    return f"{first}; then those that ended before step {sweep.final_step:,}, later steps first, since scores grow with steps."


# ---------------------------------------------------------------------------- table


@dataclass(frozen=True)
class Column:
    """One column of the table of trials: a key to sort by, and words."""

    name: str
    key: Callable[[Trial], Any]
    text: Callable[[Trial], str]
    number: bool = True


def columns(sweep: Sweep) -> list[Column]:
    settings: dict[int, Setting] = {t.number: s for s in sweep.settings for t in s.trials}
    place = {t.number: i + 1 for i, s in enumerate(sweep.settings) for t in s.trials if t in sweep.finals}
    place |= {t.number: i + 1 for i, t in enumerate(ordered(sweep)) if t.ranked and t.number not in place}

    def over_seeds(trial: Trial) -> str:
        setting = settings.get(trial.number)
        if setting is None or setting.std is None:
            return ""
        return f"{sweep.show(setting.mean)} ± {sweep.gap(setting.std)} (n = {len(setting.scores)})"

    found = [
        Column("rank", lambda t: place.get(t.number, ""), lambda t: str(place.get(t.number, "–"))),
        Column("trial", lambda t: t.number, lambda t: str(t.number)),
    ]
    found += [_knob_column(knob) for knob in sweep.knobs]
    found.append(Column(sweep.score_name, lambda t: "" if t.score is None else t.score, lambda t: sweep.show(t.score)))
    if any(len(s.scores) > 1 for s in sweep.settings):
        found.append(Column("over seeds", lambda t: settings[t.number].mean if t.number in settings else "", over_seeds))
        found.append(Column("seed", lambda t: t.seed, lambda t: str(t.seed)))
    found += [
        Column("at step", lambda t: t.score_step, lambda t: f"{t.score_step:,}"),
        Column("state", lambda t: t.status, lambda t: t.status, number=False),
        Column("training time", lambda t: t.seconds, lambda t: duration(t.seconds)),
    ]
    if any(t.copied_from for t in sweep.trials):
        found.append(Column("weights from", lambda t: len(t.copied_from), lambda t: ", ".join(map(str, t.copied_from)), number=False))
    return found


def _knob_column(knob: Knob) -> Column:
    return Column(knob.label, lambda t: t.values.get(knob.name, ""), lambda t: show_value(t.values.get(knob.name, "")))


def ordered(sweep: Sweep) -> list[Trial]:
    """Trials as the table shows them: by setting, best first; then those that ended earlier; then those without a score."""
    rank = {t.number: i for i, s in enumerate(sweep.settings) for t in s.trials if t in sweep.finals}
    last = len(sweep.settings)
    later = {t.number: i for i, t in enumerate(sweep.ranked)}
    known = sorted(sweep.ranked, key=lambda t: (rank.get(t.number, last), later[t.number]))
    return [*known, *(t for t in sweep.trials if not t.ranked)]


def rows(sweep: Sweep) -> list[dict[str, Any]]:
    """The table of trials, row by row."""
    shown = columns(sweep)
    found = []
    for trial in ordered(sweep):
        style = "best" if leads(sweep, trial) else "" if trial in sweep.finals else "cut"
        found.append({"style": style, "cells": [{"key": c.key(trial), "text": c.text(trial)} for c in shown]})
    return found


def leads(sweep: Sweep, trial: Trial) -> bool:
    """Is it a repeat of the best setting that counts?"""
    return trial in sweep.finals and trial in sweep.best.trials
