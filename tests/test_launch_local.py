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
    return [sys.executable, "-c", "import os, sys, time\ni = os.environ['JAX_PROCESS_ID']\n"
            + program]  # fmt: skip


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


@pytest.mark.parametrize(("end", "status"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137)])
def test_when_one_dies_the_rest_are_ended(capfd, end, status):
    began = time.monotonic()
    program = python(f"if i == '1': {end}\ntime.sleep(60)")
    assert launch(program, Settings(2, grace=0.5), ENVIRON) == status
    assert time.monotonic() - began < 20
    assert "processes 0 still run: SIGTERM" in capfd.readouterr().out


def test_one_that_ignores_sigterm_is_killed(capfd):
    program = python(
        "import signal\nsignal.signal(15, lambda *_: None)\n"
        "if i == '1': time.sleep(0.3); sys.exit(4)\nwhile True: time.sleep(1)"
    )
    assert launch(program, Settings(2, grace=0.6), ENVIRON) == 4
    assert "processes 0 still run: SIGKILL" in capfd.readouterr().out


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
def test_signals_go_to_all_and_nothing_starts_again(capfd, number):
    program = python(
        "import signal\nfor n in (2, 15): signal.signal(n, lambda n, _: sys.exit(75))\n"
        "print('ready')\ntime.sleep(60)"
    )

    def started(children):
        assert len(children) == 2
        timer = threading.Timer(1.0, os.kill, [os.getpid(), number])
        timer.start()

    assert launch(program, Settings(2, restart=2), ENVIRON, started) == 75
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


@pytest.fixture
def digits(tmp_path, digits_dir, clean_environment):
    """(a short run of the digits in tmp_path/w, its environment)."""
    words = [
        "-m", "experiments.digits", "--workdir", str(tmp_path / "w"), "--num-steps", "8",
        "--batch-size", "64", "--model.stage-sizes", "1", "--model.num-filters", "8",
        "--log-every-steps", "1", "--checkpoint.every-steps", "2",
    ]  # fmt: skip
    return [sys.executable, *words], clean_environment | {"TFDS_DATA_DIR": digits_dir}


@pytest.mark.slow
def test_two_processes_train_as_one_run(tmp_path, digits, capfd):
    status = launch(digits[0], Settings(2, 2), digits[1])
    out, err = capfd.readouterr()
    assert status == 0, err
    result = json.loads((tmp_path / "w" / "result.json").read_text())
    assert result["step"] == 8
    assert "on 4 x cpu" in out
    others = [line for line in out.splitlines() if line.startswith("[1]")]  # gloo has its say
    assert not [line for line in others if any(word in line for word in ("step", "images", "top"))]


@pytest.mark.slow
def test_a_killed_process_and_a_restart_finish_the_run(tmp_path, digits, capfd):
    starts = []

    def kill(child):
        while not (tmp_path / "w" / "checkpoints" / "2").exists():  # it is renamed to that last
            if child.returncode is not None:
                return
            time.sleep(0.05)
        child.kill()

    def started(children):
        starts.append(children)
        if len(starts) == 1:
            threading.Thread(target=kill, args=[children[1]]).start()

    status = launch(digits[0], Settings(2, 1, restart=1), digits[1], started)
    out, err = capfd.readouterr()
    assert status == 0, err
    assert len(starts) == 2
    assert "[0] process 0 of 2: ends, since process 1 has died" in err
    assert json.loads((tmp_path / "w" / "result.json").read_text())["step"] == 8
    assert "resumes at step" in out
