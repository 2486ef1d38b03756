"""A config's fields as command-line flags, through tyro; what is wrong comes as one line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import re
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, TypeVar

import docstring_parser
import tyro
from flax import linen as nn
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    StructConstructorSpec,
    StructFieldSpec,
)

from flax_resnet import models
from flax_resnet.config import TrainConfig
from flax_resnet.errors import UserError, check_range, did_you_mean
from flax_resnet.hosts import Hosts
from flax_resnet.layers import check_dtype
from flax_resnet.record import class_name, find_class, module_fields

Factory = Callable[[], Any]
Settings = TypeVar("Settings")
Asked = TypeVar("Asked", "Invocation", "SweepInvocation")


@dataclasses.dataclass(frozen=True)
class Invocation:
    """What a command line asks for."""

    workdir: str
    """Directory of the run's record. The same command on the same directory resumes."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    num_seeds: int = 1
    """Train so many seeds, the config's and those after it, each in WORKDIR/seedN."""
    in_turn: bool = False
    """Train them one after another on accelerators too, where they would train together."""
    analyze: bool = False
    """Compile the steps, print what they cost and hold, and end; nothing is trained or written."""
    hosts: Hosts = Hosts()

    def __post_init__(self) -> None:
        check_range("--num-seeds", self.num_seeds, 1)


@dataclasses.dataclass(frozen=True)
class SweepInvocation:
    """What the command line of an ablation asks for."""

    workdir: str
    """Directory of the runs and of their table. The same command on it goes on."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    seeds: int = 3
    """Seeds of each variant, counted from 0."""
    hosts: Hosts = Hosts()

    def __post_init__(self) -> None:
        check_range("--seeds", self.seeds, 1)


def arguments(
    get_config: Callable[..., TrainConfig], argv: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Takes the flags that are parameters of ``get_config`` out of a command line.

    Args:
      get_config: its parameters are ints or Literals and have defaults.
      argv: flags.

    Returns:
      ({parameter: value} of those given, the other flags).

    Raises:
      UserError: a value that does not fit.
    """
    given: dict[str, Any] = {}
    rest = [_dashes(argument) for argument in argv]
    for name, choices in _parameters(get_config).items():
        flag = "--" + name.replace("_", "-")
        while places := [i for i, a in enumerate(rest) if a == flag or a.startswith(flag + "=")]:
            i = places[0]  # of several the last one counts
            word = rest[i].partition("=")[2] or (rest[i + 1] if i + 1 < len(rest) else "")
            if choices and word not in choices:
                near = did_you_mean(word, choices)
                raise UserError(f"{flag} {word!r}: expected one of {', '.join(choices)}{near}")
            if not choices and not word.isdecimal():
                raise UserError(f"{flag} {word!r}: expected a whole number")
            given[name] = word if choices else int(word)
            rest = rest[:i] + rest[i + (1 if "=" in rest[i] else 2) :]
    return given, rest


def _parameters(get_config: Callable[..., Any]) -> dict[str, tuple[str, ...]]:
    """{parameter: its choices; of a number none}."""
    hints = typing.get_type_hints(get_config)
    return {name: typing.get_args(hint) for name, hint in hints.items() if name != "return"}


def arguments_help(get_config: Callable[..., Any]) -> str:
    """What --help says of the flags that ``arguments`` takes out; "" where there are none."""
    defaults = inspect.signature(get_config).parameters
    parts = [
        f"--{name.replace('_', '-')} {{{','.join(choices)}}} (default: {defaults[name].default})"
        if choices
        else f"--{name.replace('_', '-')} INT (default: {defaults[name].default})"
        for name, choices in _parameters(get_config).items()
    ]
    return f"Flags of this experiment alone: {'; '.join(parts)}." if parts else ""


def parse(
    config: TrainConfig,
    workdir: str,
    argv: Sequence[str],
    about: str = "",
    prog: str | None = None,
    ask: type[Asked] = Invocation,  # type: ignore[assignment]
) -> Asked:
    """Applies flags to a config.

    ``--model NAME``, ``--optimizer NAME`` and ``--optimizer.schedule NAME`` choose a class, with
    its defaults; every other flag sets a field of what is chosen.

    Args:
      config: the defaults.
      workdir: default of --workdir.
      argv: flags, in dashes or underscores.
      about: what --help says first.
      prog: the command that --help shows.
      ask: Invocation or SweepInvocation.

    Raises:
      UserError: an unknown flag, with the nearest, or a value that does not fit.
    """
    config, argv = _choose(config, [_dashes(argument) for argument in argv])
    with _meant(config):
        return cli(
            ask,
            argv,
            _with_choices(about, config),
            prog,
            default=ask(workdir, config),
            registry=tyro_registry(),
            config=(tyro.conf.AvoidSubcommands,),
        )


