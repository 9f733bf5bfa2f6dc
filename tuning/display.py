"""What a person sees of a sweep: a live table on a terminal, elsewhere a line for every trial that ends; then the ranking."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from tuning.sweep import Sweep, ranked, show_score

STYLES = {"running": "bold", "finished": "green", "stopped": "dim", "failed": "red", "interrupted": "yellow", "waiting": "dim"}
MOST_ROWS = 20


class SweepDisplay:
    """Trials as they go.

    Args:
        trials: what is known of every trial so far, as in `trial.json`.
        score: what ranks them: knn, linear or rankme.
    """

    def __init__(self, console: Console, trials: Sequence[dict[str, Any]], total_steps: int, count: int, score: str) -> None:
        self.console, self.total, self.count, self.score = console, total_steps, count, score
        self.trials = {facts["number"]: facts for facts in trials}
        self.began = time.monotonic()
        self.live = Live(self.table(), console=console, refresh_per_second=2, transient=True) if console.is_terminal else None

    def __enter__(self) -> SweepDisplay:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.live:
            self.live.stop()

    def update(self, facts: dict[str, Any]) -> None:
        self.trials[facts["number"]] = facts
        if self.live:
            self.live.update(self.table())

    def ended(self, facts: dict[str, Any]) -> None:
        self.update(facts)
        if self.live is None:
            done = sum(f["status"] not in ("waiting", "running") for f in self.trials.values())
            reason = f"  {facts['error']}" if facts["error"] else ""
            line = (
                f"trial {facts['number']:03d}  {values_words(facts['values'])}  {show_score(facts['score'], self.score)}  {facts['status']}"
            )
            minutes = (time.monotonic() - self.began) / 60
            self.say(f"{line} at step {facts['step']}/{self.total}{reason}  [{done}/{self.count} ended, {minutes:.1f} min]")

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def table(self) -> Table:
        shown = [f for f in self.trials.values() if f["status"] == "running"]
        shown += [f for f in ranked(list(self.trials.values())) if f["status"] not in ("running", "waiting")]
        waiting = self.count - len(shown)
        left = f"; {waiting} wait" if waiting > 0 else ""
        return ranking(shown[:MOST_ROWS], f"{len(shown)} of {self.count} trials{left}", self.total, self.score)


def ranking(trials: Sequence[dict[str, Any]], title: str, total: int, score: str) -> Table:
    """One line for each trial, in the order given."""
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    keys = list(trials[0]["values"]) if trials else []
    table.add_column("trial", justify="right")
    for key in keys:
        table.add_column(key.rsplit(".", 1)[-1], justify="right")
    for column in ("seed", "score", "step"):
        table.add_column(column, justify="right")
    table.add_column("state")
    for facts in trials:
        values = [value_word(facts["values"].get(key)) for key in keys]
        state = facts["status"] + (f": {facts['error']}" if facts["error"] else "")
        style = STYLES.get(facts["status"], "")
        step = f"{facts['step']}/{total}"
        table.add_row(f"{facts['number']:03d}", *values, str(facts["seed"]), show_score(facts["score"], score), step, state, style=style)
    return table


def value_word(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(value_word, value)) + ")"
    return f"{value:g}" if isinstance(value, float) else str(value)


def values_words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.rsplit('.', 1)[-1]} {value_word(value)}" for key, value in values.items())


def conclusion(console: Console, sweep: Sweep, model: str | None) -> None:
    """The ranking, the best setting with its lead, and what can be done next."""
    from pipeline.run_folder import command, where_option
    from tuning.best import best_recipe, score_words
    from tuning.results import read_sweep, show_values

    facts, trials = sweep.facts(), [trial.facts() for trial in sweep.trials()]
    say = lambda text: console.print(text, highlight=False, soft_wrap=True, markup=False)  # noqa: E731
    counts = {status: sum(t["status"] == status for t in trials) for status in STYLES}
    summary = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    seconds = sum(t["seconds"] for t in trials)
    console.print()
    title = f"{len(trials)} trials: {summary}; {seconds / 60:.1f} min of training"
    console.print(ranking(ranked(trials)[:MOST_ROWS], title, facts["total_steps"], facts["score"]))
    say(f"\nscore: {facts['score_words']}")
    if not any(t["status"] == "finished" and t["score"] is not None and math.isfinite(t["score"]) for t in trials):
        say("no trial has finished with a score, so there is no best setting")
        return
    read = read_sweep(sweep.path)  # the report's choice: settings that kept all their seeds before others
    say(f"\nbest: {show_values(read.best.values, read.knobs)}  ({score_words(read)})")
    say(f"      {read.verdict()}")
    if model:
        say(f"model: {model}, alias champion")
    name, runs = facts["name"], sweep.path.parent
    say(
        "\nnext\n"
        f"  {command('report', name, runs_dir=runs)}   plots, a table and the best configuration as a page\n"
        f"  {command('evaluate', f'{name}/trial-{read.best_trial.number:03d}', runs_dir=runs)}   the best trial on the test images\n"
        f"  {best_recipe(read).command}{where_option(runs)}   train with the best setting"
    )
