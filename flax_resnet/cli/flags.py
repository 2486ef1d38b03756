"""A config's fields as command-line flags, by tyro.

Tyro prints what is wrong with a flag, the nearest flag, and ends the process with status 2. What a
config's own checks refuse is a UserError of one line, as it is everywhere else.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TextIO, TypeVar

import docstring_parser
import tyro
from flax import linen as nn
from tyro.conf import Positional as Positional
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    StructConstructorSpec,
    StructFieldSpec,
)

from flax_resnet import models
from flax_resnet.distributed.hosts import Hosts
from flax_resnet.errors import UserError, check_range, did_you_mean
from flax_resnet.models.arguments import check_dtype
from flax_resnet.records.configs import class_name, find_class, module_fields
from flax_resnet.records.files import os_error_as_one_line, replacing
from flax_resnet.training.config import TrainConfig

PROG = "flax-resnet"
Factory = Callable[[], Any]
Settings = TypeVar("Settings")
Asked = TypeVar("Asked", "Invocation", "SweepInvocation")
_parser = functools.partial(
    argparse.ArgumentParser, add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS
)
"""Makes a parser that holds the flags it finds, and leaves all others alone."""
REGISTRY = ConstructorRegistry()
"""What tyro is told of linen modules and of their block classes."""
OPTIONS: dict[str, Any] = {"registry": REGISTRY, "config": (tyro.conf.AvoidSubcommands,)}
"""Arguments of tyro.cli for what holds a TrainConfig."""


def flag(metavar: str, default: str = "") -> Any:
    """How --help shows a flag."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=default and f"(default: {default})")


Switch = Annotated[tyro.conf.FlagCreatePairsOff[bool], flag("")]
"""A flag without a value, and without a --no- form."""
DataDir = Annotated[str | None, flag("DIR", "$TFDS_DATA_DIR or ~/tensorflow_datasets")]


@dataclasses.dataclass(frozen=True)
class _Asked:
    workdir: str
    """Directory of the run's record. The same command on the same directory resumes."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    hosts: Hosts = Hosts()


@dataclasses.dataclass(frozen=True)
class Invocation(_Asked):
    """What a command line asks for."""

    num_seeds: int = 1
    """Train so many seeds, the config's and those after it, each in WORKDIR/seedN."""
    in_turn: bool = False
    """Train them one after another on accelerators too, where they would train together."""
    analyze: bool = False
    """Compile the steps, print what they cost and hold, and end; nothing is trained or written."""

    def __post_init__(self) -> None:
        check_range("--num-seeds", self.num_seeds, 1)


@dataclasses.dataclass(frozen=True)
class SweepInvocation(_Asked):
    """What the command line of an ablation asks for."""

    seeds: int = 3
    """Seeds of each variant, counted from 0."""

    def __post_init__(self) -> None:
        check_range("--seeds", self.seeds, 1)