def cli(
    settings: type[Settings],
    argv: Sequence[str] | None,
    about: str,
    prog: str | None,
    **options: Any,
) -> Settings:
    """A dataclass whose fields are flags, from a command line.

    Args:
      settings: the dataclass.
      argv: flags; None reads the process's.
      about: what --help says first.
      prog: the command that --help shows.
      **options: tyro.cli's others.

    Raises:
      UserError: an unknown flag, or a value that does not fit.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(settings, prog=prog, args=argv, description=about, **options)
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        raise UserError(_one_line(said.getvalue())) from None


def tyro_registry() -> ConstructorRegistry:
    """What tyro is told of linen modules and of their block classes."""
    registry = ConstructorRegistry()
    registry.struct_rule(_module_rule)
    registry.primitive_rule(_module_class_rule)
    return registry


def _dashes(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value


def _one_line(box: str) -> str:
    """What a tyro error box says, without its frame, its help text and its pointer to --help."""
    sections: list[list[str]] = [[]]
    rows = [row for row in box.splitlines() if row.startswith("│")]
    rows = rows or box.splitlines()[2:]  # where the terminal is not UTF-8 the box has no frame
    for line in (row.strip(" │") for row in rows):
        if line and set(line) <= {"─", "-"}:
            sections.append([])
        elif line:
            sections[-1].append(line)
    text = re.sub(r"^Error parsing \w+: ", "", " ".join(sections[0]))
    for section in sections[1:]:
        if section and "Perhaps you meant" in section[0]:
            near = re.search(r"--[\w.-]+", " ".join(section))
            text += f" (did you mean {near.group()}?)" if near else ""
    return f"{text.rstrip('.')}; --help lists every flag"


def class_choices(config: TrainConfig) -> dict[str, dict[str, Factory]]:
    """{dotted field: {name: factory}} of the fields that hold one of several classes."""
    found: dict[str, dict[str, Factory]] = {
        "model": {name: functools.partial(models.create, name) for name in models.names()}
    }

    def visit(value: Any, prefix: str) -> None:
        for name, hint in typing.get_type_hints(type(value)).items():
            classes: list[Any] = [
                c
                for c in typing.get_args(hint)
                if dataclasses.is_dataclass(c) and not inspect.isabstract(c)
            ]
            if isinstance(hint, types.UnionType) and len(classes) > 1:
                found[prefix + name] = {c.__name__.lower(): c for c in classes}
            inner = getattr(value, name)
            if dataclasses.is_dataclass(inner) and not isinstance(inner, nn.Module):
                visit(inner, f"{prefix}{name}.")

    visit(config, "")
    return found


# What other programs call a flag.
ALIASES = {
    "--epochs": "--num-epochs",
    "--steps": "--num-steps",
    "--lr": "--optimizer.learning-rate",
    "--learning-rate": "--optimizer.learning-rate",
    "--weight-decay": "--optimizer.weight-decay",
    "--momentum": "--optimizer.momentum",
    "--batch": "--batch-size",
    "--num-classes": "--model.num-classes",
    "--image-size": "--data.image-size",
    "--data-dir": "--data.data-dir",
    "--output-dir": "--workdir",
}


@contextlib.contextmanager
def _meant(config: TrainConfig) -> Iterator[None]:
    """Names what a flag of another program, or one that chooses a class, was meant to be."""
    try:
        yield
    except UserError as error:
        found = re.match(r"Unrecognized options: (--[\w.-]+)", str(error))
        if found is None:
            raise
        choosing = [f"--{path}" for path in class_choices(config)]
        near = difflib.get_close_matches(found[1], choosing, 1, 0.8)
        meant = ALIASES.get(found[1], near[0] if near else None)
        if meant is None:
            raise
        text = re.sub(r" \(did you mean [^)]*\)", "", str(error))
        first, mark, rest = text.partition("; --help")
        raise UserError(f"{first} (did you mean {meant}?){mark}{rest}") from None


def _with_choices(about: str, config: TrainConfig) -> str:
    """What --help says first, the choices of classes before its examples."""
    text, mark, examples = about.partition("\n\nExamples:")
    return f"{text}\n\n{_choices_help(config)}{mark}{examples}"


def _choices_help(config: TrainConfig) -> str:
    choices = {path: "|".join(names) for path, names in class_choices(config).items()}
    choices["model"] = "NAME (python -m flax_resnet names lists them)"
    lines = [f"--{path} {names}" for path, names in choices.items()]
    return "Choose a class, with its defaults: " + "; ".join(lines) + "."


def _choose(config: TrainConfig, argv: list[str]) -> tuple[TrainConfig, list[str]]:
    """Takes ``--FIELD NAME`` out of argv for the fields that hold one of several classes."""
    for path, choices in class_choices(config).items():  # outer fields come before inner ones
        for i, argument in enumerate(argv):
            flag, equals, name = argument.partition("=")
            if flag != f"--{path}":
                continue
            name = name if equals else (argv[i + 1] if i + 1 < len(argv) else "")
            if path != "model":  # networks' names have cases
                name = name.lower()
            if name not in choices:
                names = ", ".join(choices)
                if path == "model":
                    names = "the names that `python -m flax_resnet names` lists"
                raise UserError(
                    f"--{path} {name!r}: expected one of {names}{did_you_mean(name, choices)}"
                )
            config = _replace(config, path.split("."), choices[name]())
            argv = argv[:i] + argv[i + (1 if equals else 2) :]
            break
    return config, argv


def _replace(config: Any, path: list[str], value: Any) -> Any:
    """``config`` with the field at ``path`` replaced; an experiment's outer choices stay."""
    old = getattr(config, path[0])
    if len(path) > 1:
        value = _replace(old, path[1:], value)
    elif isinstance(value, nn.Module):
        value = value.clone(**_kept(old, value))
    elif hasattr(value, "schedule"):
        value = dataclasses.replace(value, schedule=old.schedule)
    return dataclasses.replace(config, **{path[0]: value})


