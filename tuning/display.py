"""What a person sees of a sweep: a live table on a terminal, elsewhere a line for every trial that ends; then the ranking."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from pipeline.run_folder import command, where_option
from tuning.best import best_recipe
from tuning.results import Results, rank
from tuning.sweep import Sweep, Trial, show_score, show_value, show_values

STYLES = {"running": "bold", "finished": "green", "stopped": "dim", "failed": "red", "interrupted": "yellow", "waiting": "dim"}
MOST_ROWS = 20


class SweepDisplay:
    """Shows the trials of a sweep as they go, by looking into its folder."""

    def __init__(self, console: Console, sweep: Sweep) -> None:
        self.console, self.sweep = console, sweep
        self.shown = {trial.number for trial in sweep.trials() if trial.has_ended}
        self.began = time.monotonic()
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="display", daemon=True)
        self.live = Live(get_renderable=self.table, console=console, refresh_per_second=2, transient=True) if console.is_terminal else None

    def __enter__(self) -> SweepDisplay:
        if self.live:
            self.live.start()
        else:
            self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.live:
            self.live.stop()
        else:
            self.closed.set()
            self.thread.join()
            self.refresh()

    def _watch(self) -> None:
        while not self.closed.wait(0.5):
            self.refresh()

    def refresh(self) -> None:
        """Print a line for every trial that has ended since the last call."""
        trials = self.sweep.trials()
        done = [trial for trial in trials if trial.status not in ("waiting", "running")]
        for trial in done:
            if trial.number in self.shown:
                continue
            self.shown.add(trial.number)
            score = show_score(trial.score, self.sweep.facts["score"])
            line = f"trial {trial.number:03d}  {show_values(trial.values, self.sweep.labels)}  {score}  {trial.status}"
            reason = f"  {trial.error}" if trial.error else ""
            minutes = (time.monotonic() - self.began) / 60
            line += f" at step {trial.step}/{self.sweep.total_steps}{reason}"
            line += f"  [{len(done)}/{self.sweep.facts['trials']} ended, {minutes:.1f} min]"
            self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def table(self) -> Table:
        """Return the running trials and the ranking of the others."""
        trials, count = self.sweep.trials(), self.sweep.facts["trials"]
        shown = [t for t in trials if t.status == "running"] + rank(t for t in trials if t.status not in ("running", "waiting"))
        left = f"; {count - len(shown)} wait" if count > len(shown) else ""
        return ranking(self.sweep, shown[:MOST_ROWS], f"{len(shown)} of {count} trials{left}")


def ranking(sweep: Sweep, trials: Sequence[Trial], title: str) -> Table:
    """Return a table with a line for each trial, in the order given."""
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for column in ("trial", *sweep.labels.values(), "seed", "score", "step"):
        table.add_column(column, justify="right")
    table.add_column("state")
    for trial in trials:
        values = [show_value(trial.values.get(key)) for key in sweep.labels]
        state = trial.status + (f": {trial.error}" if trial.error else "")
        score, step = show_score(trial.score, sweep.facts["score"]), f"{trial.step}/{sweep.total_steps}"
        table.add_row(f"{trial.number:03d}", *values, str(trial.seed), score, step, state, style=STYLES.get(trial.status, ""))
    return table


def introduce(sweep: Sweep, console: Console) -> None:
    """Print what is about to happen, in a few lines."""
    facts, rungs = sweep.facts, sweep.rungs
    say = lambda key, text: console.print(f"[bold]{key:9}[/bold] {text}", highlight=False, soft_wrap=True)  # noqa: E731
    say("sweep", str(sweep.path))
    for param in sweep.params:
        say("search", f"{param.key} {param.text}" + (f" ({param.reason})" if param.reason else ""))
    ended = sum(trial.has_ended for trial in sweep.trials())
    seeds = f", {facts['seeds']} seeds of each setting" if facts["seeds"] > 1 else ""
    kept = f", of which {ended} have ended" if ended else ""
    where = f"{facts['workers']} workers each" if facts["workers"] else "in process"
    say("trials", f"{facts['trials']} by {facts['search']} search{seeds}{kept}; {facts['concurrent']} at a time, {where}")
    steps = ", ".join(map(str, rungs[:6])) + (" ..." if len(rungs) > 6 else "")
    cuts = {"asha": f"asha cuts at steps {steps}: the best third goes on", "pbt": f"pbt exchanges at steps {steps}", "none": "none is cut"}
    cut = cuts[sweep.scheduler] if rungs or sweep.scheduler == "none" else "none is cut: a trial is too short"
    say("plan", f"at most {sweep.total_steps} steps each, measured every {facts['measure_every']}; {cut}")
    say("score", facts["score_words"])


def conclude(console: Console, sweep: Sweep, model: str | None = None) -> None:
    """Print the ranking, the best setting with its lead, and what can be done next."""
    found = Results(sweep, tuple(sweep.trials()))
    say = lambda text: console.print(text, highlight=False, soft_wrap=True, markup=False)  # noqa: E731
    console.print()
    title = f"{len(found.trials)} trials: {found.states()}; {sum(t.seconds for t in found.trials) / 60:.1f} min of training"
    console.print(ranking(sweep, rank(found.trials)[:MOST_ROWS], title))
    say(f"\nscore: {sweep.facts['score_words']}")
    if not any(trial.status == "finished" and trial.score is not None for trial in found.trials):
        say("no trial has finished with a score, so there is no best setting")
        return
    say(f"\nbest: {show_values(found.best.values, sweep.labels)}  ({found.best_score()})")
    say(f"      {found.verdict()}")
    if model:
        say(f"model: {model}, alias champion")
    name, runs, best = sweep.name, sweep.path.parent, found.best_trial.folder.name
    say(
        "\nnext\n"
        f"  {command('report', name, runs_dir=runs)}   plots, a table and the best configuration as a page\n"
        f"  {command('evaluate', f'{name}/{best}', runs_dir=runs)}   the best trial on the test images\n"
        f"  {best_recipe(found).command}{where_option(runs)}   train with the best setting"
    )