def arguments(
    get_config: Callable[..., TrainConfig], argv: Sequence[str]
) -> tuple[dict[str, Any], list[str], str]:
    """Takes the flags that are parameters of ``get_config`` out of a command line.

    A parameter is an int or a Literal of texts, and has a default. Returns ({parameter: value},
    the other flags, what --help says of the parameters).
    """
    parser, helps, hints = _parser(), [], typing.get_type_hints(get_config)
    for name, parameter in inspect.signature(get_config).parameters.items():
        choices = typing.get_args(hints[name]) or None
        parser.add_argument(f"--{name}", type=str if choices else int, choices=choices)
        values = f"{{{','.join(choices)}}}" if choices else "INT"
        helps.append(f"--{name} {values} (default: {parameter.default})")
    given, rest = parser.parse_known_args(argv)
    text = f"Flags of this experiment alone: {'; '.join(helps)}." if helps else ""
    return vars(given), rest, text


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
    its defaults; every other flag sets a field of the chosen class.

    ``config`` and ``workdir`` are the defaults, ``about`` the first lines of --help, ``prog`` the
    command that it shows, ``ask`` Invocation or SweepInvocation.
    """
    config, argv = _choose(config, argv)
    choices = {path: "|".join(names) for path, names in class_choices(config).items()}
    choices["model"] = "NAME (python -m flax_resnet names lists them)"
    lines = "; ".join(f"--{path} {names}" for path, names in choices.items())
    text, mark, examples = about.partition("\n\nExamples:")
    about = f"{text}\n\nChoose a class, with its defaults: {lines}.{mark}{examples}"
    return cli(ask, argv, about, prog, default=ask(workdir, config), **OPTIONS)


def cli(
    settings: type[Settings],
    argv: Sequence[str] | None,
    about: str = "",
    prog: str | None = None,
    **options: Any,
) -> Settings:
    """Parses a command line (by default the process's) into a dataclass, as tyro.cli.

    Raises:
      UserError: a value that ``settings`` refuses.
      SystemExit: tyro has printed what is wrong with a flag, or --help.
    """
    printed, about = io.StringIO(), about or inspect.getdoc(settings) or ""
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(settings, prog=prog, args=argv, description=about, **options)
    except SystemExit as stop:
        cause: BaseException | None = stop
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__context__
        if cause is None:
            raise
        printed = io.StringIO()  # without the box of tyro, to which a UserError is a ValueError
        raise cause from None
    finally:
        sys.stderr.write(printed.getvalue())


def class_choices(config: TrainConfig) -> dict[str, dict[str, Factory]]:
    """{dotted field: {name: factory}} of the fields that hold one of several classes."""
    networks: dict[str, Factory] = {n: functools.partial(models.create, n) for n in models.names()}
    found = {"model": networks}

    def visit(value: Any, prefix: str) -> None:
        for name, hint in typing.get_type_hints(type(value)).items():
            parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else ()
            classes: list[Any] = [p for p in parts if dataclasses.is_dataclass(p)]
            classes = [cls for cls in classes if not inspect.isabstract(cls)]
            if len(classes) > 1:
                found[prefix + name] = {c.__name__.lower(): c for c in classes}
            inner = getattr(value, name)
            if dataclasses.is_dataclass(inner) and not isinstance(inner, nn.Module):
                visit(inner, f"{prefix}{name}.")

    visit(config, "")
    return found


def _choose(config: TrainConfig, argv: Sequence[str]) -> tuple[TrainConfig, list[str]]:
    """Takes ``--FIELD NAME`` out of argv for the fields that hold one of several classes."""
    rest = list(argv)
    for path, choices in class_choices(config).items():  # outer fields come before inner ones
        parser = _parser()
        parser.add_argument(f"--{path}", dest="name", nargs="?", const="")
        given, rest = parser.parse_known_args(rest)
        if "name" not in given:
            continue
        name = given.name if path == "model" else given.name.lower()  # networks' names have cases
        if name not in choices:
            listed = "the names that `python -m flax_resnet names` lists"
            expected = listed if path == "model" else ", ".join(choices)
            hint = did_you_mean(name, choices)
            raise UserError(f"--{path} {name!r}: expected one of {expected}{hint}")
        config = _replace(config, path.split("."), choices[name]())
    choosing = [f"--{path}" for path in class_choices(config)]
    for argument in rest:  # tyro does not know these flags, and names none of them as the nearest
        near = difflib.get_close_matches(argument.partition("=")[0], choosing, 1, 0.85)
        if near and near[0].count(".") == argument.count("."):
            raise UserError(f"{argument}: there is no such flag (did you mean {near[0]}?)")
    return config, rest


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
    """Fields that an experiment sets on any network: classes, top, frozen stages, dtypes."""
    names = ("num_classes", "hidden_units", "norm_kind", "frozen_stages", "dtype", "param_dtype")
    kept = {n: getattr(old, n) for n in names if hasattr(old, n) and hasattr(new, n)}
    stages: tuple[int, ...] = getattr(old, "stage_sizes", ())
    if kept.get("frozen_stages") == len(stages):  # all of them, however many there are
        kept["frozen_stages"] = len(getattr(new, "stage_sizes", ()))
    return kept


@REGISTRY.struct_rule
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
    for name in values:
        if name.endswith("dtype"):
            check_dtype(values[name])
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return module.clone(**values)


@REGISTRY.primitive_rule
def _module_class_rule(info: Any) -> PrimitiveConstructorSpec | None:
    """Flags that name a block class: a name in flax_resnet.models, or MODULE:NAME."""
    if typing.get_origin(info.type) is not type:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="CLASS",
        instance_from_str=lambda words: find_class(
            words[0] if ":" in words[0] else f"{models.__name__}:{words[0]}"
        ),
        is_instance=lambda value: isinstance(value, type),
        str_from_instance=lambda cls: [class_name(cls)],
    )


@contextlib.contextmanager
def writing(output: str | None) -> Iterator[TextIO]:
    """The standard output, or a file that is written whole or not at all."""
    if output is None:
        yield sys.stdout
        return
    path = Path(output).expanduser()
    if path.is_dir():
        raise UserError(f"--output {output} is a directory: name a file")
    with (
        os_error_as_one_line(f"--output {output}"),
        replacing(path) as partial,
        partial.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        yield file