def _kept(old: nn.Module, new: nn.Module) -> dict[str, Any]:
    """What an experiment says of any network of its: classes, the top, what is frozen, dtypes."""
    names = ("num_classes", "hidden_units", "norm_kind", "frozen_stages", "dtype", "param_dtype")
    kept = {n: getattr(old, n) for n in names if hasattr(old, n) and hasattr(new, n)}
    stages: tuple[int, ...] = getattr(old, "stage_sizes", ())
    if kept.get("frozen_stages") == len(stages):  # all of them, however many there are
        kept["frozen_stages"] = len(getattr(new, "stage_sizes", ()))
    return kept


def _module_rule(info: Any) -> StructConstructorSpec | None:
    """A linen module's fields as flags; helps are the "Attributes:" of its docstring."""
    module = info.default
    if not isinstance(module, nn.Module):
        return None
    hints = typing.get_type_hints(type(module))
    about = docstring_parser.parse(type(module).__doc__ or "").params
    helps = {p.arg_name: " ".join((p.description or "").split()) for p in about}
    return StructConstructorSpec(
        instantiate=functools.partial(_clone, module),
        fields=tuple(
            StructFieldSpec(f.name, hints[f.name], getattr(module, f.name), helps.get(f.name))
            for f in module_fields(module)
        ),
    )


def _clone(module: nn.Module, **values: Any) -> nn.Module:
    for name, value in values.items():
        if name.endswith("dtype"):
            check_dtype(value)
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return module.clone(**values)


def _module_class_rule(info: Any) -> PrimitiveConstructorSpec | None:
    """Flags that name a block class: a name in flax_resnet.models, or MODULE:NAME."""
    if typing.get_origin(info.type) is not type:
        return None

    def find(words: list[str]) -> type:
        return find_class(words[0] if ":" in words[0] else f"{models.__name__}:{words[0]}")

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="CLASS",
        instance_from_str=find,
        is_instance=lambda value: isinstance(value, type),
        str_from_instance=lambda cls: [class_name(cls)],
    )
