"""The front door: `manyviews VERB ...`. Every verb has `--help`; heavy imports wait until a verb needs them."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.cli import early, printing
from pipeline.cli.overrides import configured, parse_settings, split
from pipeline.run_folder import command
from pipeline.shell import program
from tuning import cli as tuning_cli

# Idle threads of one process must not spin on cores that another one needs; read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ABOUT = """Pretrain a vision backbone on your own unlabelled images.

  manyviews pretrain swav-small                            the demo: real pictures, two CPU cores, a few minutes
  manyviews pretrain swav --data.path photos/              your own folder of images
  manyviews pretrain swav --help                           every setting of a recipe, with type and default
"""
COMMON = """common settings (all of them: manyviews pretrain RECIPE --help):
  --data.path PATH                images: a folder, Parquet or WebDataset tars, on disk or at s3://BUCKET/... or gs://BUCKET/...;
                                  hf://datasets/OWNER/NAME; cifar10; or patches, the built-in set
  --data.held-out 0.1             fraction of the training images kept for the online kNN
  --evaluate.path PATH            test images with labels, read once at the end
  --train.epochs N | --train.steps N
  --train.global-batch-size N     images per optimizer step
  --optim.base-lr X  --method.temperature X  --views.local.count N  --backbone.name resnet18
  --train.seed N  --train.deterministic  --train.checkpoint-every STEPS
