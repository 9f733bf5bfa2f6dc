"""Command lines parsed by tyro into dataclasses, with mistakes as one sentence."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
from typing import Any, TypeVar

import tyro

from methods.parts.errors import ConfigError

T = TypeVar("T")


def parse(kind: type[T], words: list[str], **options: Any) -> tuple[T, list[str]]:
    """Return the value of `kind` that `words` give, and the words that belong to none of its fields.

    Args:
        options: passed on to `tyro.cli`.

    Raises:
        ConfigError: a value is missing or does not fit, in the form `key=value: remedy`.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return tyro.cli(kind, args=words, return_unknown_args=True, **options)
    except SystemExit:
        raise ConfigError(_sentence(said.getvalue())) from None


# tyro's messages and ours: key=value: remedy
SENTENCES = (
    (r"Missing from [^:]*: (?:--)?(\S+).*", r"\1: missing"),
    (r"Error parsing \S+: (\w+\.\S+=.*)", r"\1"),
    (r"Error parsing (\S+): (\w+=.*)", r"\1.\2"),
    (r"Error parsing --(\S+): could not convert string to float: '(.*)'", r"\1=\2: use a number"),
    (r"Error parsing --(\S+): invalid literal for int\(\) with base 10: '(.*)'", r"\1=\2: use a whole number"),
    (r"Error parsing --(\S+): no type matching \{None\}\|(\w+) could be instantiated from \['(.*)'\]\.", r"\1=\3: use None or \2"),
    (r"Error parsing --(\S+): Could not .*?\[(.*?)\].*", r"\1=\2: use numbers"),
    (r"Error parsing (?:--)?(\S+): (.*)", r"\1: \2"),
    (r"invalid choice '(.*)' for argument '(?:--)?(\S+)'\. Expected one of \((.*)\)\.", r"\2=\1: use one of \3"),
    (r"Missing value for argument '--(\S+)'\. Expected (\d+) values\.", r"\1: a value is missing; it needs \2"),
)


def _sentence(said: str) -> str:
    """Return tyro's message as one sentence: the lines below its title and above the first rule."""
    lines = [line.strip("│╭╮╰╯─- ") for line in said.strip().splitlines()]
    text = " ".join(itertools.takewhile(bool, itertools.dropwhile(lambda line: not line, lines[1:])))
    for theirs, ours in SENTENCES:
        if match := re.fullmatch(theirs, text):
            key, mark, rest = re.split("([=:])", match.expand(ours), maxsplit=1)
            return key.replace("-", "_") + mark + rest
    return text
