"""A script by which a shell completes verbs, options, settings, recipes, pictures and the names of runs."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping

from pipeline.cli import early
from pipeline.cli.verb import Verb, show_help

RUNS = "$(cd runs 2>/dev/null && ls)"  # looked up when a word is completed
ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"
SCRIPT = """_manyviews() {{
  local words="{verbs}"
  if (( COMP_CWORD > 1 )); then
    case "${{COMP_WORDS[@]:1:1}}" in
{cases}
    esac
  fi
  COMPREPLY=( $(compgen -W "$words" -- "$2") )
}}
complete -o default -F _manyviews manyviews
"""


def script(shell: str, verbs: Mapping[str, type[Verb]], names: Mapping[str, list[str]]) -> str:
    """Return the completion script of `bash` or `zsh`, where a file's name is completed if nothing else fits.

    Args:
        names: for the words of arguments in the help, such as RECIPE, what may stand there.
    """
    names = {place: [RUNS] for place in ("RUN", "SWEEP", "RUN_OR_MODEL", "RUN_OR_SWEEP")} | {"bash,zsh": ["bash", "zsh"], **names}
    cases = []
    for verb, kind in verbs.items():
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            show_help(kind, verb)
        places = re.findall(r"(?m)^[│ ] (?:-h, )?(--[\w.-]+|[\[{]?[A-Z_,a-z]+[\]}]?)", shown.getvalue())
        words = [word for place in places for word in names.get(place.strip("{}[]"), [place] if place.startswith("--") else [])]
        settings = [f"--{key}".replace("_", "-") for key in early.all_settings()] if kind.settings_help else []
        cases.append(f'      {verb}) words="{" ".join(dict.fromkeys([*words, *settings]))}" ;;')
    return (ZSH if shell == "zsh" else "") + SCRIPT.format(verbs=" ".join(verbs), cases="\n".join(cases))
