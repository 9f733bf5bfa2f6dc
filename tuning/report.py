"""The report of a sweep: one self-contained page with its pictures beside it, and a summary for the terminal."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING

from tuning import tables
from tuning.best import best_recipe, write_best
from tuning.importance import FEWEST, correlations
from tuning.results import Results
from tuning.sweep import show_value, show_values

if TYPE_CHECKING:
    from rich.console import RenderableType


def write_report(folder: Path, *, to: Path | None = None) -> Path:
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

    results = Results.read(folder)
    where = (to or results.sweep.path / "report").expanduser()
    run = write_best(results, where)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    page = template.render(
        results=results,
        sweep=results.sweep,
        run=run,
        pictures=_pictures(results, where),
        found=correlations(results),
        fewest=FEWEST,
        order=tables.ordered(results),
        tables=tables,
        value=show_value,
        values=show_values,
    )
    page_path = where / "report.html"
    write_atomic(page_path, page.encode())
    return page_path.resolve()


def _pictures(results: Results, folder: Path) -> list[dict[str, str]]:
    """Draw what there is to draw; nothing is drawn that would be an empty frame."""
    from tuning import pictures

    made: list[tuple[Path, str, str]] = []
    params, common = results.sweep.params, results.common_step
    if params:
        words = pictures.describe_trend(results, len(results.settings))
        if results.cut:
            words += " Hollow points ended earlier, at the step that their mark names: their scores are not comparable with filled ones."
        made.append((pictures.response(results, folder / "response.png"), "response to each setting", words))
    if results.cut and common is not None and params:
        words = f"All at step {common:,}, the last at which every measured trial has a score. What leads early need not lead at the end. "
        words += pictures.describe_trend(results, len(results.settings_at(common)))
        made.append((pictures.response_at(results, common, folder / "response_same_step.png"), f"response at step {common}", words))
    if any(len(t.curve) > 1 for t in results.trials):
        words = "Each line is a trial."
        if results.sweep.rungs:
            words += " Dashed lines are the steps at which the scheduler decides."
        copied = [t for t in results.trials if t.copied_from]
        if copied:
            words += f" {len(copied)} trials took over weights of others (column 'weights from' of the table)."
        made.append((pictures.learning(results, folder / "learning_curves.png"), "score over steps", words))
    if len(params) > 1 and len(results.ranked) > 1:
        words = "Follow the dark lines to see which combinations score high."
        if results.cut:
            words += " Dashed lines carry the score at the step where they ended: lower for that alone."
        made.append((pictures.parallel(results, folder / "parallel_coordinates.png"), "parallel coordinates", words))
    return [{"title": title, "words": words} | _embedded(path) for path, title, words in made]


def _embedded(picture: Path) -> dict[str, str]:
    """Return a PNG for the page, shown at 100 pixels an inch."""
    data = picture.read_bytes()
    width = int.from_bytes(data[16:20], "big")  # of the header
    return {"data": base64.b64encode(data).decode(), "width": str(round(width * 100 / 150))}


def summary(folder: Path, *, most: int = 10) -> RenderableType:
    """Return the sweep for a terminal: ranking, best setting, how sure that is, cost, errors. Draws and writes nothing.

    Args:
        folder: the sweep's folder.
        most: trials in the ranking.

    Raises:
        ConfigError: as `write_report`.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    results = Results.read(folder)
    run, labels = best_recipe(results), results.sweep.labels
    rows, trials = tables.rows(results), tables.ordered(results)
    table = Table(show_edge=False, pad_edge=False)
    for column in rows[0]:
        table.add_column(column, justify="left" if column in tables.TEXT else "right", overflow="fold")
    for trial, row in list(zip(trials, rows, strict=True))[:most]:
        table.add_row(*(Text(words) for _, words in row.values()), style="bold" if tables.leads(results, trial) else "")
    more = [f"and {len(trials) - most} more"] if len(trials) > most else []
    words = Table.grid(padding=(0, 3))
    lines = [
        ("best", show_values(results.best.values, labels)),
        ("", f"{results.best_score()}. {results.verdict()}"),
        *tables.cost(results),
    ]
    lines += [("failed", f"trial {t.number}: {t.error or 'no error was recorded'}") for t in results.trials if t.status == "failed"]
    for name, text in lines:
        words.add_row(Text(name), Text(text))
    head = [f"{results.sweep.name}: {results.states()}", *tables.warnings(results, run), ""]
    return Group(*map(Text, head), table, *map(Text, [*more, ""]), words, Text(f"\nrun it with: {run.command}"))
