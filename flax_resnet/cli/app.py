"""``flax-resnet COMMAND``, which is also ``python -m flax_resnet COMMAND``."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Union

import tyro

from flax_resnet.cli import doctor, evaluate, export, hub, networks, predict, reports, serve, train
from flax_resnet.cli.experiment import one_line_errors, start
from flax_resnet.cli.flags import OPTIONS, PROG, Invocation, cli, flag
from flax_resnet.errors import UserError, did_you_mean
from flax_resnet.records import provenance
from flax_resnet.training.config import TrainConfig
from flax_resnet.xla.backend import check_settings
from flax_resnet.xla.program_cache import use_cache


class Tool(NamedTuple):
    """One command: what it does in a few words, the dataclass of its flags, its function."""

    what: str
    settings: Any
    main: Callable[[Any], object]


@dataclasses.dataclass(frozen=True)
class Completion:
    """Prints tyro's script that completes commands, flags and their choices.

    Examples:
      eval "$(flax-resnet completion bash)"
      flax-resnet completion bash > ~/.local/share/bash-completion/completions/flax-resnet
      flax-resnet completion zsh > "${fpath[1]}/_flax-resnet"
      flax-resnet completion fish > ~/.config/fish/completions/flax-resnet.fish
    """

    shell: Annotated[tyro.conf.Positional[Literal["bash", "zsh", "fish"]], flag("{bash,zsh,fish}")]
    """Whose words are completed."""


def print_completion(settings: Completion) -> None:
    """``flax-resnet completion``."""
    default = Invocation("runs", TrainConfig())
    commands: list[Any] = []
    for name, tool in TOOLS.items():
        known: Any = {"default": default} if tool.settings is Invocation else {}
        subcommand = tyro.conf.subcommand(name, description=tool.what, **known)
        commands.append(Annotated[tool.settings, subcommand])
    any_of: Any = Union[tuple(commands)]  # noqa: UP007
    printed, argv = io.StringIO(), ["--tyro-print-completion", settings.shell]
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        cli(any_of, argv, prog=PROG, **OPTIONS)
    # In bash each line of a help is taken for a flag, and no answer for an empty one, not files.
    script = re.sub(
        r"(?m)^COMPLETION_SPEC = .*$",
        lambda line: re.sub(r"\\+n", " ", line.group()),
        printed.getvalue(),
    )
    script = script.replace('COMPREPLY=("${matches[@]}")', "COMPREPLY=(${matches[@]})")
    print(script.replace("complete -F", "complete -o default -F"), end="")


TOOLS: dict[str, Tool] = {
    "train": Tool("train a network on digits, a tfds set or a folder", Invocation, start),
    "finetune": Tool("train ImageNet's weights on, on your images", Invocation, start),
    "predict": Tool("name what is in images", predict.Settings, predict.main),
    "evaluate": Tool("measure weights on a data set", evaluate.Settings, evaluate.main),
    "report": Tool("put a run into one HTML file", reports.Report, reports.write_report),
    "push": Tool("upload weights and a card to the Hugging Face hub", hub.Push, hub.push),
    "pull": Tool("download weights and their card from it", hub.Pull, hub.pull),
    "serve": Tool("open a web page to drop images on", serve.Settings, serve.main),
    "compare": Tool("set runs side by side", reports.Compare, reports.write_comparison),
    "convert": Tool("write weights in another format", export.Convert, export.convert_weights),
    "export": Tool(
        "write a network for StableHLO, ONNX or torch", export.Export, export.export_network
    ),
    "summary": Tool(
        "show a network's layers and their cost", networks.Summary, networks.show_summary
    ),
    "names": Tool("list the networks that have a name", networks.Names, networks.list_names),
    "prepare": Tool("make a tfds set readable", train.Prepare, train.prepare_set),
    "doctor": Tool("say what is installed, found and missing", doctor.Settings, doctor.main),
    "completion": Tool("print a script that completes this command", Completion, print_completion),
}


def command(argv: Sequence[str] | None = None) -> None:
    """Runs a command line, by default the process's.

    Bad input ends the process with status 2 and one line on stderr.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    with one_line_errors():
        if not argv or argv[0] in ("-h", "--help"):
            print(overview())
            return
        if argv[0] in ("-V", "--version"):
            print(f"flax_resnet {provenance.versions(['flax_resnet'])['flax_resnet']}")
            return
        tool = TOOLS.get(argv[0])
        if tool is None:
            raise UserError(
                f"unknown command {argv[0]!r}{did_you_mean(argv[0], TOOLS)}: expected one of "
                f"{', '.join(TOOLS)}; `{PROG} --help` says what each does"
            )
        if argv[0] in train.MAKES:
            start(train.parse(argv[0], argv[1:]))
            return
        settings = cli(tool.settings, argv[1:], prog=f"{PROG} {argv[0]}")
        check_settings()
        use_cache()
        tool.main(settings)


def overview() -> str:
    """What ``--help`` says without a command."""
    wide = max(map(len, TOOLS))
    lines = [f"  {name:{wide}}  {tool.what}" for name, tool in TOOLS.items()]
    return f"""usage: {PROG} COMMAND ...    (or python -m flax_resnet COMMAND ...)

Residual networks in JAX: their training and their study.

{chr(10).join(lines)}

{PROG} COMMAND --help has every flag, with examples. In a checkout, experiments run as
python -m experiments.NAME.

Examples:
  {PROG} train digits
  {PROG} predict PHOTO.jpg --weights runs/digits
  {PROG} doctor"""
