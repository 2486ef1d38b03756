"""``flax-resnet COMMAND``, which is also ``python -m flax_resnet COMMAND``."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union

import tyro

from flax_resnet import (
    compare,
    convert,
    doctor,
    evaluate,
    flags,
    models,
    predict,
    push,
    recipes,
    report,
    serve,
    summary,
)
from flax_resnet.classify import flag
from flax_resnet.compilation import use_cache
from flax_resnet.config import TrainConfig
from flax_resnet.datasets.prepare import prepare
from flax_resnet.errors import UserError, check_range, did_you_mean
from flax_resnet.exporting import command as exporting
from flax_resnet.main import one_line_errors, start
from flax_resnet.records import provenance
from flax_resnet.weights import tags

PROG = "flax-resnet"
Shell = Literal["bash", "zsh", "fish"]


class Tool(NamedTuple):
    """One command: what it does in a few words, the dataclass of its flags, its function."""

    what: str
    settings: Any
    main: Callable[[Any], object]


@dataclasses.dataclass(frozen=True)
class Names:
    """Lists the networks that have a name.

    Examples:
      flax-resnet names --weights | grep resnet50
    """

    weights: Annotated[tyro.conf.FlagCreatePairsOff[bool], flag("")] = False
    """With the tags of their weights."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """Prints a network's layers with output shapes, parameters and multiply-adds, and the
    totals. Nothing is computed.

    Examples:
      flax-resnet summary resnet50 --parts
      flax-resnet summary resnet20 --num-classes 5 --input-shape 64 64 1
    """

    name: Annotated[tyro.conf.Positional[str], flag("NAME")]
    """A network that `flax-resnet names` lists."""
    num_classes: Annotated[int | None, flag("N", "the network's own")] = None
    """Width of the head."""
    input_shape: Annotated[
        tuple[int, int, int] | None, flag("H W C", "224 224 3, of CIFAR nets 32 32 3")
    ] = None
    """Of one image."""
    batch_size: int = 1
    """Images whose outputs are counted in MB."""
    dtype: str = "float32"
    """Of the computation."""
    no_top: Annotated[tyro.conf.FlagCreatePairsOff[bool], flag("")] = False
    """Leave out the head."""
    parts: Annotated[tyro.conf.FlagCreatePairsOff[bool], flag("")] = False
    """A line for each block, not each layer."""

    def __post_init__(self) -> None:
        check_range("--batch-size", self.batch_size, 1)


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Builds the bundled digits, converts a set prepared as TFRecord, or downloads and
    prepares a set (which needs the [prepare] extra), as ArrayRecord.

    Examples:
      flax-resnet prepare cifar10 --data-dir ~/data
    """

    name: Annotated[tyro.conf.Positional[str], flag("NAME")]
    """A tfds name, such as "cifar10" or "imagenet2012"."""
    data_dir: Annotated[str | None, flag("DIR", "$TFDS_DATA_DIR or ~/tensorflow_datasets")] = None
    """Directory that will hold NAME/VERSION."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """Prints tyro's script that completes commands, flags and their choices.

    Examples:
      eval "$(flax-resnet completion bash)"
      flax-resnet completion bash > ~/.local/share/bash-completion/completions/flax-resnet
      flax-resnet completion zsh > "${fpath[1]}/_flax-resnet"
      flax-resnet completion fish > ~/.config/fish/completions/flax-resnet.fish
    """

    shell: Annotated[tyro.conf.Positional[Shell], flag("{bash,zsh,fish}")]
    """Whose words are completed."""


TRAIN = """Trains a network from random weights on "digits", a tfds set, or a folder of images with
a sub-folder for each class.

Where nothing is said, images of up to 96 pixels get a ResNet-20 and others a ResNet-18 at 224; the
classes are counted. Every field of the config is a flag. The same command goes on where it was.

Examples:
  flax-resnet train digits
  flax-resnet train cifar10 --data.data-dir DIR --model wrn_28_10 --num-epochs 60
  flax-resnet train PHOTOS --model resnet50 --data.image-size 160 --workdir runs/photos"""
FINETUNE = """Trains a ResNet-50 on from ImageNet's weights, on a folder of images with a sub-folder
for each class, or a tfds set. Of --weights FILE_OR_RUN it is their network, on images as theirs.

Every layer trains, earlier ones more slowly. The classes are counted. Every field of the config is
a flag. The same command goes on where it was.

