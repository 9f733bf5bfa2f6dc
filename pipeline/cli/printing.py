"""Output of the verbs: tables of scores, the end of a run, lists of runs, and results as JSON."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pipeline.run_folder import command
from pipeline.shell import installed

if TYPE_CHECKING:
    from pipeline.evaluate.final import Scores
    from pipeline.evaluate.probes import ProbeScores
    from pipeline.train.launch import RunResult


def conclude(outcome: RunResult, options: Any) -> int:
    """Print how a run ended and what can be done next, and return the exit code."""
    screen, name, runs = console(), outcome.folder.name, options.runs_dir
    write_json(options, outcome.to_dict())
    if outcome.status == "interrupted":
        screen.print(f"{outcome.message}\ngo on with: {command('resume', name, runs_dir=runs)}", highlight=False, soft_wrap=True)
        return 1
    if outcome.status != "finished":
        print(f"error: {outcome.message}", file=sys.stderr)
        return 1
    if outcome.scores is not None:
        show_scores(outcome.scores)
    pictures = sorted(outcome.folder.figures.glob("*.png"))
    for picture in pictures:
        screen.print(f"picture   {picture}", highlight=False, soft_wrap=True)
    screen.print(f"weights   {outcome.folder.model / 'backbone.safetensors'} (timm names)", highlight=False, soft_wrap=True)
    if outcome.model is not None:
        best = ", alias best" if outcome.model.alias_best else ""
        screen.print(f"model     {outcome.model.uri} (version {outcome.model.version}{best})", highlight=False, soft_wrap=True)
    embed = command("embed", name, "--data.path", "YOUR_IMAGES", "--to", "features/", runs_dir=runs)
    again = command("pretrain", outcome.recipe, "--data.path", "YOUR_IMAGES", runs_dir=runs)
    screen.print("\n[bold]next[/bold]")
    for line in (
        f"{embed}   features of your images, as Parquet",
        f"{again}   the same on your own images",
        f"{browse(outcome.tracking_uri)}   curves, pictures and models in the browser",
    ):
        screen.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)
    return 0


def browse(uri: str) -> str:
    """Return how to look at a tracking store: the address of a server, or the command that shows a database."""
    return uri if uri.startswith("http") else f"{installed('mlflow')} ui --backend-store-uri {shlex.quote(uri)}"


def show_scores(scores: Scores) -> None:
    """Print the kNN accuracy beside its baselines."""
    from rich.table import Table

    screen = console()
    if not scores.rows:
        screen.print(scores.protocol, highlight=False, soft_wrap=True)
        return
    table = Table(title=None, show_edge=False, pad_edge=False)
    table.add_column("")
    table.add_column(f"kNN top-1, {scores.split} images", justify="right")
    for row in scores.rows:
        style = "bold" if row.key == "trained" else ""
        table.add_row(row.label, f"{100 * row.accuracy:.1f} %", style=style)
    screen.print()
    screen.print(table)
    gain = f"{scores.gain:+.1f} points above the best of raw pixels (L2) and the untrained backbone"
    screen.print(gain, highlight=False, soft_wrap=True)
    screen.print(f"[dim]{scores.protocol}[/dim]\n", highlight=False, soft_wrap=True)


def show_probe(scores: ProbeScores) -> None:
    """Print the accuracy of a linear or low-shot classifier beside that on the untrained backbone."""
    from rich.table import Table

    table = Table(title=None, show_edge=False, pad_edge=False)
    table.add_column("")
    table.add_column(f"{scores.name} top-1, {scores.split} images", justify="right")
    for row in scores.rows:
        spread = "" if row.spread is None else f" ± {100 * row.spread:.1f}"
        table.add_row(row.label, f"{100 * row.accuracy:.1f}{spread} %", style="bold" if row.key.startswith("trained") else "")
    screen = console()
    screen.print()
    screen.print(table)
    screen.print(f"[dim]{scores.protocol}[/dim]\n", highlight=False, soft_wrap=True)


def console() -> Any:
    """Return the screen to print on."""
    from rich.console import Console

    return Console()


def show_table(columns: list[str], rows: list[tuple[Any, ...]], *, heads: bool = True) -> None:
    """Print a table whose columns fold where the screen is narrow."""
    from rich.table import Table

    table = Table(show_edge=False, pad_edge=False) if heads else Table.grid(padding=(0, 2))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(str, row))
    console().print(table)


def listing(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """Return names with what they are, one a line."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    return f"{title}:\n" + "".join(f"  {name:{width}}  {words}\n" for name, words in rows)


def show_run(state: dict[str, Any], options: Any) -> None:
    """Print what `RunFolder.state` tells of one run, as far as people need it; `--json` has all of it."""
    who = f" (process {state.get('pid')} on {state.get('host')})" if state["status"] == "running" else ""
    rows = {
        "run": state["name"],
        "state": state["status"] + who,
        "because": state.get("message"),
        "recipe": state.get("recipe"),
        "step": _step(state),
        "kNN held-out": percent(state.get("knn")),
        "workers": state.get("group", {}).get("workers"),
        "began": _moment(state.get("created")),
        "ended": _moment(state.get("ended")),
        "model": state.get("model"),
        "folder": state["folder"],
        "how to go on": next_command(state, options),
    }
    show_table(["", ""], [(name, value) for name, value in rows.items() if value], heads=False)


def show_runs(states: list[dict[str, Any]], sweeps: list[dict[str, Any]], options: Any) -> None:
    """Print a line for each run, as `RunFolder.state` tells of it, and for each sweep."""
    if states:
        show_table(
            ["run", "state", "step", "kNN held-out", "how to go on"],
            [(s["name"], _status(s), _step(s), percent(s.get("knn")), next_command(s, options)) for s in states],
        )
    if states and sweeps:
        print()
    if sweeps:
        rows: list[tuple[Any, ...]] = []
        for s in sweeps:
            follows = command("report" if s["status"] == "finished" else "resume", s["name"], runs_dir=options.runs_dir)
            searched = ", ".join(key.rsplit(".", 1)[-1] for key in s["space"])
            best = f"{s['best_words']} {s['score']}" if s["best_score"] is not None else ""
            rows.append((s["name"], s["status"], f"{s['ended_trials']}/{s['trials']}", searched, best, follows))
        show_table(["sweep", "state", "trials ended", "searches", "best", "how to go on"], rows)


def percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.1f} %"


def next_command(state: dict[str, Any], options: Any) -> str:
    """Return the command to go on with a run; empty while it runs."""
    verb = {"finished": "evaluate", "interrupted": "resume", "failed": "resume", "created": "resume"}.get(state["status"])
    return command(verb, state["name"], runs_dir=options.runs_dir) if verb else ""


def _status(state: dict[str, Any]) -> str:
    return f"failed ({state.get('message', '')[:60]})" if state["status"] == "failed" else str(state["status"])


def _step(state: dict[str, Any]) -> str:
    return f"{state.get('step', 0)}/{state.get('total_steps', '?')}"


def _moment(seconds: float | None) -> str | None:
    return None if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def write_json(options: Any, value: Any) -> None:
    """Write a result to the file of `--json`, if there is one."""
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(value, indent=2, default=str) + "\n")
