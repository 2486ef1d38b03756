"""Scripts that complete a command line, in the shells that read them."""

import os
import pathlib
import pty
import select
import shutil
import subprocess
import sys
import time
from typing import get_args

import pytest

from flax_resnet import command, completion, models
from flax_resnet.config import TrainConfig
from flax_resnet.flags import class_choices

FIFTIES = {name for name in models.names() if name.startswith("resnet5")}


def needs(shell):
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"there is no {shell}")


@pytest.fixture
def there(tmp_path):
    """A directory to type in."""
    there = tmp_path / "there"
    (there / "runs" / "digits").mkdir(parents=True)
    (there / "my photos").mkdir()
    (there / "README.md").touch()
    return there


@pytest.fixture
def script(call, tmp_path):
    """Writes a shell's script to a file."""

    def write(shell):
        code, out, _ = call("completion", shell)
        assert code == 0
        path = tmp_path / f"completion.{shell}"
        path.write_text(out)
        return path

    return write


def environment(home):
    """Little, and nobody's settings; the scripts call python3."""
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    return {
        "PATH": path, "HOME": str(home), "TERM": "dumb", "INPUTRC": os.devnull, "LC_ALL": "C.UTF-8"
    }  # fmt: skip


def in_bash(script, there):
    """What our function proposes for the last word."""

    def proposed(*words):
        code = f"""source {script}
COMP_WORDS=({" ".join(f"'{word}'" for word in ("flax-resnet", *words))})
COMP_CWORD={len(words)}
_flax_resnet
[[ ${{#COMPREPLY[@]}} == 0 ]] || printf '%s\\n' "${{COMPREPLY[@]}}"
"""
        done = subprocess.run(
            ["bash", "-c", code], capture_output=True, text=True, check=True, cwd=there,
            env=environment(there),
        )  # fmt: skip
        assert done.stderr == ""
        return done.stdout.splitlines()

    return proposed


def in_fish(script, there):
    """What fish proposes for the last word."""

    def proposed(*words):
        code = f"source {script}; complete -C 'flax-resnet {' '.join(words)}'"
        done = subprocess.run(
            ["fish", "-c", code], capture_output=True, text=True, check=True, cwd=there,
            env=environment(there),
        )  # fmt: skip
        assert done.stderr == ""
        return [line.split("\t")[0] for line in done.stdout.splitlines()]

    return proposed


@pytest.fixture(params=[pytest.param(f, marks=needs(f.__name__[3:])) for f in (in_bash, in_fish)])
def proposed(request, script, there):
    return request.param(script(request.param.__name__[3:]), there)


def test_commands_come_first(proposed):
    assert set(proposed("")) == set(command.TOOLS)
    assert proposed("pred") == ["predict"]


def test_flags_are_proposed_where_a_dash_is_typed(proposed):
    flags = proposed("train", "digits", "--optimizer")
    assert {"--optimizer", "--optimizer.schedule", "--optimizer.momentum"} <= set(flags)
    assert all(flag.startswith("--optimizer") for flag in flags)
    assert {"--model", "--weights", "--top", "--help"} <= set(proposed("predict", "x.png", "-"))
    for words in [("predict", ""), ("train", "x", ""), ("export", "")]:
        assert not any(word.startswith("-") for word in proposed(*words))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("predict", "--format", ""), {"text", "json", "csv"}),
        (("train", "digits", "--sharding", "z"), {"zero"}),
        (("train", "digits", "--optimizer", "ad"), {"adam", "adamw"}),
        (("finetune", "x", "--optimizer.schedule", "co"), {"constant", "cosine"}),
        (("train", "x", "--tracking", ""), set(class_choices(TrainConfig())["tracking"])),
        (("completion", ""), set(get_args(command.Shell))),
        (("completion", "f"), {"fish"}),
        (("train", "d"), {"digits"}),
        (("finetune", "d"), {"digits"}),
        (("summary", "resnet5"), FIFTIES),
        (("summary", "--parts", "resnet5"), FIFTIES),
        *(((name, "--model", "resnet5"), FIFTIES)
          for name in ("train", "finetune", "predict", "evaluate", "serve", "convert", "export")),
    ],
)  # fmt: skip
def test_choices(proposed, words, expected):
    assert len(FIFTIES) > 3
    assert set(proposed(*words)) == expected


@needs("bash")
def test_bash_is_left_alone_with_files(script, there):
    proposed = in_bash(script("bash"), there)
    for words in [
        ("predict", "READ"), ("predict", ""), ("export", "runs/d"), ("summary", "resnet50", ""),
        ("predict", "x.png", "--weights", "runs/d"), ("summary", "--num-classes", ""),
        ("predict", "--output", "READ"), ("predict", "--format", "z"), ("train", "digits", ""),
    ]:  # fmt: skip
        assert proposed(*words) == [], words


