"""experiments.launch.local: what each process gets, how it ends, and what starts again."""

import json
import os
import signal
import sys
import threading
import time

import pytest

from experiments.launch import local
from experiments.launch.local import Settings, environments, launch
from flax_resnet.errors import UserError

ENVIRON = {"PATH": os.environ["PATH"], "CUDA_VISIBLE_DEVICES": ""}


def python(program):
    return [sys.executable, "-c", "import os, signal, sys, time\n"
            "i = os.environ['JAX_PROCESS_ID']\n" + program]  # fmt: skip


def test_each_process_gets_its_number_and_devices(capfd):
    names = "JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES JAX_PROCESS_ID JAX_NUM_CPU_DEVICES"
    program = python(
        f"print([os.environ[n] for n in {names.split()!r}]); print(i, file=sys.stderr)"
    )
    assert launch(program, Settings(2, 4), ENVIRON) == 0
    out, err = capfd.readouterr()
    rows = {line[:4]: json.loads(line[4:].replace("'", '"')) for line in out.splitlines()}
    assert [rows[f"[{i}] "][1:] for i in (0, 1)] == [["2", "0", "4"], ["2", "1", "4"]]
    assert rows["[0] "][0] == rows["[1] "][0]
    assert sorted(err.splitlines()) == ["[0] 0", "[1] 1"]


def test_gpus_are_split_evenly():
    environ = {"CUDA_VISIBLE_DEVICES": "0,1,4,5"}
    found = environments(Settings(2), environ)
    assert [one["CUDA_VISIBLE_DEVICES"] for one in found] == ["0,1", "4,5"]
    with pytest.raises(UserError, match="4 GPUs cannot be split evenly"):
        environments(Settings(3), environ)
    for one in environments(Settings(3, 2), environ):
        assert one["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize(
    ("end", "rest", "status", "last"),
    [
        ("sys.exit(3)", "", 3, "SIGTERM"),
        ("os.kill(os.getpid(), 9)", "", 137, "SIGTERM"),
        ("time.sleep(0.5); sys.exit(4)", "signal.signal(15, lambda *_: None)", 4, "SIGKILL"),
    ],
)
def test_when_one_dies_the_rest_are_ended(capfd, end, rest, status, last):
    program = python(f"{rest}\nif i == '1': {end}\nwhile True: time.sleep(1)")
    assert launch(program, Settings(2, grace=0.6), ENVIRON) == status
    said = [line for line in capfd.readouterr().out.splitlines() if "still run" in line]
    assert said[-1] == f"processes 0 still run: {last}"


@pytest.mark.parametrize(
    ("status", "restarts", "expected"), [(75, 1, 0), (1, 2, 0), (2, 0, 2), (75, 0, 75)]
)
def test_restarts(tmp_path, capfd, status, restarts, expected):
    """It fails until it has been restarted so often as is allowed; bad input never is."""
    program = python(
        f"path = {str(tmp_path)!r} + '/' + i\n"
        "open(path, 'a').write('x')\n"
        f"sys.exit({status} if os.path.getsize(path) <= {restarts or 9} else 0)"
    )
    allowed = 3 if status == 2 else restarts
    assert launch(program, Settings(2, restart=allowed), ENVIRON) == expected
    assert (tmp_path / "0").stat().st_size == restarts + 1
    assert capfd.readouterr().out.count("starts again") == restarts


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_go_to_all_and_nothing_starts_again(tmp_path, capfd, number):
    program = python(
        "for n in (2, 15): signal.signal(n, lambda n, _: sys.exit(75))\n"
        f"open({str(tmp_path)!r} + '/' + i, 'w').close()\ntime.sleep(60)"
    )

    def send():
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=send).start()
    assert launch(program, Settings(2, restart=2), ENVIRON) == 75
    assert "starts again" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no command"),
        (["--processes", "0", "--", "x"], "--processes=0: expected 1 or more"),
        (["--", "/nowhere/x"], "/nowhere/x cannot be started"),
    ],
)
def test_bad_input_is_one_line(argv, message, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit) as stop:
        local.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
