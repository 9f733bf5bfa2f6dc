"""`resume` of a run with workers: they begin before its driver has loaded anything slow, and prepare the run themselves."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from pipeline.loading import loading
from pipeline.runs import RunFolder
from pipeline.tracking import Tracker
from pipeline.train import checkpoint
from pipeline.train.attend import WorkersLost, attend
from pipeline.train.conduct import Course, Outcome, conduct, tracked
from pipeline.train.display import Screen
from pipeline.train.done import Done
from pipeline.train.group import Group, Shape, begin_again


def resume(folder: RunFolder, *, console: Console) -> Outcome | None:
    """Go on with a run on as many workers as it had last. None if they cannot be had at once: `launch.resume` says why, or goes on.

    Raises:
        ConfigError: another process works on the run, or something must be changed first.
    """
    facts = folder.state()
    course, shape = Course.of(facts), Shape.of(facts)
    if facts.get("status") == "finished" or course is None or shape is None or checkpoint.pointed_to(folder.checkpoints) is None:
        return None
    with folder.working():
        with loading():
            group = begin_again(folder, shape)
        if group is None:
            return None
        try:
            step = checkpoint.last_step(folder.checkpoints)
            console.print(f"{folder.name}: {shape.workers} workers go on from step {step} ...", highlight=False, soft_wrap=True)
            tracker = tracked(folder)
            return conduct(folder, course, tracker, console, lambda screen, stop: _train(group, folder, tracker, screen, stop))
        finally:
            if group.alive:
                group.end()


def _train(group: Group, folder: RunFolder, tracker: Tracker, screen: Screen, stop: Callable[[], bool]) -> Done:
    try:
        return attend(group, folder, screen=screen, stop=stop, news=tracker.wake, before=tracker.rewind)
    except WorkersLost as loss:
        screen.say(f"[yellow]warning:[/yellow] {loss}; starting again with as many workers as fit")
    from pipeline.train.prepare import prepare_again
    from pipeline.train.workers import train_with_workers

    ready = prepare_again(folder)
    return train_with_workers(ready, folder, None, screen=screen, stop=stop, news=tracker.wake, before=tracker.rewind, doubtful=True)
