"""Pictures of a sweep: response to each knob, learning curves with rungs. PNG, colour-blind-safe."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.figures.style import BLUE, GRAY, INK, PALE, VERMILLION, note
from tuning.axes import Place, knob_axis, place, score_ticks, shortened, titled
from tuning.results import Knob, Sweep, Trial, show_values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CUT_MARKS = ("v", "s", "D", "^")  # one for each step at which trials ended early, earliest first
BINS_FROM = 8  # points of a range from which medians of bins are drawn


# ---------------------------------------------------------------------------- response curves


@dataclass(frozen=True)
class Dot:
    """A setting's score in a response curve."""

    values: dict[str, Any]
    scores: tuple[float, ...]  # of its repeats, all at the same step

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores)


def response(sweep: Sweep, path: Path) -> Path:
    """Final score against each knob: finished trials filled, others hollow at the score of the step where they ended."""
    dots = [Dot(s.values, s.scores) for s in sweep.settings]
    cut = [t for t in sweep.ranked if t not in sweep.finals]
    words = f"finished trials: {len(sweep.finals)}"
    if sweep.finals[0].status != "finished":
        words = f"no trial has finished; filled: at step {sweep.final_step:,} ({len(sweep.finals)})"
    return _response(sweep, dots, cut, path, f"{sweep.score_name} by knob", words)


def response_at(sweep: Sweep, step: int, path: Path) -> Path:
    """Score of all trials at one step against each knob: cut and finished trials on equal terms."""
    groups = sweep.scores_at(step)
    dots = [Dot(values, scores) for values, scores in groups]
    words = f"{sum(len(d.scores) for d in dots)} trials, those cut later among them, all at the same step"
    return _response(sweep, dots, [], path, f"{sweep.score_name} at step {step:,} by knob", words)


def _response(sweep: Sweep, dots: Sequence[Dot], cut: Sequence[Trial], path: Path, title: str, words: str) -> Path:
    knobs = sweep.knobs
    columns = {1: 1, 2: 2, 4: 2}.get(len(knobs), 3)
    rows = math.ceil(len(knobs) / columns)
    width = max(3.6 * columns, 5.6)
    cuts = sorted({t.score_step for t in cut})
    marks = {step: CUT_MARKS[i] if len(cuts) <= len(CUT_MARKS) else "o" for i, step in enumerate(cuts)}
    with titled(path, width, 2.75 * rows + 1.2, title, words) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for spot, axes in enumerate(grid.flat):
            if spot >= len(knobs):
                axes.remove()
                continue
            _panel(axes, sweep, knobs[spot], dots, cut, marks)
            if spot % columns == 0:
                axes.set_ylabel(sweep.score_name)
        _legend(figure, dots, cut, marks)
    return path


def _panel(axes: Axes, sweep: Sweep, knob: Knob, dots: Sequence[Dot], cut: Sequence[Trial], marks: dict[int, str]) -> None:
    where = place(knob, sweep.trials)
    knob_axis(axes, where)
    dots = [d for d in dots if knob.name in d.values]
    xs = [where(d.values[knob.name]) for d in dots]
    apart = _apart(where, xs, [d.mean for d in dots])
    _trend(axes, where, xs, dots, alone=len(sweep.knobs) == 1)
    for x, dot in zip(apart, dots, strict=True):
        if len(dot.scores) > 1:
            axes.plot([x] * len(dot.scores), dot.scores, "o", color=BLUE, alpha=0.3, markersize=3.5, markeredgewidth=0, zorder=3)
            axes.errorbar(x, dot.mean, statistics.stdev(dot.scores), color=BLUE, linewidth=1.2, capsize=3, zorder=3)
    axes.plot(apart, [d.mean for d in dots], "o", color=BLUE, markersize=6, markeredgecolor="white", markeredgewidth=0.6, zorder=4)
    for trial in cut:
        if knob.name in trial.values and trial.score is not None:
            x = where(trial.values[knob.name])
            style: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": GRAY, "markersize": 5, "zorder": 2}
            axes.plot(x, trial.score, marks[trial.score_step], **style)
    for x, dot in zip(apart, dots, strict=True):
        if dot.values == sweep.best.values:
            axes.plot(x, dot.mean, "o", markerfacecolor="none", markeredgecolor=VERMILLION, markersize=11, zorder=5)
    axes.yaxis.set_major_formatter(score_ticks(sweep))
    axes.grid(axis="y", color=PALE, linewidth=0.6)
    axes.set_axisbelow(True)


