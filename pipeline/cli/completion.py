"""A script by which a shell completes verbs, options, settings, recipes, pictures and the names of runs."""

from __future__ import annotations

from collections.abc import Mapping

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


def script(shell: str, words: Mapping[str, list[str]]) -> str:
    """Return the completion script of `bash` or `zsh`, where a file's name is completed if nothing else fits.

    Args:
        words: for each verb what may follow it.
    """
    cases = "\n".join(f'      {verb}) words="{" ".join(rest)}" ;;' for verb, rest in words.items())
    return (ZSH if shell == "zsh" else "") + SCRIPT.format(verbs=" ".join(words), cases=cases)


def settings() -> list[str]:
    """Return every setting as an option; of the crops those of `global` and `local`, which all recipes know."""
    from pipeline.cli.early import declared

    groups = declared()
    crops = groups.pop("views")
    groups |= {"views.global": crops, "views.local": crops}
    return [f"--{group}.{key}".replace("_", "-") for group, keys in groups.items() for key in keys]