@needs("bash")
def test_bash_splits_at_the_equals_sign(script, there):
    proposed = in_bash(script("bash"), there)
    assert set(proposed("predict", "--model", "=", "resnet5")) == FIFTIES
    assert proposed("train", "digits", "--sharding", "=") == proposed(
        "train", "digits", "--sharding", ""
    )


@needs("fish")
def test_fish_completes_files_folders_and_after_the_equals_sign(script, there):
    proposed = in_fish(script("fish"), there)
    assert proposed("predict", "READ") == ["README.md"]
    assert proposed("export", "runs/d") == ["runs/digits/"]
    assert set(proposed("train", "")) == {"digits", "my photos/", "runs/"}
    assert set(proposed("predict", "--model=resnet5")) == {f"--model={name}" for name in FIFTIES}


def typed(start, setup, there, keys, expected):
    """Types keys in an interactive shell, and waits until it shows what is expected."""
    ours, its = pty.openpty()
    shell = subprocess.Popen(
        start, stdin=its, stdout=its, stderr=its, cwd=there, env=environment(there),
        start_new_session=True,
    )  # fmt: skip
    os.close(its)
    try:
        for line, awaited in [(f"{setup}; PS1='rea''dy> '\n", "ready> "), (keys, expected)]:
            shown, end = "", time.monotonic() + 30
            os.write(ours, line.encode())
            while awaited not in shown:
                assert time.monotonic() < end, shown
                if select.select([ours], [], [], 0.1)[0]:
                    shown += os.read(ours, 65536).decode().replace("\a", "")  # the bell
        return shown
    finally:
        shell.kill()
        shell.wait()
        os.close(ours)


TYPED = [
    ("predict READ\t", "predict README.md "),
    ("predict --output READ\t", "--output README.md "),
    ("export runs/d\t", "export runs/digits/"),
    ("train ru\t", "train runs/"),
    ("train my\t", "train my\\ photos/"),
    ("train di\t", "train digits "),
    ("completion z\t", "completion zsh "),
]


@needs("bash")
@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        *TYPED,
        ("train \t\t", "digits     my photos/ runs/"),
        ("predict --model resnet5\t\t", "resnet50     resnet50_v1  resnet50_v2"),
        ("predict --model=resnet56\t", "--model=resnet56 "),
        ("predict --output=READ\t", "--output=README.md "),
        ("train digits --opti\t!", "--optimizer!"),  # with no dot
    ],
)
def test_typing_in_bash(script, there, keys, expected):
    setup = f"source {script('bash')}"
    typed(["bash", "--norc", "-i"], setup, there, "flax-resnet " + keys, expected)


@needs("zsh")
@pytest.mark.parametrize(
    ("keys", "expected"),
    [*TYPED, ("train \t", "runs/"), ("predict --model resnet5\t", "resnet50_v1")],
)
def test_typing_in_zsh(script, there, keys, expected):
    path = script("zsh")
    path.rename(path.parent / "_flax-resnet")
    setup = f"fpath=({path.parent} $fpath); autoload -U compinit; compinit -u -D"
    typed(["zsh", "-f", "-i"], setup, there, "flax-resnet " + keys, expected)


@pytest.mark.parametrize("shell", get_args(command.Shell))
def test_every_shell_can_read_its_script(script, shell):
    path = script(shell)
    text = path.read_text()
    assert "COMPLETION_SPEC" in text
    assert all(f"'{name}'" in text or f'"{name}"' in text for name in command.TOOLS)
    if shutil.which(shell):
        subprocess.run([shell, "-n", path], check=True)


def test_what_is_proposed_where_tyro_knows_only_flags_and_files():
    options = [
        {"flags": ["--flip", "--no-flip"], "type": "boolean"},
        {"flags": ["--size"], "type": "value"},
    ]
    spec = {"subcommands": {"show": {"options": options}}}
    asked = []

    def theirs(words, index, spec):
        asked.append((words, index))
        return ["--flip\twhat it does", completion.FILES]

    def proposed(*words):
        return completion._proposed(
            ["x", *words], len(words), spec, theirs, {"show": ["one", "two"]}
        )

    assert proposed("show", "t") == ["two"]
    assert proposed("show", "--no-flip", "") == ["one", "two"]
    assert asked == []
    assert proposed("show", "--size", "") == []
    assert proposed("show", "two", "") == []
    assert proposed("show", "-") == ["--flip\twhat it does"]
    assert proposed("show", "--size", "=", "3") == []
    assert asked[-1] == (["x", "show", "--size", "3"], 3)
