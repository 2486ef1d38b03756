"""What the library advises in its messages: every flag exists, every command parses."""

import ast
import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

import flax_resnet
from flax_resnet.cli import app, flags, train
from flax_resnet.data.config import DataConfig
from flax_resnet.training import recipes

OTHERS = {"--abbrev-ref", "--porcelain", "--show-toplevel", "--shm-size", "--logdir", "--version",
          "--tyro-print-completion", "--seeds", "--tracking.mode"}  # fmt: skip
"""Flags of git, docker, TensorBoard and tyro, of ablations, and of `--tracking wandb`."""
LIBRARY = Path(flax_resnet.__file__).parent


def texts(path):
    """The strings of a module without its docstrings; "X" stands for what an f-string fills in."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(node.value)
        if isinstance(node, ast.JoinedStr):
            skipped.update(node.values)
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        if isinstance(node, ast.JoinedStr):
            parts = (v.value if isinstance(v, ast.Constant) else "X" for v in node.values)
            yield "".join(map(str, parts))


MESSAGES = [
    (path.relative_to(LIBRARY).as_posix(), text)
    for path in sorted(LIBRARY.rglob("*.py"))
    for text in texts(path)
]


@pytest.fixture(scope="module")
def known_flags():
    """Every flag of every command, as their --help texts name them."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("COLUMNS", "250")
        for name, tool in app.TOOLS.items():
            with contextlib.suppress(SystemExit):
                if name in train.MAKES:
                    train.parse(name, ["--help"])
                else:
                    flags.cli(tool.settings, ["--help"])
    return set(re.findall(r"--[a-z][a-z0-9.-]*", printed.getvalue()))


def test_every_flag_in_a_message_exists(known_flags):
    assert {"--workdir", "--data.num-workers", "--weights", "--num-seeds"} <= known_flags
    wrong = [
        (path, name)
        for path, text in MESSAGES
        for name in re.findall(r"(?<![\w-])--[a-z][a-z0-9.-]*[a-z0-9]", text)
        if name not in known_flags | OTHERS
    ]
    assert not wrong


def commands():
    """(module, words after flax-resnet) of every command that a message prints."""
    for path, text in MESSAGES:
        for line in text.replace("\\\n", " ").splitlines():
            for found in re.findall(r"flax-resnet ((?!COMMAND)[a-z]+ [^`;,()|>]*)", line):
                yield path, found.split(" (")[0].strip()


def test_every_command_in_a_message_parses():
    found = list(commands())
    assert len(found) > 3
    for path, words in found:
        name, *argv = shlex.split(words.replace(" {flags}", ""))  # test_card runs the card's
        assert name in app.TOOLS, (path, words)
        if name in train.MAKES:
            config = recipes.finetuning(DataConfig(), 5) if name == "finetune" else recipes.digits()
            assert flags.parse(config, "w", argv[1:]).config, (path, words)
        elif "--help" not in argv:
            assert flags.cli(app.TOOLS[name].settings, argv, "", None), (path, words)