def _trend(axes: Axes, where: Place, xs: Sequence[float], dots: Sequence[Dot], *, alone: bool) -> None:
    """One knob: a line through its values. Several: medians over what the other knobs happened to be; few points: nothing."""
    values = sorted(set(xs))
    ys = {x: [d.mean for d, at in zip(dots, xs, strict=True) if at == x] for x in values}
    if where.names or len(values) <= len(xs) / 2 or alone:
        if len(xs) == len(values) and not alone:
            return
        middles = [statistics.median(ys[x]) for x in values]
        if where.names:
            for x, y in zip(values, middles, strict=True):
                if len(ys[x]) > 1:
                    axes.plot([x - 0.22, x + 0.22], [y, y], color=INK, linewidth=1.6, zorder=2)
        elif len(values) > 1:
            axes.plot(values, middles, color=INK, linewidth=1.2, zorder=1)
    elif len(xs) >= BINS_FROM:
        order = np.argsort(xs, kind="stable")
        bins = np.array_split(order, min(6, max(3, len(xs) // 4)))
        line = [(statistics.median(xs[i] for i in part), statistics.median(dots[i].mean for i in part)) for part in bins]
        axes.plot(*zip(*line, strict=True), color=INK, linewidth=1.2, zorder=1)


def trend_words(sweep: Sweep, points: int) -> str:
    """What the black line of a response picture is."""
    if len(sweep.knobs) == 1:
        return "The line joins the values." if sweep.knobs[0].scale != "choice" else "A short line marks the median of a choice."
    words = "The other knobs varied at the same time and are not held fixed, so a panel shows what a knob does on average over them. "
    if points < BINS_FROM:
        return words + f"With {points} points no trend is drawn for ranges; a short line marks the median of a choice."
    return words + "The black line joins medians of bins with equally many points (choices: a short line marks the median)."


def _apart(where: Place, xs: Sequence[float], ys: Sequence[float]) -> list[float]:
    """Points of one category moved sideways a little where they are close, so that none hides another."""
    moved, near = list(xs), 0.03 * (max(ys, default=0.0) - min(ys, default=0.0))
    for x in set(xs) if where.names else ():
        members = sorted((i for i, at in enumerate(xs) if at == x), key=lambda i: ys[i])
        for before, i in itertools.pairwise(members):
            if ys[i] - ys[before] <= near:
                moved[i] = x + (0.09 if moved[before] <= x else -0.09)
    return moved


def _legend(figure: Figure, dots: Sequence[Dot], cut: Sequence[Trial], marks: dict[int, str]) -> None:
    from matplotlib.lines import Line2D

    repeats = sorted({len(d.scores) for d in dots if len(d.scores) > 1})
    n = f"n = {repeats[0]}" if len(repeats) == 1 else f"n = {repeats[0]} to {repeats[-1]}" if repeats else ""
    words = f"mean ± standard deviation over seeds, {n}" if repeats else "one setting, one seed"
    dot: dict[str, Any] = {"linestyle": "", "marker": "o"}
    handles = [Line2D([], [], color=BLUE, markersize=6, label=words, **dot)]
    handles.append(Line2D([], [], markerfacecolor="none", markeredgecolor=VERMILLION, markersize=10, label="best setting", **dot))
    hollow: dict[str, Any] = {"linestyle": "", "markerfacecolor": "none", "markeredgecolor": GRAY, "markersize": 5}
    if len(marks) > len(CUT_MARKS):
        words = f"ended between steps {min(marks):,} and {max(marks):,}: its score there ({len(cut)})"
        handles.append(Line2D([], [], marker="o", label=words, **hollow))
    else:
        for step, mark in marks.items():
            count = sum(t.score_step == step for t in cut)
            handles.append(Line2D([], [], marker=mark, label=f"ended at step {step:,}: its score there ({count})", **hollow))
    columns = 1 if figure.get_size_inches()[0] < 7 else 3
    figure.legend(handles=handles, loc="outside lower left", ncols=columns, frameon=False, fontsize=8, handletextpad=0.3, columnspacing=1.4)


# ---------------------------------------------------------------------------- learning curves


def learning(sweep: Sweep, path: Path) -> Path:
    """Score over steps of every trial, with the rungs of ASHA and the marks of what was cut, and the exploits of PBT."""
    from matplotlib.ticker import LogLocator, NullFormatter

    drawn = [t for t in sweep.trials if max(t.curve, default=0) > 0]
    words = ", ".join(f"{sum(t.status == s for t in drawn)} {s}" for s in dict.fromkeys(t.status for t in drawn))
    with titled(path, 7.6, 4.4, f"{sweep.score_name} over steps", words) as figure:
        axes = figure.subplots()
        first = min(step for t in drawn for step in t.curve if step > 0)
        last = max(sweep.total_steps, *(max(t.curve) for t in drawn))
        log = last > 50 * first  # the untrained network, step 0, is then left out
        for trial in sorted(drawn, key=lambda t: t.score or 0.0):
            _learning_curve(axes, trial, trial is sweep.best_trial, dense=len(drawn) > 25)
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(first / 1.1 if log else 0, last * (1.1 if log else 1.03))
        axes.xaxis.set_major_formatter(lambda v, _: f"{v:,g}")
        for rung in sweep.rungs:
            if rung >= last:
                continue
            stopped = sum(t.status == "stopped" and t.step == rung for t in sweep.trials)
            axes.axvline(rung, color=GRAY, linestyle=(0, (4, 3)), linewidth=0.9, zorder=0)
            said = f"rung {rung:,}" + (f"\n{stopped} cut" if stopped else "") if sweep.scheduler == "asha" else ""
            note(axes, said, (rung, 1), ("data", "axes fraction"), (3, -2), va="top", size=7.5, color=GRAY)
        axes.set(xlabel="optimizer step" + (" (log scale)" if log else ""), ylabel=sweep.score_name)
        axes.yaxis.set_major_formatter(score_ticks(sweep))
        axes.margins(y=0.12)
        axes.grid(axis="y", color=PALE, linewidth=0.6)
        _learning_legend(figure, sweep, drawn)
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


def _learning_legend(figure: Figure, sweep: Sweep, drawn: Sequence[Trial]) -> None:
    from matplotlib.lines import Line2D

    states = {t.status for t in drawn}
    handles = [Line2D([], [], color=VERMILLION, linewidth=2.2, label=f"best: {shortened(show_values(sweep.best.values, sweep.knobs), 70)}")]
    if "finished" in states and len(sweep.finals) > 1:
        handles.append(Line2D([], [], color=BLUE, label="finished"))
    marks = {"stopped": ("x", "cut by the scheduler"), "failed": ("X", "failed"), "interrupted": ("|", "interrupted")}
    for status, (mark, words) in marks.items():
        if status in states:
            handles.append(Line2D([], [], color=GRAY, marker=mark, markersize=6, markeredgewidth=1.4, label=words))
    if any(t.exploits for t in drawn):
        handles.append(Line2D([], [], color=INK, linestyle="", marker="*", label="took over another trial's weights"))
    figure.legend(handles=handles, loc="outside lower left", ncols=2, frameon=False, fontsize=8, columnspacing=1.4)
