"""The report of a sweep: one self-contained page with its pictures beside it, and a summary for the terminal."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING

from tuning import tables
from tuning.best import best_recipe, score_words, write_best
from tuning.importance import FEWEST, correlations
from tuning.results import Sweep, read_sweep, show_value, show_values

if TYPE_CHECKING:
    from rich.console import RenderableType


def report(folder: Path, *, to: Path | None = None) -> Path:
    """Write the report of a sweep: `report.html`, its pictures as PNG, `best_recipe.py` and `best.yaml`.

    Args:
        folder: the sweep's folder, also while the search goes on.
        to: folder of the report; None = `report/` in the sweep.

    Returns:
        The page.

    Raises:
        ConfigError: `folder` is no sweep, or none of its trials has a score yet.
    """
    from jinja2 import Environment, StrictUndefined

    from pipeline.storage.place import write_atomic

    sweep = read_sweep(folder)
    where = (to or sweep.folder / "report").expanduser()
    run = write_best(sweep, where)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    page = template.render(
        sweep=sweep,
        recipe=sweep.facts.get("recipe"),
        knobs=sweep.knobs,
        best=sweep.best,
        best_words=score_words(sweep),
        run=run,
        warnings=tables.warnings(sweep, run),
        tiles=tables.tiles(sweep),
        facts=tables.facts(sweep, run),
        pictures=_pictures(sweep, where),
        found=correlations(sweep),
        fewest=FEWEST,
        order_words=tables.order_words(sweep),
        columns=tables.columns(sweep),
        rows=tables.rows(sweep),
        failures=[t for t in sweep.trials if t.status == "failed"],
        value=show_value,
        values=show_values,
    )
    page_path = where / "report.html"
    write_atomic(page_path, page.encode())
    return page_path.resolve()


# ---------------------------------------------------------------------------- pictures


def _pictures(sweep: Sweep, folder: Path) -> list[dict[str, str]]:
    """Draw what there is to draw; nothing is drawn that would be an empty frame."""
    from tuning import parallel, pictures

    made: list[tuple[Path, str, str]] = []
    cut = [t for t in sweep.ranked if t not in sweep.finals]
    if sweep.knobs:
        words = pictures.trend_words(sweep, len(sweep.settings))
        if cut:
            words += " Hollow points ended earlier, at the step that their mark names: their scores are not comparable with filled ones."
        made.append((pictures.response(sweep, folder / "response.png"), "response to each setting", words))
    common = sweep.common_step
    if cut and common is not None and sweep.knobs:
        points = sweep.scores_at(common)
        words = f"All at step {common:,}, the last at which every measured trial has a score. What leads early need not lead at the end. "
        words += pictures.trend_words(sweep, len(points))
        made.append((pictures.response_at(sweep, common, folder / "response_same_step.png"), f"response at step {common}", words))
    if any(len(t.curve) > 1 for t in sweep.trials):
        words = "Each line is a trial."
        if sweep.rungs:
            words += " Dashed lines are the steps at which the scheduler decides."
        copied = [t for t in sweep.trials if t.copied_from]
        if copied:
            words += f" {len(copied)} trials took over weights of others (column 'weights from' of the table)."
        made.append((pictures.learning(sweep, folder / "learning_curves.png"), "score over steps", words))
    if len(sweep.knobs) > 1 and len(sweep.ranked) > 1:
        words = "Follow the dark lines to see which combinations score high."
        if cut:
            words += " Dashed lines carry the score at the step where they ended: lower for that alone."
        made.append((parallel.parallel(sweep, folder / "parallel_coordinates.png"), "parallel coordinates", words))
    return [{"title": title, "words": words} | _embedded(path) for path, title, words in made]


def _embedded(picture: Path) -> dict[str, str]:
    """A PNG for the page, shown at 100 pixels an inch."""
    data = picture.read_bytes()
    width = int.from_bytes(data[16:20], "big")  # of the header
    return {"data": base64.b64encode(data).decode(), "width": str(round(width * 100 / 150))}


# ---------------------------------------------------------------------------- terminal


def summary(folder: Path, *, most: int = 10) -> RenderableType:
    """The sweep in a terminal: ranking, best setting, how sure that is, cost, errors. Draws nothing and writes nothing.

    Args:
        folder: the sweep's folder.
        most: trials in the ranking.

    Raises:
        ConfigError: as `report`.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    sweep = read_sweep(folder)
    run = best_recipe(sweep)
    columns, trials = tables.columns(sweep), tables.ordered(sweep)
    table = Table(show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column.name, justify="right" if column.number else "left", overflow="fold")
    for trial in trials[:most]:
        table.add_row(*(Text(column.text(trial)) for column in columns), style="bold" if tables.leads(sweep, trial) else "")
    more = [f"and {len(trials) - most} more"] if len(trials) > most else []
    words = Table.grid(padding=(0, 3))
    lines = [("best", show_values(sweep.best.values, sweep.knobs)), ("", f"{score_words(sweep)}. {sweep.verdict()}"), *tables.cost(sweep)]
    lines += [("failed", f"trial {t.number}: {t.error or 'no error was recorded'}") for t in sweep.trials if t.status == "failed"]
    for name, text in lines:
        words.add_row(Text(name), Text(text))
    head = [f"{sweep.name}: {tables.states(sweep)}", *tables.warnings(sweep, run), ""]
    return Group(*map(Text, head), table, *map(Text, [*more, ""]), words, Text(f"\nrun it with: {run.command}"))
