"""What the verbs print: tables of scores, the end of a run, and the same for machines."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.evaluate.probes import ProbeScores
    from pipeline.evaluate.protocols import Scores
    from pipeline.train.conduct import Outcome


def conclude(outcome: Outcome, options: Any) -> int:
    """Say how a run ended and what can be done next."""
    screen, name = console(), outcome.folder.name
    where = "" if options.runs_given == "runs" else f" --runs-dir {options.runs_given}"
    write_json(options, outcome.to_dict())
    if outcome.status == "interrupted":
        screen.print(f"{outcome.message}\ngo on with: manyviews resume {name}{where}", highlight=False, soft_wrap=True)
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
    screen.print(
        "\n[bold]next[/bold]\n"
        f"  manyviews embed {name} --data.path YOUR_IMAGES --to features/{where}   features of your images, as Parquet\n"
        f"  manyviews pretrain {outcome.recipe} --data.path YOUR_IMAGES   the same on your own images\n"
        f"  mlflow ui --backend-store-uri {outcome.tracking_uri}   curves, pictures and models in the browser",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def show_scores(scores: Scores) -> None:
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
    from rich.console import Console

    return Console()


def show_table(columns: list[str], rows: list[tuple[Any, ...]]) -> None:
    """Columns that fold where the screen is narrow."""
    from rich.table import Table

    table = Table(show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(str, row))
    console().print(table)


def show_runs(states: list[dict[str, Any]], sweeps: list[dict[str, Any]]) -> None:
    """A line for each run, as `RunFolder.state` tells of it, and for each sweep."""
    if states:
        show_table(
            ["run", "state", "step", "kNN held-out", "how to go on"],
            [
                (s["name"], s["status"], f"{s.get('step', 0)}/{s.get('total_steps', '?')}", percent(s.get("knn")), next_command(s))
                for s in states
            ],
        )
    if states and sweeps:
        print()
    if sweeps:
        rows: list[tuple[Any, ...]] = []
        for s in sweeps:
            follows = f"manyviews {'report' if s['status'] == 'finished' else 'resume'} {s['name']}"
            searched = ", ".join(key.rsplit(".", 1)[-1] for key in s["space"])
            best = f"{s['best_words']} {s['score']}" if s["best_score"] is not None else ""
            rows.append((s["name"], s["status"], f"{s['ended_trials']}/{s['trials']}", searched, best, follows))
        show_table(["sweep", "state", "trials ended", "searches", "best", "how to go on"], rows)


def percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.1f} %"


def next_command(state: dict[str, Any]) -> str:
    name = state["name"]
    return {
        "finished": f"manyviews evaluate {name}",
        "interrupted": f"manyviews resume {name}",
        "failed": f"manyviews resume {name}  ({state.get('message', '')[:60]})",
        "created": f"manyviews resume {name}",
    }.get(state["status"], "")


def write_json(options: Any, value: Any) -> None:
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(value, indent=2, default=str) + "\n")