"""


def parser() -> _Parser:
    top = _Parser(prog="manyviews", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    verbs = top.add_subparsers(dest="verb", metavar="VERB", title="verbs")

    def verb(name: str, run: Callable[..., int], summary: str, *, settings: str = "", epilog: str = "") -> argparse.ArgumentParser:
        sub = verbs.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog="\n".join(filter(None, [epilog, settings])),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            add_help=False,
        )
        # a verb with settings shows those of the recipe that is named, so its help waits for the other arguments
        sub.add_argument("-h", "--help", action="store_true" if settings else "help", default=False, help="show this help")
        sub.add_argument("--runs-dir", default="runs", metavar="DIR", help="where run folders lie, also s3://... (default: runs)")
        sub.add_argument("--json", type=Path, metavar="FILE", help="also write the result for machines")
        sub.set_defaults(do=run, takes_settings=bool(settings), sub=sub)
        return sub

    add = verb("pretrain", pretrain, "train a new run, evaluate it and register its backbone", settings=COMMON, epilog=_recipe_list())
    add.add_argument("recipe", nargs="?", metavar="RECIPE", help="a starting point; its settings can be changed below")
    add.add_argument("--run", metavar="NAME", help="name of the run (default: recipe, date and time)")

    add = verb("resume", resume, "go on with an interrupted run or sweep: same plan, same settings, from its last checkpoints")
    add.add_argument("run", metavar="RUN_OR_SWEEP", help="name or folder of the run or sweep")

    add = verb("continue", continue_run, "start a new phase from a run's full last state, with a new schedule", settings=COMMON)
    add.add_argument("from_run", nargs="?", metavar="RUN", help="name or folder of the finished run")
    add.add_argument("--run", metavar="NAME", help="name of the new run")

    add = verb("evaluate", evaluate, "measure a backbone by kNN or probes, beside the untrained backbone", settings=COMMON)
    add.add_argument("model", nargs="?", metavar="RUN_OR_MODEL", help="a run, an exported folder, or models:/NAME@best")
    known = ["knn", "linear", "lowshot"]
    words = "what to measure: knn (also of raw pixels), linear (all labels), lowshot (a few images per class); default: knn"
    add.add_argument("--protocol", nargs="+", default=["knn"], choices=known, help=words)

    add = verb("embed", embed, "write the features of a folder of images to Parquet")
    add.add_argument("model", metavar="RUN_OR_MODEL", help="a run, an exported folder, or models:/NAME@best")
    add.add_argument("--data.path", dest="data_path", required=True, metavar="PATH", help="images, as for pretrain")
    add.add_argument("--to", type=Path, required=True, metavar="DIR", help="where the Parquet files go")
    words = "GPUs of each actor that embeds, such as 1 or 0.5; 0 = CPUs (default: 1 where there are GPUs)"
    add.add_argument("--gpus", type=float, metavar="N", help=words)
    add.add_argument("--bf16", action="store_true", help="bf16 instead of float32: faster on a GPU, features are rounded")
    add.add_argument("--track.uri", dest="uri", metavar="URI", help="tracking server of models:/ (default: the runs folder's own)")

    add = verb("views", views, "draw a contact sheet: the crops and augmentations that a recipe makes of your images", settings=COMMON)
    add.add_argument("recipe", nargs="?", metavar="RECIPE")
    add.add_argument("--images", type=int, default=6, metavar="N", help="how many images to show (default: 6)")
    add.add_argument("--to", type=Path, default=Path("views.png"), metavar="FILE", help="the picture (default: views.png)")

    add = verb(
        "figure",
        figure,
        "draw a picture of a run or a model, finished or not, again or of other images",
        settings=COMMON,
        epilog=_picture_list(),
    )
    add.add_argument("name", nargs="?", metavar="PICTURE", help="which picture")
    add.add_argument("model", nargs="?", metavar="RUN_OR_MODEL", help="a run, an exported folder, or models:/NAME@best")
    add.add_argument("--to", type=Path, metavar="FILE", help="the file (default: PICTURE.png)")

    verb("methods", methods, "list the methods with their papers")
    verb("recipes", recipes, "list the recipes")

    add = verb("tune", tune, "search over any settings of a recipe by Ray Tune", settings=COMMON, epilog=tuning_cli.EXAMPLES)
    tuning_cli.add_options(add)

    add = verb("report", report, "draw a sweep: a page with plots, a table and the best configuration")
    add.add_argument("sweep", metavar="SWEEP", help="name or folder of the sweep")
    add.add_argument("--to", type=Path, metavar="DIR", help="folder of the report (default: report/ in the sweep)")

    add = verb("study", study, "try a paper's finding on small data: several arms and seeds, a table and a picture", settings=COMMON)
    add.add_argument("name", nargs="?", metavar="STUDY", help="which study; without a name, what there is")
    add.add_argument("--seeds", type=int, metavar="N", help="runs of each arm (default: the study's own number)")

    add = verb("runs", runs, "list runs, their state and how to go on; one run in detail")
    add.add_argument("run", nargs="?", metavar="RUN_OR_SWEEP")

    add = verb("sync", sync, "send a run's points to MLflow that did not arrive while the server was down")
    add.add_argument("run", metavar="RUN")

    add = verb("doctor", doctor, "check machine, packages, data and tracking before time is spent", settings=COMMON)
    add.add_argument("recipe", nargs="?", metavar="RECIPE", help="also check this recipe's settings against the data")

    add = verb("completion", completion, 'print what makes a shell complete commands: eval "$(manyviews completion bash)"')
    add.add_argument("shell", choices=["bash", "zsh"])
    top.verbs = verbs.choices
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns 0 = done, 1 = failed or interrupted, 2 = something must be changed first."""
    from methods.parts.errors import ConfigError

    argv = list(sys.argv[1:] if argv is None else argv)
    top = parser()
    if not argv:
        top.print_help()
        return 0
    try:
        options, settings = top.parse_known_args(argv)
        if settings and not options.takes_settings:
            raise ConfigError(f"{settings[0]}: no such option of {options.verb}; see manyviews {options.verb} --help")
        if options.help and not getattr(options, "recipe", None):
            options.sub.print_help()
            return 0
        early.check(split(settings), getattr(options, "recipe", None))
        options.argv = argv
        options.runs_given, options.runs_dir = options.runs_dir, _runs_dir(options.runs_dir)
        return int(options.do(options, [*settings, "--help"] if options.help else settings))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 1


def _runs_dir(given: str) -> Path:
    """The folder to work in."""
    if "://" not in given:
        return Path(given)
    from pipeline.storage.mirror import local_copy

    return local_copy(given)


# ---------------------------------------------------------------------------- verbs


def pretrain(options: Any, settings: list[str]) -> int:
    config = configured(_given(options, "recipe", "RECIPE"), settings)
    from pipeline.train import launch

    return printing.conclude(launch.pretrain(config, runs_dir=options.runs_dir, run=options.run, console=printing.console()), options)


def resume(options: Any, settings: list[str]) -> int:
    from methods.parts.errors import ConfigError
    from pipeline.run_folder import find_run

    try:
        folder = find_run(options.run, options.runs_dir)
    except ConfigError:
        if (code := tuning_cli.resume(options.run, options, printing.write_json, printing.console())) is None:
            raise
        return code
    from pipeline.train import launch

    return printing.conclude(launch.resume(folder, runs_dir=options.runs_dir, console=printing.console()), options)