Examples:
  flax-resnet finetune PHOTOS --num-epochs 5
  flax-resnet finetune PHOTOS --weights runs/others
  flax-resnet finetune PHOTOS --model.frozen-stages 4 --cache-features \\
    --data.no-random-resized-crop --augment.no-flip"""
DATA = "DATA"
MAKES: Mapping[str, tuple[str, Callable[[str, recipes.Given], TrainConfig]]] = {
    "train": (TRAIN, recipes.scratch),
    "finetune": (FINETUNE, recipes.finetuned),
}


def _names(given: Names) -> None:
    for name in models.names():
        print(" ".join([name, *(tags(name) if given.weights else ())]))


def _summary(given: Summary) -> None:
    fields: dict[str, Any] = {"include_top": False} if given.no_top else {}
    if given.num_classes is not None:
        fields["num_classes"] = given.num_classes
    module = models.create(given.name, dtype=given.dtype, **fields)
    shape = models.check_shape(given.input_shape or models.default_shape(module))
    title = f"{given.name}, input {'x'.join(map(str, shape))}"
    summary.show(title, summary.summarize(module, shape, given.batch_size), parts=given.parts)


def _prepare(given: Prepare) -> None:
    print(prepare(given.name, given.data_dir))


def _asked(command: str, argv: Sequence[str]) -> flags.Invocation:
    """The first config for what the first argument names, changed by the flags."""
    about, recipe = MAKES[command]
    prog = f"{PROG} {command} {DATA}"
    ending = "" if command == "train" else f"-{command}"
    if not argv or argv[0].startswith("-"):
        if {"-h", "--help"} & set(argv):
            flags.parse(recipes.digits(), f"runs/{DATA}{ending}", ["--help"], about, prog)
        raise UserError(
            f'{command} {" ".join(argv[:1])}: expected what to train on first: "digits", a tfds '
            f"name, or a folder; `{PROG} {command} --help` has examples"
        )
    data, rest = argv[0], argv[1:]
    given, _ = tyro.cli(
        recipes.Given, args=rest, return_unknown_args=True, add_help=False, description=""
    )
    config = recipe(data, given)
    name = Path(data).expanduser().resolve().name if config.data.folder else data.replace("/", "-")
    return flags.parse(config, f"runs/{name}{ending}", rest, about, prog)


def _completion(given: Completion) -> None:
    default = flags.Invocation("runs", TrainConfig())
    commands: list[Any] = []
    for name, tool in TOOLS.items():
        known: Any = {"default": default} if tool.settings is flags.Invocation else {}
        subcommand = tyro.conf.subcommand(name, description=tool.what, **known)
        commands.append(Annotated[tool.settings, subcommand])
    any_of: Any = Union[tuple(commands)]  # noqa: UP007
    printed, argv = io.StringIO(), ["--tyro-print-completion", given.shell]
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        flags.cli(any_of, argv, prog=PROG, **flags.OPTIONS)
    # In bash each line of a help is taken for a flag, and no answer for an empty one, not files.
    script = re.sub(
        r"(?m)^COMPLETION_SPEC = .*$",
        lambda line: re.sub(r"\\+n", " ", line.group()),
        printed.getvalue(),
    )
    script = script.replace('COMPREPLY=("${matches[@]}")', "COMPREPLY=(${matches[@]})")
    print(script.replace("complete -F", "complete -o default -F"), end="")


TOOLS: dict[str, Tool] = {
    "train": Tool("train a network on digits, a tfds set or a folder", flags.Invocation, start),
    "finetune": Tool("train ImageNet's weights on, on your images", flags.Invocation, start),
    "predict": Tool("name what is in images", predict.Settings, predict.main),
    "evaluate": Tool("measure weights on a data set", evaluate.Settings, evaluate.main),
    "report": Tool("put a run into one HTML file", report.Settings, report.main),
    "push": Tool("upload weights and a card to the Hugging Face hub", push.Settings, push.main),
    "pull": Tool("download weights and their card from it", push.Pull, push.pull),
    "serve": Tool("open a web page to drop images on", serve.Settings, serve.main),
    "compare": Tool("set runs side by side", compare.Settings, compare.main),
    "convert": Tool("write weights in another format", convert.Settings, convert.main),
    "export": Tool(
        "write a network for StableHLO, ONNX or torch", exporting.Settings, exporting.main
    ),
    "summary": Tool("show a network's layers and their cost", Summary, _summary),
    "names": Tool("list the networks that have a name", Names, _names),
    "prepare": Tool("make a tfds set readable", Prepare, _prepare),
    "doctor": Tool("say what is installed, found and missing", doctor.Settings, doctor.main),
    "completion": Tool("print a script that completes this command", Completion, _completion),
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
        if argv[0] in MAKES:
            start(_asked(argv[0], argv[1:]))
            return
        settings = flags.cli(tool.settings, argv[1:], prog=f"{PROG} {argv[0]}")
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
