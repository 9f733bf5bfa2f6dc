"""The verbs `tune`, `report` and `study`: their options and help. Heavy modules are loaded when a verb runs."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import UseAppendAction

from pipeline.cli.verb import Count, Recipe, RunsVerb, Share, Text, option
from pipeline.run_folder import command

EXAMPLES = """examples:
  manyviews tune swav-small --space method.temperature=log:0.05:0.5 method.num_prototypes=choice:32,64,128
  manyviews tune coke-small --space method.constraint_ratio          the range that stands beside the setting
  manyviews tune msn-small --space method.mask_ratio=linear:0:0.7 --train.steps 150
  manyviews tune swav-small --space optim.base_lr --seeds 3          every setting with three seeds

ranges: KEY=log:LOW:HIGH  KEY=linear:LOW:HIGH  KEY=int:LOW:HIGH  KEY=choice:A,B,C  or a bare KEY, where the setting states one
        (any setting by its dotted name: manyviews tune RECIPE --help; lists as choice:[0.05,0.3],[0.1,0.5])

A trial is as long as the recipe says, or as --train.steps or --train.epochs say. ASHA lets the best third of the trials go
on from each of its steps, so twelve trials cost about as much as five. Learning rates, queues and the like follow the
searched values by the recipe's rules. `manyviews resume SWEEP` goes on with an interrupted sweep.
"""


@dataclass(frozen=True, kw_only=True)
class TuneOptions(RunsVerb):
    """The options of `tune`."""

    recipe: Recipe  # a starting point; its settings can be changed as below
    #: what to search, as below
    space_words: Annotated[UseAppendAction[tuple[tuple[str, ...], ...]], option("KEY=RANGE ...", name="space")] = ()
    trials: Annotated[Count, option("N", "12; a grid: all")] = None  # settings to try
    search: Annotated[str, option("NAME")] = "random"  # random, grid or optuna
    scheduler: Annotated[str, option("NAME")] = "asha"  # asha, none or pbt
    #: what ranks the trials: knn or linear on held-out training images, or without labels rankme
    score: Annotated[str, option("NAME")] = "knn"
    seeds: Annotated[int, option("N")] = 1  # trials of each setting, each with another seed
    seed: Annotated[int, option("N")] = 0  # of the draws: the same seed draws the same trials
    points: Annotated[int, option("N")] = 4  # values of each range in a grid
    grace: Annotated[Count, option("STEPS", "by rule")] = None  # steps before asha cuts, or between pbt's exchanges
    concurrent: Annotated[Count, option("N", "one for four cores, or as many as fit")] = None  # trials at the same time
    gpus: Annotated[Share, option("SHARE", "1 where there are GPUs")] = None  # part of a GPU for each trial, e.g. 0.5
    name: Annotated[Text, option("SWEEP", "tune, recipe, date and time")] = None  # name of the sweep

    @property
    def space(self) -> list[str]:
        """What to search, of all `--space`."""
        return [words for given in self.space_words for words in given]


def tune(options: Any, settings: list[str], recipe: str, write: Callable[[Any, Any], None], console: Any) -> int:
    from pipeline.cli.overrides import configured

    config = configured(recipe, settings, "tune")
    from tuning import search

    command = shlex.join(["manyviews", *sys.argv[1:]])
    names = ("trials", "search", "scheduler", "score", "seeds", "seed", "grace", "points", "concurrent", "gpus")
    args = search.TuneArgs(tuple(options.space), **{name: getattr(options, name) for name in names}, command=command)
    made, code = search.tune(config, args, runs_dir=_local(options), name=options.name, console=console)
    write(options, as_dict(made))
    return code


def resume(reference: str, options: Any, write: Callable[[Any, Any], None], console: Any) -> int | None:
    """Go on with a sweep of that name; None if there is none."""
    from tuning.sweep import find

    found = find(reference, Path(options.runs_dir))
    if found is None:
        return None
    from tuning import search

    code = search.resume(found, console)
    write(options, as_dict(found))
    return code


def report(options: Any, write: Callable[[Any, Any], None], console: Any) -> int:
    from methods.parts.errors import ConfigError
    from tuning.report import summary, write_report
    from tuning.sweep import find

    found = find(options.sweep, Path(options.runs_dir))
    if found is None:
        listing = command("runs", runs_dir=options.runs_dir)
        raise ConfigError(f"sweep={options.sweep}: no such sweep in {options.runs_dir}; `{listing}` lists what there is")
    page = write_report(found.path, to=options.to)
    console.print(summary(found.path))
    console.print(f"report    {page}", highlight=False, soft_wrap=True)
    write(options, as_dict(found) | {"report": str(page)})
    return 0


def study(options: Any, settings: list[str], write: Callable[[Any, Any], None], console: Any) -> int:
    from pipeline.cli.overrides import keys, parse_settings
    from pipeline.recipes import load_recipe
    from tuning import studies

    if options.name is None or options.name.startswith("-"):
        for found in studies.STUDIES.values():
            console.print(f"[bold]{found.name}[/bold]  {found.question} ({found.paper})", highlight=False, soft_wrap=True)
        return 0
    planned = studies.find_study(options.name)
    from pipeline.config import flatten

    config = load_recipe(planned.recipe)
    parsed = flatten(parse_settings(config, settings, f"manyviews study {planned.name}"))
    asked = keys(config, settings)
    lengths = {"train.steps", "train.epochs"}  # the one makes the other None
    given = {key: parsed[key] for key in asked | (lengths if asked & lengths else set())}
    page = studies.study(planned.name, runs_dir=_local(options), console=console, settings=given, seeds=options.seeds)
    console.print(f"study     {page}", highlight=False, soft_wrap=True)
    write(options, json.loads((page.parent / "study.json").read_text()))
    return 0


def studies() -> list[str]:
    """The names of the studies."""
    from tuning.studies import STUDIES

    return list(STUDIES)


def as_dict(sweep: Any) -> dict[str, Any]:
    """Return a sweep and its trials, as they are now, for `--json`."""
    from tuning.sweep import Sweep

    now = Sweep.read(sweep.path)
    return now.facts | {"folder": str(now.path), "results": [trial.facts() for trial in now.trials()]}


def listed(runs_dir: Path) -> list[dict[str, Any]]:
    """Return every sweep as `runs` shows it."""
    from methods.parts.errors import ConfigError
    from tuning.results import Results
    from tuning.sweep import show_score, sweeps

    rows = []
    for sweep in sweeps(runs_dir):
        best = None
        with contextlib.suppress(ConfigError):  # no trial has a score yet
            best = Results.read(sweep.path).best.mean
        row = {"ended_trials": sum(trial.has_ended for trial in sweep.trials()), "best_score": best, "folder": str(sweep.path)}
        rows.append(sweep.facts | row | {"best_words": show_score(best, sweep.facts["score"])})
    return rows


def shown(reference: str, options: Any, write: Callable[[Any, Any], None], console: Any) -> bool:
    """Print the ranking of a sweep of that name; False if there is none."""
    from tuning.sweep import find

    found = find(reference, Path(options.runs_dir))
    if found is None:
        return False
    from tuning.display import conclude

    conclude(console, found)
    write(options, as_dict(found))
    return True


def _local(options: Any) -> Path:
    from methods.parts.errors import ConfigError

    if "://" in options.runs_given:
        raise ConfigError(
            f"runs_dir={options.runs_given}: a sweep needs a folder that every node sees, not an object store; give a shared one"
        )
    return Path(options.runs_dir)