def continue_run(options: Any, settings: list[str]) -> int:
    from pipeline.run_folder import find_run

    earlier = find_run(_given(options, "from_run", "RUN"), options.runs_dir)
    from pipeline.config import from_yaml

    config = parse_settings(from_yaml(earlier.config_text()), settings, f"manyviews continue {earlier.name}")
    from pipeline.train import launch

    return printing.conclude(
        launch.continue_run(earlier, config, runs_dir=options.runs_dir, run=options.run, console=printing.console()), options
    )


def evaluate(options: Any, settings: list[str]) -> int:
    from pipeline.export import registry

    model = _given(options, "model", "RUN_OR_MODEL")
    folder = registry.resolve_model(model, runs_dir=options.runs_dir, uri=_tracking_uri(settings))
    from pipeline.export import evaluation

    config = parse_settings(evaluation.config_of(folder), settings, f"manyviews evaluate {model}")
    scores, probes = evaluation.evaluate(folder, config, options.protocol)
    if scores is not None:
        printing.show_scores(scores)
    for probe in probes:
        printing.show_probe(probe)
    found = {"model": model} | (scores.to_dict() if scores is not None else {})
    printing.write_json(options, found | {probe.name: probe.to_dict() for probe in probes})
    return 0


def embed(options: Any, settings: list[str]) -> int:
    early.require_exists("data.path", options.data_path)
    from pipeline.config import DataConfig
    from pipeline.export import registry
    from pipeline.export.embed import BAD
    from pipeline.export.embed import embed as run

    folder = registry.resolve_model(options.model, runs_dir=options.runs_dir, uri=options.uri)
    report = run(folder, DataConfig(path=options.data_path), options.to, gpus=options.gpus, bf16=options.bf16)
    printing.console().print(f"{report.rows:,} embeddings in {options.to} ({report.images_per_s:,.0f} images/s)", highlight=False)
    if report.bad:
        printing.console().print(f"{report.bad} images could not be decoded; {options.to / BAD} lists them", highlight=False)
    printing.write_json(options, {"rows": report.rows, "bad": report.bad, "seconds": report.seconds, "to": str(options.to)})
    return 0


def views(options: Any, settings: list[str]) -> int:
    config = configured(_given(options, "recipe", "RECIPE"), settings)
    from pipeline.data.sources.base import open_source
    from pipeline.figures.run_figures import views_sheet

    dataset = open_source(config.data)
    picture = views_sheet(config, dataset, options.to, images=options.images)
    for name, group in config.views.items():
        print(f"{name}: {group.describe()}")
    print(picture)
    printing.write_json(options, {"picture": str(picture)})
    return 0


def figure(options: Any, settings: list[str]) -> int:
    from pipeline.figures import pictures

    picture, model = pictures.find(_given(options, "name", "PICTURE")), _given(options, "model", "RUN_OR_MODEL")
    from pipeline.figures.context import FigureContext

    subject = FigureContext.of(model, runs_dir=options.runs_dir, uri=_tracking_uri(settings))
    subject.config = parse_settings(subject.config, settings, f"manyviews figure {picture.name} {model}")
    path = picture.draw(subject, options.to or Path(f"{picture.name}.png"))
    print(path)
    printing.write_json(options, {"picture": str(path)})
    return 0


def methods(options: Any, settings: list[str]) -> int:
    from methods.parts.contract import registered

    rows = [(e.name, e.method.paper, (sys.modules[e.method.__module__].__doc__ or "").split("\n")[0]) for e in registered().values()]
    printing.show_table(["method", "paper", "what it does"], rows)
    printing.write_json(options, [{"name": n, "paper": p, "summary": s} for n, p, s in rows])
    return 0


def recipes(options: Any, settings: list[str]) -> int:
    from pipeline.recipes import entries

    printing.show_table(["recipe", "what it is"], [(e.name, e.summary) for e in entries()])
    print(f"\n{program()} pretrain RECIPE --help shows every setting; pipeline/recipes/ holds the files")
    printing.write_json(options, [{"name": e.name, "summary": e.summary} for e in entries()])
    return 0


