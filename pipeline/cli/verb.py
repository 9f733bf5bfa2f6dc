"""Verbs as frozen dataclasses: the docstring is the help, the fields are the options, the comment beside a field is that option's help."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Optional

import tyro
from tyro.conf import Positional

from methods.parts.errors import ConfigError, unknown_key
from pipeline.cli import early
from pipeline.cli.parsing import parse
from pipeline.cli.printing import listing
from pipeline.shell import program

HELP = ("-h", "--help")
ABOUT = """Pretrain a vision backbone on your own unlabelled images.

  manyviews pretrain swav-small                            the demo: real pictures, two CPU cores, a few minutes
  manyviews pretrain swav --data.path photos/              your own folder of images
  manyviews pretrain swav --help                           every setting of a recipe, with type and default
"""
IMAGES = """  --data.path PATH                images: a folder, Parquet or WebDataset tars, on disk or at s3://BUCKET/... or gs://BUCKET/...;
                                  hf://datasets/OWNER/NAME; cifar10; or patches, the built-in set
"""
TRAINING = f"""common settings (all of them: manyviews pretrain RECIPE --help):
{IMAGES}  --data.held-out 0.1             fraction of the training images kept for the online kNN
  --evaluate.path PATH            test images with labels, read once at the end
  --train.epochs N | --train.steps N
  --train.global-batch-size N     images per optimizer step
  --optim.base-lr X  --method.temperature X  --views.local.count N  --backbone.name resnet18
  --train.seed N  --train.deterministic  --train.checkpoint-every STEPS
"""
CROPS = f"""common settings (all of them: manyviews pretrain RECIPE --help):
{IMAGES}  --views.global.KEY  --views.local.KEY   count, size, scale, flip, jitter, blur, ... of the large and the small crops
  --train.seed N
"""
MEASURING = f"""common settings (all of them: manyviews pretrain RECIPE --help):
{IMAGES}  --evaluate.path PATH            test images with labels
  --evaluate.size PIXELS          side of an evaluated image
  --evaluate.knn-k N  --evaluate.test-images N  --train.seed N
  --track.uri URI                 tracking server of models:/NAME@best
"""


def option(metavar: str | None, default: str | None = None, *, name: str | None = None) -> Any:
    """Return how an option is shown in the help.

    Args:
        metavar: the word for its value; None = a switch, which has none.
        default: the words for its default, where that is None or follows from a rule.
        name: another name than the field's.
    """

    def own_default(value: str) -> str:
        return "" if value in ("", "None", "False") else f"(default: {value})"

    return tyro.conf.arg(metavar=metavar, name=name, help_behavior_hint=f"(default: {default})" if default else own_default)


# `Optional`, and not `X | None`: for that tyro loads typeguard, which takes longer than all else before an answer
Text = Optional[str]  # noqa: UP045
Count = Optional[int]  # noqa: UP045
Share = Optional[float]  # noqa: UP045
File = Optional[Path]  # noqa: UP045
Switch = Annotated[tyro.conf.FlagCreatePairsOff[bool], option(None)]

Recipe = Annotated[Positional[str], option("RECIPE")]
Run = Annotated[Positional[str], option("RUN")]
Model = Annotated[Positional[str], option("RUN_OR_MODEL")]


@dataclass(frozen=True, kw_only=True)
class Verb:
    """A command, with the options of all commands."""

    settings_help: ClassVar[str] = ""  # of the settings of a run that it takes besides its options; empty = it takes none
    json: Annotated[File, option("FILE")] = None  # also write the result for machines

    def run(self, settings: list[str]) -> int:
        """Do it, and return the exit code: 0 = done, 1 = failed or interrupted.

        Args:
            settings: of a run, as words of the command line.

        Raises:
            ConfigError: something must be changed first.
        """
        raise NotImplementedError

    @classmethod
    def more_help(cls) -> str:
        """Return the examples and lists that stand below the options in the help."""
        return ""


@dataclass(frozen=True, kw_only=True)
class RunsVerb(Verb):
    """A command that works in a folder of runs."""

    runs_given: Annotated[str, option("DIR", name="runs-dir")] = "runs"  # where run folders lie, also s3://...

    @cached_property
    def runs_dir(self) -> Path:
        """The folder to work in; of one in an object store, its local copy."""
        if "://" not in self.runs_given:
            return Path(self.runs_given)
        from pipeline.storage.mirror import local_copy

        return local_copy(self.runs_given)


def read(verbs: Mapping[str, type[Verb]], words: list[str]) -> tuple[Verb, list[str]] | None:
    """Return the verb that a command line names, with the settings of a run in it.

    None if it asks for help of a verb, which is then printed; for that of a recipe's settings they are `--help`.

    Raises:
        ConfigError: an unknown verb or option, or a value that is missing or does not fit.
    """
    if not words or words[0] in HELP:
        print(_overview(verbs))
        return None
    name, *rest = words
    if name not in verbs:
        near = difflib.get_close_matches(name, verbs, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ConfigError(f"invalid choice: '{name}' is no verb; {hint}`{program()} --help` lists all")
    kind = verbs[name]
    own, settings = _parted(rest) if kind.settings_help else (rest, [])
    asked = [word for word in own if word not in HELP]
    if len(asked) == len(own):
        return _parse(kind, name, own), settings
    with contextlib.suppress(ConfigError):  # without a recipe the help is the verb's
        verb = _parse(kind, name, asked)
        if getattr(verb, "recipe", None):
            return verb, ["--help"]
    show_help(kind, name)
    return None


def _parted(words: list[str]) -> tuple[list[str], list[str]]:
    """Return the words of a verb's own options, and those of settings: `--group.key` with the words behind it, or `--group.key=value`."""
    own: list[str] = []
    settings: list[str] = []
    place = own
    for word in words:
        name, given, _ = word.partition("=")
        if word in HELP:
            own.append(word)
        elif word.startswith("--") and "." in name:
            settings.append(word)
            place = own if given else settings
        else:
            place = own if word.startswith("--") else place
            place.append(word)
    return own, settings


def _parse(kind: type[Verb], name: str, words: list[str]) -> Verb:
    see = f"see {program()} {name} --help"
    try:
        verb, unknown = parse(kind, words, prog=f"manyviews {name}")
    except ConfigError as error:
        order = " (it stands before the settings)" if kind.settings_help and str(error).endswith(": missing") else ""
        raise ConfigError(f"{error}{order}; {see}") from None
    for word in unknown:
        if not word.startswith("-"):
            raise ConfigError(f"{word}: one word too many; {see}")
        if not kind.settings_help:
            raise ConfigError(f"{word}: no such option of {name}; {see}")
        key = word.lstrip("-").partition("=")[0].replace("-", "_")
        raise unknown_key(key, [*(field.name for field in fields(kind)), *early.all_settings()])
    return verb


def _overview(verbs: Mapping[str, type[Verb]]) -> str:
    summaries = [(name, str(kind.__doc__).split("\n")[0]) for name, kind in verbs.items()]
    return f"usage: {program()} VERB ...\n\n{ABOUT}\n{listing('verbs', summaries)}\n{program()} VERB --help explains one."


def show_help(kind: type[Verb], name: str) -> None:
    """Print a verb's help."""
    with contextlib.suppress(SystemExit):
        tyro.cli(kind, args=["--help"], prog=f"{program()} {name}")
    print("".join(f"\n{text}" for text in (kind.more_help(), kind.settings_help) if text), end="")
