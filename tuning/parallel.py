"""Parallel coordinates of a sweep: one line a trial, from knob to knob to its score."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.figures.style import GRAY, INK, note
from tuning.axes import Place, place, titled
from tuning.results import Sweep, Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def parallel(sweep: Sweep, path: Path) -> Path:
    """One line a trial through its values on all knobs to its score, which also gives the colour."""
    import matplotlib
    from matplotlib.collections import LineCollection
    from matplotlib.colors import ListedColormap, Normalize

    knobs, trials = sweep.knobs, [t for t in sweep.trials if all(k.name in t.values for k in sweep.knobs)]
    places = [place(knob, trials) for knob in knobs]
    heights = np.stack([_heights(p, trials) for p in places], axis=1)  # (trials, knobs)
    scores = [t.score for t in trials if t.ranked and t.score is not None]
    low, high = min(scores), max(scores)
    low, high = (low, high) if high > low else (low - 0.005, high + 0.005)
    # the pale end of the map would be lost on white: the best are the darkest
    colours = ListedColormap(matplotlib.colormaps["viridis_r"](np.linspace(0.08, 1, 256)))
    norm, end = Normalize(low, high), len(knobs)
    with titled(path, max(1.75 * (end + 1), 6.4), 4.4, "All trials, knob by knob", _words(sweep, trials)) as figure:
        axes = figure.subplots()
        axes.set(xlim=(-0.18, end + 0.32), ylim=(-0.05, 1.05), yticks=[])
        axes.spines[:].set_visible(False)
        labels = [p.knob.label + ("\n(log)" if p.log else "\n") for p in places]
        axes.set_xticks(range(end + 1), [*labels, sweep.score_name + "\n"])
        axes.xaxis.tick_top()
        axes.tick_params(length=0, labelsize=9)
        for row, trial in zip(heights, trials, strict=True):
            if not trial.ranked or trial.score is None:
                axes.plot(*_smooth(row), color=GRAY, linestyle=":", linewidth=1.0, alpha=0.6, zorder=1)
                continue
            final, height = trial in sweep.finals, float(norm(trial.score))
            best = final and trial in sweep.best.trials
            style: dict[str, Any] = {"linewidth": 2.6 if best else 1.6 if final else 1.0, "alpha": 0.9 if final else 0.65}
            line = "-" if final else (0, (4, 2))
            axes.plot(*_smooth(np.append(row, height)), color=colours(height), linestyle=line, zorder=2 + height, **style)
        for i, p in enumerate(places):
            axes.plot([i, i], [0, 1], color=GRAY, linewidth=1, zorder=4)
            for x, text in zip(p.ticks(), p.tick_words(), strict=True):
                _tick(axes, i, p.height(x), text)
        strip = np.linspace(0, 1, 101)
        segments = [[(end, a), (end, b)] for a, b in itertools.pairwise(strip)]
        axes.add_collection(LineCollection(segments, colors=colours(strip[:-1]), linewidths=5, zorder=4))
        for score in np.linspace(low, high, 5):
            _tick(axes, end, float(norm(score)), sweep.show(float(score)))
    return path


def _words(sweep: Sweep, trials: Sequence[Trial]) -> str:
    known = [t for t in trials if t.ranked]
    final = sum(t in sweep.finals for t in known)
    solid = "finished" if sweep.finals[0].status == "finished" else f"at step {sweep.final_step:,}"
    words = [f"dark: high; solid: {solid} ({final})"]
    words += [f"dashed: ended earlier, at its score then ({len(known) - final})"] if len(known) > final else []
    words += [f"dotted: no score ({len(trials) - len(known)})"] if len(trials) > len(known) else []
    return "; ".join(words)


def _heights(where: Place, trials: Sequence[Trial]) -> list[float]:
    """Height of each trial on a knob's axis; trials of one category lie a little apart, in order of their score."""
    xs = [where(t.values[where.knob.name]) for t in trials]
    for x in set(xs) if where.names else ():
        members = sorted((i for i, at in enumerate(xs) if at == x), key=lambda i: trials[i].score or 0.0)
        reach = min(0.14, 0.03 * (len(members) - 1))
        for i, shift in zip(members, np.linspace(-reach, reach, len(members)), strict=True):
            xs[i] = x + float(shift)
    return [where.height(x) for x in xs]


def _tick(axes: Axes, x: float, height: float, text: str) -> None:
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2.6, foreground="white")]
    note(axes, text, (x, height), "data", (5, 0), va="center", size=7.5, color=INK, path_effects=halo, zorder=6)


def _smooth(heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A curve that leaves and meets every axis level, so that lines which cross can be told apart."""
    t = np.linspace(0, 1, 24)
    ease = t * t * (3 - 2 * t)
    pairs: list[tuple[Any, Any]] = list(itertools.pairwise(heights))
    xs = [i + t for i in range(len(pairs))] or [np.zeros(1)]
    ys = [a + (b - a) * ease for a, b in pairs] or [heights]
    return np.concatenate(xs), np.concatenate(ys)
