"""Pictures of a sweep: response to each setting, learning curves with rungs, parallel coordinates. PNG, colour-blind-safe."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.figures.style import BLUE, GRAY, INK, PALE, VERMILLION, note
from tuning.axes import AxisScale, band_handles, draw_bands, score_ticks, shorten, titled
from tuning.results import Results, Setting
from tuning.space import Param
from tuning.sweep import Trial, show_values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HOLLOW: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": GRAY, "markersize": 5}
CUT_MARKS = ("v", "s", "D", "^")  # one for each step at which trials ended early, earliest first
BINS_FROM = 8  # points of a range from which medians of bins are drawn


# ---------------------------------------------------------------------------- response curves


def response(results: Results, path: Path) -> Path:
    """Draw the final score against each setting: finished trials filled, others hollow at the score of the step where they ended."""
    words = f"finished trials: {len(results.finals)}"
    if results.finals[0].status != "finished":
        words = f"no trial has finished; filled: at step {results.final_step:,} ({len(results.finals)})"
    return _response(results, results.settings, results.cut, path, f"{results.score_name} by setting", words)


def response_at(results: Results, step: int, path: Path) -> Path:
    """Draw the score of all trials at one step against each setting: cut and finished trials on equal terms."""
    settings = results.settings_at(step)
    words = f"{sum(len(s.scores) for s in settings)} trials, those cut later among them, all at the same step"
    return _response(results, settings, (), path, f"{results.score_name} at step {step:,} by setting", words)


def _response(results: Results, settings: Sequence[Setting], cut: Sequence[Trial], path: Path, title: str, words: str) -> Path:
    params, final = results.sweep.params, settings is results.settings
    columns = {1: 1, 2: 2, 4: 2}.get(len(params), 3)
    rows = math.ceil(len(params) / columns)
    cuts = sorted({t.score_step for t in cut})
    marks = {step: CUT_MARKS[i] if len(cuts) <= len(CUT_MARKS) else "o" for i, step in enumerate(cuts)}
    with titled(path, max(3.6 * columns, 5.6), 2.75 * rows + 1.2, title, words) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for spot, axes in enumerate(grid.flat):
            if spot >= len(params):
                axes.remove()
                continue
            _panel(axes, results, params[spot], settings, cut, marks)
            draw_bands(axes, results, spread=final)
            if spot % columns == 0:
                axes.set_ylabel(results.score_name)
        _legend(figure, settings, cut, marks, band_handles(results, spread=final))
    return path


def _panel(axes: Axes, results: Results, param: Param, settings: Sequence[Setting], cut: Sequence[Trial], marks: dict[int, str]) -> None:
    scale = AxisScale.of(param, results.sweep.labels[param.key], results.trials)
    scale.apply(axes)
    settings = [s for s in settings if param.key in s.values]
    xs = [scale(s.values[param.key]) for s in settings]
    apart = _apart(scale, xs, [s.mean for s in settings])
    _trend(axes, scale, xs, settings, alone=len(results.sweep.params) == 1)
    for x, setting in zip(apart, settings, strict=True):
        if setting.std is not None:
            axes.plot([x] * len(setting.scores), setting.scores, "o", color=BLUE, alpha=0.3, markersize=3.5, markeredgewidth=0, zorder=3)
            axes.errorbar(x, setting.mean, setting.std, color=BLUE, linewidth=1.2, capsize=3, zorder=3)
        axes.plot(x, setting.mean, "o", color=BLUE, markersize=6, markeredgecolor="white", markeredgewidth=0.6, zorder=4)
        if setting.values == results.best.values:
            axes.plot(x, setting.mean, "o", markerfacecolor="none", markeredgecolor=VERMILLION, markersize=11, zorder=5)
    for trial in cut:
        if param.key in trial.values and trial.score is not None:
            axes.plot(scale(trial.values[param.key]), trial.score, marks[trial.score_step], **HOLLOW, zorder=2)
    axes.yaxis.set_major_formatter(score_ticks(results))
    axes.grid(axis="y", color=PALE, linewidth=0.6)
    axes.set_axisbelow(True)


def _trend(axes: Axes, scale: AxisScale, xs: Sequence[float], settings: Sequence[Setting], *, alone: bool) -> None:
    """Draw a line through the values where one setting is searched; medians over the others where there are several and enough points."""
    values = sorted(set(xs))
    ys = {x: [s.mean for s, at in zip(settings, xs, strict=True) if at == x] for x in values}
    if scale.names or len(values) <= len(xs) / 2 or alone:
        if len(xs) == len(values) and not alone:
            return
        middles = [statistics.median(ys[x]) for x in values]
        if scale.names:
            for x, y in zip(values, middles, strict=True):
                if len(ys[x]) > 1:
                    axes.plot([x - 0.22, x + 0.22], [y, y], color=INK, linewidth=1.6, zorder=2)
        elif len(values) > 1:
            axes.plot(values, middles, color=INK, linewidth=1.2, zorder=1)
    elif len(xs) >= BINS_FROM:
        order = np.argsort(xs, kind="stable")
        bins = np.array_split(order, min(6, max(3, len(xs) // 4)))
        line = [(statistics.median(xs[i] for i in part), statistics.median(settings[i].mean for i in part)) for part in bins]
        axes.plot(*zip(*line, strict=True), color=INK, linewidth=1.2, zorder=1)


def describe_trend(results: Results, points: int) -> str:
    """Say what the black line of a response picture is."""
    params = results.sweep.params
    if len(params) == 1:
        return "The line joins the values." if not params[0].choices else "A short line marks the median of a choice."
    words = "The other settings varied at the same time and are not held fixed, so a panel shows what a setting does on average over them. "
    if points < BINS_FROM:
        return words + f"With {points} points no trend is drawn for ranges; a short line marks the median of a choice."
    return words + "The black line joins medians of bins with equally many points (choices: a short line marks the median)."


def _apart(scale: AxisScale, xs: Sequence[float], ys: Sequence[float]) -> list[float]:
    """Return points with those of one choice moved sideways a little where they are close, so that none hides another."""
    moved, near = list(xs), 0.03 * (max(ys, default=0.0) - min(ys, default=0.0))
    for x in set(xs) if scale.names else ():
        members = sorted((i for i, at in enumerate(xs) if at == x), key=lambda i: ys[i])
        for before, i in itertools.pairwise(members):
            if ys[i] - ys[before] <= near:
                moved[i] = x + (0.09 if moved[before] <= x else -0.09)
    return moved


def _legend(figure: Figure, settings: Sequence[Setting], cut: Sequence[Trial], marks: dict[int, str], chance: list[Any]) -> None:
    from matplotlib.lines import Line2D

    repeats = sorted({len(s.scores) for s in settings if len(s.scores) > 1})
    n = f"n = {repeats[0]}" if len(repeats) == 1 else f"n = {repeats[0]} to {repeats[-1]}" if repeats else ""
    words = f"mean ± standard deviation over seeds, {n}" if repeats else "one setting, one seed"
    ring: dict[str, Any] = HOLLOW | {"markeredgecolor": VERMILLION, "markersize": 10}
    handles = [
        Line2D([], [], color=BLUE, markersize=6, linestyle="", marker="o", label=words),
        Line2D([], [], linestyle="", marker="o", label="best setting", **ring),
    ]
    ended = {mark: f"ended at step {step:,}: its score there ({sum(t.score_step == step for t in cut)})" for step, mark in marks.items()}
    if len(marks) > len(CUT_MARKS):
        ended = {"o": f"ended between steps {min(marks):,} and {max(marks):,}: its score there ({len(cut)})"}
    handles += [Line2D([], [], linestyle="", marker=mark, label=words, **HOLLOW) for mark, words in ended.items()]
    handles += chance
    columns = 1 if figure.get_size_inches()[0] < 7 else 3
    figure.legend(handles=handles, loc="outside lower left", ncols=columns, frameon=False, fontsize=8, handletextpad=0.3, columnspacing=1.4)


# ---------------------------------------------------------------------------- learning curves


def learning(results: Results, path: Path) -> Path:
    """Draw the score over steps of every trial, with the rungs of ASHA, the marks of what was cut, and the exploits of PBT."""
    from matplotlib.ticker import LogLocator, NullFormatter

    drawn = [t for t in results.trials if max(t.curve, default=0) > 0]
    words = ", ".join(f"{sum(t.status == s for t in drawn)} {s}" for s in dict.fromkeys(t.status for t in drawn))
    with titled(path, 7.6, 4.4, f"{results.score_name} over steps", words) as figure:
        axes = figure.subplots()
        first = min(step for t in drawn for step in t.curve if step > 0)
        last = max(results.sweep.total_steps, *(max(t.curve) for t in drawn))
        log = last > 50 * first  # the untrained network, step 0, is then left out
        for trial in sorted(drawn, key=lambda t: t.score or 0.0):
            _learning_curve(axes, trial, trial is results.best_trial, dense=len(drawn) > 25)
        draw_bands(axes, results, spread=True)
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(first / 1.1 if log else 0, last * (1.1 if log else 1.03))
        axes.xaxis.set_major_formatter(lambda v, _: f"{v:,g}")
        for rung in results.sweep.rungs:
            if rung >= last:
                continue
            stopped = sum(t.status == "stopped" and t.step == rung for t in results.trials)
            axes.axvline(rung, color=GRAY, linestyle=(0, (4, 3)), linewidth=0.9, zorder=0)
            said = f"rung {rung:,}" + (f"\n{stopped} cut" if stopped else "") if results.sweep.scheduler == "asha" else ""
            note(axes, said, (rung, 1), ("data", "axes fraction"), (3, -2), va="top", size=7.5, color=GRAY)
        axes.set(xlabel="optimizer step" + (" (log scale)" if log else ""), ylabel=results.score_name)
        axes.yaxis.set_major_formatter(score_ticks(results))
        axes.margins(y=0.12)
        axes.grid(axis="y", color=PALE, linewidth=0.6)
        _learning_legend(figure, results, drawn)
    return path


def _learning_curve(axes: Axes, trial: Trial, best: bool, *, dense: bool) -> None:
    steps = sorted(trial.curve)
    scores = [trial.curve[s] for s in steps]
    finished = trial.status == "finished"
    colour = VERMILLION if best else BLUE if finished else GRAY
    style: dict[str, Any] = {"linewidth": 2.2 if best else 1.2 if finished else 0.9, "alpha": 1 if best else 0.35 if dense else 0.75}
    axes.plot(steps, scores, color=colour, marker="o" if len(steps) == 1 else "", markersize=3, zorder=4 if best else 2 + finished, **style)
    ends = {"stopped": "x", "failed": "X", "interrupted": "|"}
    if trial.status in ends:
        ink = INK if trial.status == "failed" else GRAY
        axes.plot(steps[-1], scores[-1], ends[trial.status], color=ink, markersize=6, markeredgewidth=1.4, zorder=3)
    for step in trial.exploits:
        axes.plot(step, np.interp(step, steps, scores), "*", color=INK, markersize=7, zorder=5)


def _learning_legend(figure: Figure, results: Results, drawn: Sequence[Trial]) -> None:
    from matplotlib.lines import Line2D

    states = {t.status for t in drawn}
    handles = [
        Line2D(
            [], [], color=VERMILLION, linewidth=2.2, label=f"best: {shorten(show_values(results.best.values, results.sweep.labels), 70)}"
        )
    ]
    if "finished" in states and len(results.finals) > 1:
        handles.append(Line2D([], [], color=BLUE, label="finished"))
    marks = {"stopped": ("x", "cut by the scheduler"), "failed": ("X", "failed"), "interrupted": ("|", "interrupted")}
    for status, (mark, words) in marks.items():
        if status in states:
            handles.append(Line2D([], [], color=GRAY, marker=mark, markersize=6, markeredgewidth=1.4, label=words))
    if any(t.exploits for t in drawn):
        handles.append(Line2D([], [], color=INK, linestyle="", marker="*", label="took over another trial's weights"))
    handles += band_handles(results, spread=True)
    figure.legend(handles=handles, loc="outside lower left", ncols=2, frameon=False, fontsize=8, columnspacing=1.4)


# ---------------------------------------------------------------------------- parallel coordinates


def parallel(results: Results, path: Path) -> Path:
    """Draw one line a trial through its values on all settings to its score, which also gives the colour."""
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    params, labels = results.sweep.params, results.sweep.labels
    trials = [t for t in results.trials if all(p.key in t.values for p in params)]
    scales = [AxisScale.of(param, labels[param.key], trials) for param in params]
    scores = [t.score for t in trials if t.ranked and t.score is not None]
    low, high = (min(scores), max(scores)) if max(scores) > min(scores) else (scores[0] - 0.005, scores[0] + 0.005)
    # the pale end of the map would be lost on white: the best are the darkest
    colours = ScalarMappable(Normalize(low, high), ListedColormap(matplotlib.colormaps["viridis_r"](np.linspace(0.08, 1, 256))))
    final = sum(t in results.finals for t in trials)
    solid = "finished" if results.finals[0].status == "finished" else f"at step {results.final_step:,}"
    words = [f"dark: high; solid: {solid} ({final})"]
    words += [f"dashed: ended earlier, at its score then ({len(scores) - final})"] if len(scores) > final else []
    words += [f"dotted: no score ({len(trials) - len(scores)})"] if len(trials) > len(scores) else []
    with titled(path, max(1.75 * (len(params) + 1), 6.4), 4.4, "All trials, setting by setting", "; ".join(words)) as figure:
        axes = figure.subplots()
        axes.set(xlim=(-0.18, len(params) + 0.05), ylim=(-0.05, 1.05), yticks=[])
        axes.spines[:].set_visible(False)
        names = [scale.label + ("\n(log)" if scale.log else "\n") for scale in scales]
        axes.set_xticks(range(len(params) + 1), [*names, results.score_name + "\n"])
        axes.xaxis.tick_top()
        axes.tick_params(length=0, labelsize=9)
        heights = zip(*(_heights(scale, param.key, trials) for scale, param in zip(scales, params, strict=True)), strict=True)
        for trial, row in zip(trials, heights, strict=True):
            _line(axes, results, trial, row, colours)
        for i, scale in enumerate(scales):
            axes.axvline(i, 0.05 / 1.1, 1.05 / 1.1, color=GRAY, linewidth=1, zorder=4)
            for x, label in zip(scale.ticks(), scale.tick_labels(), strict=True):
                halo = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
                note(axes, label, (i, scale.height(x)), "data", (5, 0), va="center", size=7.5, color=INK, bbox=halo, zorder=6)
        figure.colorbar(colours, ax=axes, format=score_ticks(results), pad=0.01, aspect=40, shrink=1 / 1.1)
    return path


def _line(axes: Axes, results: Results, trial: Trial, row: Sequence[float], colours: Any) -> None:
    if not trial.ranked or trial.score is None:
        axes.plot(row, color=GRAY, linestyle=":", linewidth=1.0, alpha=0.6, zorder=1)
        return
    final, height = trial in results.finals, float(colours.norm(trial.score))
    width = 2.6 if final and trial in results.best.trials else 1.6 if final else 1.0
    style: dict[str, Any] = {"linewidth": width, "alpha": 0.9 if final else 0.65, "linestyle": "-" if final else (0, (4, 2))}
    axes.plot([*row, height], color=colours.to_rgba(trial.score), zorder=2 + height, **style)


def _heights(scale: AxisScale, key: str, trials: Sequence[Trial]) -> list[float]:
    """Return the height of each trial on an axis; trials of one choice lie a little apart, in order of their score."""
    xs = [scale(t.values[key]) for t in trials]
    for x in set(xs) if scale.names else ():
        members = sorted((i for i, at in enumerate(xs) if at == x), key=lambda i: trials[i].score or 0.0)
        reach = min(0.14, 0.03 * (len(members) - 1))
        for i, shift in zip(members, np.linspace(-reach, reach, len(members)), strict=True):
            xs[i] = x + float(shift)
    return [scale.height(x) for x in xs]
