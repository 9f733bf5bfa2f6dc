"""Progress of a run on the console: a live line on a terminal, printed lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ProgressReporter(Protocol):
    """Receives the steps and messages of the training loop."""

    @property
    def images_per_s(self) -> float: ...

    def update(self, step: int, *, loss: float | None = None, knn: float | None = None) -> None: ...

    def info(self, text: str) -> None: ...


class NullReporter:
    """Shows nothing, and measures the throughput."""

    def __init__(self, batch: int, start_step: int = 0) -> None:
        self.throughput = Throughput(batch, start_step)
        self.first_step_at: float | None = None  # monotonic time of the first step's end, s

    @property
    def images_per_s(self) -> float:
        return self.throughput.images_per_s

    def update(self, step: int, *, loss: float | None = None, knn: float | None = None) -> None:
        self.throughput.mark(step)
        if knn is None and self.first_step_at is None:
            self.first_step_at = time.monotonic()

    def info(self, text: str) -> None: ...


class Throughput:
    """Images per second over the last fifty updates, without the time before the first step and without steps lost to a restart."""

    def __init__(self, batch: int, start_step: int) -> None:
        self.batch, self.start_step = batch, start_step
        self.marks: deque[tuple[float, int]] = deque(maxlen=50)

    def mark(self, step: int) -> None:
        if self.marks and step < self.marks[-1][1]:
            self.marks.clear()
        elif step > self.start_step:
            self.marks.append((time.monotonic(), step))

    @property
    def images_per_s(self) -> float:
        if not self.marks:
            return 0.0
        (t0, s0), (t1, s1) = self.marks[0], self.marks[-1]
        return (s1 - s0) * self.batch / (t1 - t0) if t1 > t0 else 0.0


class Display:
    """Progress of one run: images/s, ETA, loss beside its chance level, online kNN.

    It is one live line on a terminal. Elsewhere it prints a line at the end, after every tenth of the run and at least every
    `quiet_s` seconds.
    """

    def __init__(
        self,
        console: Console,
        *,
        total_steps: int,
        start_step: int,
        batch: int,
        chance: tuple[float, str] | None,
        quiet_s: float = 60.0,
    ) -> None:
        self.console, self.total, self.batch, self.chance, self.quiet_s = console, total_steps, batch, chance, quiet_s
        self.knn: float | None = None
        self.loss: float | None = None
        self.step = start_step
        self.throughput = Throughput(batch, start_step)
        self.printed_at, self.printed_step = time.monotonic(), start_step
        self.live: Progress | None = None
        if console.is_terminal:
            self.live = Progress(
                TextColumn("[bold]step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=console,
                transient=True,
            )
            self.task = self.live.add_task("", total=total_steps, completed=start_step, figures="waiting for the first images")

    def __enter__(self) -> Display:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.live:
            self.live.stop()
        if self.printed_step != self.step or self.live:
            self._line()

    @property
    def images_per_s(self) -> float:
        return self.throughput.images_per_s

    def figures(self) -> str:
        parts = [f"{self.images_per_s:,.0f} images/s"] if self.images_per_s else []  # 0 before the second step
        if self.loss is not None:
            parts.append(f"loss {self.loss:.3f}" + (f" ({self.chance[1]} {self.chance[0]:.3f})" if self.chance else ""))
        if self.knn is not None:
            parts.append(f"kNN {100 * self.knn:.1f} %")
        return "  ".join(parts)

    def update(self, step: int, *, loss: float | None = None, knn: float | None = None) -> None:
        self.step = step
        self.throughput.mark(step)
        self.loss = self.loss if loss is None else loss
        self.knn = self.knn if knn is None else knn
        if self.live:
            self.live.update(self.task, completed=step, figures=self.figures())
            return
        tenth = step * 10 // self.total > self.printed_step * 10 // self.total
        last = step == self.total and knn is not None  # the last kNN comes after the last loss
        if self.loss is not None and (tenth or last or time.monotonic() - self.printed_at > self.quiet_s):
            self._line()

    def _line(self) -> None:
        left = f"  eta {_duration((self.total - self.step) * self.batch / self.images_per_s)}" if self.images_per_s else ""
        self.console.print(f"step {self.step}/{self.total}  {self.figures()}{left}", highlight=False, soft_wrap=True)
        self.printed_at, self.printed_step = time.monotonic(), self.step

    def info(self, text: str) -> None:
        """Print a message above the live line."""
        self.console.print(text, highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