def tune(options: Any, settings: list[str]) -> int:
    recipe = _given(options, "recipe", "RECIPE")
    return tuning_cli.tune(options, settings, recipe, printing.write_json, printing.console())


def report(options: Any, settings: list[str]) -> int:
    return tuning_cli.report(options, printing.write_json, printing.console())


def study(options: Any, settings: list[str]) -> int:
    return tuning_cli.study(options, settings, printing.write_json, printing.console())


def runs(options: Any, settings: list[str]) -> int:
    from pipeline.run_folder import find_run, list_runs

    if options.run and tuning_cli.shown(options.run, options, printing.write_json, printing.console()):
        return 0
    folders = [find_run(options.run, options.runs_dir)] if options.run else list_runs(options.runs_dir)
    states = [folder.state() | {"folder": str(folder.path)} for folder in folders]
    sweeps = [] if options.run else tuning_cli.listed(options.runs_dir)
    if options.run:
        printing.show_run(states[0], options)
    elif states or sweeps:
        printing.show_runs(states, sweeps, options)
    else:
        print(f"no runs in {options.runs_dir}; start one with: {command('pretrain', 'swav-small', runs_dir=options.runs_dir)}")
    printing.write_json(options, [*states, *sweeps])
    return 0


def sync(options: Any, settings: list[str]) -> int:
    from pipeline.run_folder import find_run

    find_run(options.run, options.runs_dir)
    from pipeline.train import registration

    sent, model = registration.sync(options.run, runs_dir=options.runs_dir)
    print(f"{sent} points sent to MLflow" + (f"; registered as {model.uri}" if model else ""))
    printing.write_json(options, {"run": options.run, "sent": sent, "registered": model.uri if model else None})
    return 0


def doctor(options: Any, settings: list[str]) -> int:
    config = configured(options.recipe or "swav-small", settings)
    from pipeline.doctor.report import diagnose, render

    checks = diagnose(data=config.data, runs_dir=options.runs_dir, uri=config.track.uri, config=config)
    printing.console().print(render(checks))
    printing.write_json(options, [vars(check) for check in checks])
    return 1 if any(check.ok == "fail" for check in checks) else 0


def completion(options: Any, settings: list[str]) -> int:
    from pipeline.cli import completion
    from pipeline.figures import pictures
    from pipeline.recipes import entries

    names = {"RECIPE": [e.name for e in entries()], "PICTURE": [e.name for e in pictures.entries()], "STUDY": tuning_cli.studies()}
    names |= {place: [completion.RUNS] for place in ("RUN", "SWEEP", "RUN_OR_MODEL", "RUN_OR_SWEEP")}
    words = {}
    for verb, sub in parser().verbs.items():
        known = [word for place in re.findall(r"--[\w.-]+|[A-Z_]+", sub.format_usage()) for word in names.get(place, [place])]
        settings = completion.settings() if sub.get_default("takes_settings") else []
        words[verb] = [*dict.fromkeys(word for word in [*known, "--help", *settings] if not word.isupper())]
    print(completion.script(options.shell, words), end="")
    return 0


def _given(options: Any, name: str, shown: str) -> str:
    from methods.parts.errors import ConfigError

    value: str | None = getattr(options, name)
    if value is None or value.startswith("-"):
        raise ConfigError(f"{shown}: missing; see manyviews {options.verb} --help")
    return value


def _tracking_uri(settings: list[str]) -> str | None:
    """`--track.uri` among settings that are not parsed yet."""
    return next((b for a, b in itertools.pairwise(settings) if a == "--track.uri"), None)


def _recipe_list() -> str:
    from pipeline.recipes import entries

    return _list("recipes", [(e.name, e.summary) for e in entries()])


def _picture_list() -> str:
    from pipeline.figures.pictures import entries

    return _list("pictures", [(e.name, e.summary) for e in entries()])


def _list(title: str, rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return f"{title}:\n" + "\n".join(f"  {name:{width}}  {summary}" for name, summary in rows) + "\n"


class _Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one sentence and exit code 2."""

    verbs: Mapping[str, argparse.ArgumentParser]

    def error(self, message: str) -> Any:
        from methods.parts.errors import ConfigError

        verb = f" {self.prog.split(' ', 1)[1]}" if " " in self.prog else ""
        raise ConfigError(f"{message}; see manyviews{verb} --help")


if __name__ == "__main__":
    sys.exit(main())
