"""A long run's command starts itself again with huge pages, and nothing else does."""

import dataclasses
import json
import subprocess
import sys

import pytest
from helpers import tiny_resnet

from flax_resnet import cpu, restart
from flax_resnet.config import TrainConfig
from flax_resnet.data import DataConfig


@pytest.fixture
def config(digits_dir):
    """1,442 images of 8x8, 40 epochs of 16 steps."""
    data = DataConfig(data_dir=digits_dir)
    return TrainConfig(tiny_resnet(), data, num_epochs=40.0, batch_size=96)


@pytest.fixture
def started(monkeypatch):
    """What is started instead of this process."""
    commands = []
    monkeypatch.setattr(restart.os, "execve", lambda *command: commands.append(command))
    monkeypatch.setattr(cpu, "lacks_huge_pages", lambda: True)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-W", "error", "-m", "x", "--seed", "3"])
    monkeypatch.delenv(cpu.TUNABLES, raising=False)
    return commands


def test_the_estimate_is_of_the_multiply_adds(config):
    # The stem, two 3x3 convolutions of 8 filters on 8x8, and the head.
    macs = 64 * 9 * (1 * 8 + 8 * 8 + 8 * 8) + 8 * 10
    want = 6 * macs * 96 * 40 * 16 / restart.FLOPS_A_SECOND
    assert restart.estimated_seconds(config) == pytest.approx(want)
    shorter = dataclasses.replace(config, num_steps=64)
    assert restart.estimated_seconds(shorter) == pytest.approx(want / 10)
    larger = dataclasses.replace(config.data, image_size=12, pad=2)
    four = dataclasses.replace(config, data=larger)
    assert restart.estimated_seconds(four) == pytest.approx(4 * want, rel=0.01)


def test_a_long_run_starts_again_once_with_what_it_was_told(config, started, monkeypatch, capsys):
    restart.with_huge_pages(config)
    assert started == []
    monkeypatch.setattr(restart, "WORTH_SECONDS", 3 * restart.estimated_seconds(config))
    restart.with_huge_pages(config, runs=2)
    assert started == []
    restart.with_huge_pages(config, runs=4)
    ((program, command, environment),) = started
    assert program == command[0] == sys.executable
    assert command[1:] == ["-W", "error", "-m", "x", "--seed", "3"]
    assert environment["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    assert "starts again with huge pages" in capsys.readouterr().out
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    restart.with_huge_pages(config, runs=4)
    assert started[1][2]["GLIBC_TUNABLES"] == "glibc.malloc.check=1:glibc.malloc.hugetlb=1"
    monkeypatch.setattr(cpu, "lacks_huge_pages", lambda: False)
    restart.with_huge_pages(config, runs=4)
    assert len(started) == 2


def test_data_that_is_missing_is_left_to_the_run(config, started, tmp_path):
    missing = dataclasses.replace(config, data=DataConfig(folder=str(tmp_path / "none")))
    restart.with_huge_pages(missing, runs=10**6)
    assert started == []


COMMAND = """
import sys, json, os
from flax_resnet import cpu, restart
from flax_resnet.config import TrainConfig
from flax_resnet.data import DataConfig
from flax_resnet.models import MiniModel
config = TrainConfig(MiniModel(), DataConfig(data_dir=sys.argv[1]), num_steps=10**6)
print(cpu.lacks_huge_pages(), os.getpid(), flush=True)
restart.with_huge_pages(config)
print(json.dumps([os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv[1:]]))
"""


@pytest.mark.slow
def test_a_real_process_becomes_the_one_with_huge_pages(digits_dir, clean_environment):
    clean_environment.pop(cpu.TUNABLES, None)
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, digits_dir, "--x"],
        env=clean_environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    first, *_, last = done.stdout.splitlines()
    lacked, process = first.split()
    found = json.loads(last)
    assert found[0] == int(process)
    assert found[2] == [digits_dir, "--x"]
    if lacked == "True":
        assert found[1] == cpu.HUGE_PAGES_ON
        assert done.stdout.splitlines()[-2] == f"False {process}"
    else:
        assert len(done.stdout.splitlines()) == 2
