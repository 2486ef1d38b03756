"""Scripts that complete a command line: tyro's, mended.

Tyro's script holds a Python program that a shell asks what may follow. It proposes flags where a
file is wanted, knows no positional argument, and none of the flags that choose a class.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import tyro

from flax_resnet import flags

FILES = "__TYRO_COMPLETE_FILES__"  # what tyro's scripts take for: files
# Tyro's answer for bash splits names at spaces: nothing instead, where bash itself knows files.
BASH = """
{ours}() {{
  local word found=()
  {theirs}
  for word in "${{COMPREPLY[@]}}"; do
    [[ -n $word ]] && found+=("$word")
  done
  COMPREPLY=("${{found[@]}}")
  if [[ $COMP_CWORD == 2 && " {folders} " == *" ${{COMP_WORDS[1]}} "* ]]; then
    compopt -o filenames -o plusdirs 2>/dev/null
  fi
  return 0
}}
"""
ZSH = """
  [[ $CURRENT == 3 && " {folders} " == *" ${{words[2]}} "* ]] && _files -/
  return 0
"""
FISH = """
        if test (count $words) -eq 2; and contains -- $words[2] {folders}
            __fish_complete_directories (commandline -ct)
        end"""


def script(
    settings: Mapping[str, tuple[Any, str]],
    default: flags.Invocation,
    first: Mapping[str, Sequence[str]],
    prog: str,
    shell: str,
) -> str:
    """A script that completes commands, their flags and what these choose from.

    Flags are proposed where the word begins with "-", files where nothing else is known.

    Args:
      settings: {command: (the dataclass whose fields are its flags, what it does)}.
      default: of the commands whose dataclass is an Invocation. Folders complete what comes first
        after these.
      first: {command: words for its first positional argument}.
      prog: what is completed.
      shell: "bash", "zsh" or "fish".
    """
    text = _of_tyro(settings, default, prog, shell)
    configured = [name for name, (kind, _) in settings.items() if kind is flags.Invocation]
    program = _program(default, configured, first, [] if shell == "bash" else [FILES])
    if shell == "fish":  # it holds the program in double quotes
        program = re.sub(r'([\\"$])', r"\\\1", program)
    text = re.sub(r"(?m)^(?=if __name__ == )", lambda _: program, text)
    folders = " ".join(configured)
    if shell == "bash":
        ours = "_" + re.sub(r"\W", "_", prog)
        theirs = f"_tyro{ours}"
        function = BASH.format(ours=ours, theirs=theirs, folders=folders)
        return text.replace(
            f"\ncomplete -F {theirs} ", f"{function}\ncomplete -o default -F {ours} "
        )
    if shell == "zsh":
        return re.sub(
            r"(?m)^  _describe .*\n", lambda found: found[0] + ZSH.format(folders=folders), text
        )
    # Its program is not told the word that is being typed.
    text = text.replace("$words $current)", "$words (commandline -ct) $current)")
    last = 'printf "%s\\n" $line\n        end'
    return text.replace(last, last + FISH.format(folders=folders))


def _of_tyro(
    settings: Mapping[str, tuple[Any, str]], default: flags.Invocation, prog: str, shell: str
) -> str:
    commands = [
        Annotated[kind, tyro.conf.subcommand(name, default=default, description=what)]
        if kind is flags.Invocation
        else Annotated[kind, tyro.conf.subcommand(name, description=what)]
        for name, (kind, what) in settings.items()
    ]
    any_of: Any = typing.Union[tuple(commands)]  # noqa: UP007
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        tyro.cli(
            any_of,
            prog=prog,
            args=["--tyro-print-completion", shell],
            registry=flags.tyro_registry(),
            config=(tyro.conf.AvoidSubcommands,),
        )
    # Helps in one line: of another, bash takes each word for a flag.
    one_line = functools.partial(re.sub, r"\\+n", " ")
    return re.sub(
        r"(?m)^COMPLETION_SPEC = .*$", lambda spec: one_line(spec.group()), said.getvalue()
    )


def _program(
    default: flags.Invocation,
    configured: Sequence[str],
    first: Mapping[str, Sequence[str]],
    nothing: Sequence[str],
) -> str:
    """What tyro's program is told before it runs, as Python."""
    choices = {
        f"--{path}": list(names) for path, names in flags.class_choices(default.config).items()
    }
    words = {command: list(known) for command, known in first.items()}
    return f"""{inspect.getsource(_choose_from)}

{inspect.getsource(_proposed)}

_choose_from(COMPLETION_SPEC, {choices!r}, {list(configured)!r})


def get_completions(words, index, spec, theirs=get_completions):
    return _proposed(words, index, spec, theirs, {words!r}) or {list(nothing)!r}


"""


def _choose_from(
    spec: dict[str, Any], choices: dict[str, list[str]], configured: list[str]
) -> None:
    """Tells tyro's description of the commands what flags choose from. Is part of the script."""
    for name, command in spec["subcommands"].items():
        options = {flag: option for option in command["options"] for flag in option["flags"]}
        for flag, names in choices.items():
            if flag in options:
                options[flag].update(type="choice", choices=names)
            elif name in configured:
                what = "choose a class, with its defaults"
                option = {"flags": [flag], "description": what, "type": "choice", "nargs": 1}
                command["options"].append({**option, "choices": names})


def _proposed(
    words: list[str], index: int, spec: dict[str, Any], theirs: Any, first: dict[str, list[str]]
) -> list[str]:
    """What may stand at words[index], of tyro's answers and ours. Is part of the script."""
    line = [word for word in words[1:index] if word != "="]  # bash splits --flag=value in three
    word = words[index] if index < len(words) and words[index] != "=" else ""
    flag, equals, value = word.partition("=")
    if equals and flag.startswith("--"):  # other shells do not
        apart = [words[0], *line, flag, value]
        found = _proposed(apart, len(apart) - 1, spec, theirs, first)
        return [flag + equals + proposal for proposal in found]
    if line and line[0] in first and not word.startswith("-"):
        options = spec["subcommands"][line[0]]["options"]
        alone = {f for o in options if o["type"] in ("flag", "boolean") for f in o["flags"]}
        if alone.issuperset(line[1:]):
            return [known for known in first[line[0]] if known.startswith(word)]
    found = theirs([words[0], *line, word], len(line) + 1, spec)
    found = [proposal for proposal in found if not proposal.startswith("__")]
    return [proposal for proposal in found if proposal.startswith("-") == word.startswith("-")]
