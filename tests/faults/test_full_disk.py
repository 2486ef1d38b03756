"""A disk that is full, and one that is read only: real ones, small, of this machine's memory."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from helpers import assert_trees_equal

from flax_resnet.checkpoints import seals
from flax_resnet.checkpoints.checkpoints import Checkpoints
from flax_resnet.records.run_dir import read_metrics

pytestmark = pytest.mark.slow
SUPPORT = pathlib.Path(__file__).parents[1] / "support"
TRAIN = """
import sys, fault_worker
sys.argv[1:], sys.argv[0] = [], "worker"
fault_worker.experiment.main(fault_worker.get_config, {workdir!r}, {flags!r})
"""


@pytest.fixture(scope="module")
def environment(digits_dir, clean_environment, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return clean_environment | {
        "FAULTS_DATA": digits_dir,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")]),
    }


@pytest.fixture
def on_disk(environment, tmp_path):
    """Runs a shell script with a disk of so many KiB in $DISK; its contents survive in ./kept."""
    private = ["unshare", "--mount", "--map-root-user"]
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    kept.mkdir()
    try:
        trial = [*private, "mount", "-t", "tmpfs", "tmpfs", str(disk)]
        subprocess.run(trial, check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no disk can be mounted in a namespace of its own: {error}")

    def run(size, script):
        script = f"""
            mount -t tmpfs -o size={size}k tmpfs {disk} && cp -r {kept}/. {disk} || exit 99
            {script}
            status=$?
            rm -rf {kept}/*; cp -r {disk}/. {kept}
            exit $status
        """
        return subprocess.run(
            [*private, "sh", "-c", script], env=environment | {"DISK": str(disk)},
            cwd=tmp_path, capture_output=True, text=True, timeout=150,
        )  # fmt: skip

    return run


def one_line(done):
    """Its only line on stderr, with which it ended as bad input does."""
    assert done.returncode == 2, (done.returncode, done.stderr[-2000:])
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr[:3000]
    return lines[0]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """(workdir, *flags) -> a command that trains in it."""
    place = tmp_path_factory.mktemp("scripts")

    def script(workdir, *flags):
        path = place / f"{len(list(place.iterdir()))}.py"
        path.write_text(TRAIN.format(workdir=str(workdir), flags=list(flags)))
        return f"{sys.executable} {path}"

    return script


@pytest.fixture(scope="module")
def unbroken(environment, scripts, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken") / "w"
    subprocess.run(scripts(workdir).split(), env=environment, check=True, capture_output=True)
    return workdir


def assert_goes_on(workdir, unbroken, environment, scripts):
    """The same command, where there is room, ends as the unbroken run did."""
    done = subprocess.run(
        scripts(workdir).split(), env=environment, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resumes at step" in done.stdout
    states = []
    for place in (workdir, unbroken):
        reader = Checkpoints(place / "checkpoints")
        states.append(reader.read()[0])
        reader.close()
    assert_trees_equal(*states)
    steps = [
        [(r["step"], r["split"], r["loss"]) for r in read_metrics(place)]
        for place in (workdir, unbroken)
    ]
    assert steps[0] == steps[1]


@pytest.mark.parametrize("size", [1037, 1111, 1290])
def test_a_full_disk_ends_with_one_line_and_the_earlier_checkpoints_whole(
    on_disk, scripts, unbroken, environment, tmp_path, size
):
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    done = on_disk(size, scripts(disk / "w", "--checkpoint.keep-last", "1000"))
    line = one_line(done)
    steps = sorted(int(path.parent.name) for path in kept.glob("w/checkpoints/*/SEALED.json"))
    assert len(steps) >= 4
    assert line.startswith("error: ")
    assert "No space left on device" in line
    if "checkpoint " in line:
        assert f"could not be written to {disk}/w/checkpoints (No space left on device); " in line
        assert f"; whole are steps {steps}: make room or mend the place" in line
    for step in steps:
        directory = Checkpoints(kept / "w/checkpoints").directory / str(step)
        assert seals.problem(directory, seals.read(directory)) is None
    reader = Checkpoints(kept / "w/checkpoints")
    assert {int(reader.read(step)[1]["step"]) for step in steps} == set(steps)
    reader.close()
    shutil.move(kept / "w", tmp_path / "w")
    assert_goes_on(tmp_path / "w", unbroken, environment, scripts)


@pytest.mark.parametrize("room", [4, 8, 20])
def test_a_disk_that_the_log_fills_ends_with_one_line(
    on_disk, scripts, unbroken, environment, tmp_path, room
):
    """The checkpoints are elsewhere; so many KiB are left for config.json, metrics and events."""
    flags = ["--checkpoint.directory", str(tmp_path / "checkpoints")]
    done = on_disk(room, scripts(tmp_path / "disk/w", *flags))
    line = one_line(done)
    assert "No space left on device" in line
    reader = Checkpoints(tmp_path / "checkpoints")
    newest = reader.latest_step()
    assert newest is None or reader.read()[1]["step"] == newest
    reader.close()


def test_reading_from_a_read_only_disk(on_disk, unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / "kept/w")
    (tmp_path / "read.py").write_text(
        "import sys, pathlib, numpy as np\n"
        "from flax_resnet.checkpoints.checkpoints import CheckpointConfig, Checkpoints\n"
        "place = pathlib.Path(sys.argv[1])\n"
        "print(Checkpoints(place).read('best')[1]['step'])\n"
        "try:\n"
        "    Checkpoints(place, CheckpointConfig()).save(301, {'a': np.ones(9)}, {}, None)\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    read = f"mount -o remount,ro $DISK && {sys.executable} read.py $DISK/w/checkpoints"
    done = on_disk(8000, f"{read}; status=$?; mount -o remount,rw $DISK; (exit $status)")
    assert done.returncode == 0, done.stderr[-2000:]
    step, error = done.stdout.splitlines()
    assert int(step) > 0
    assert "checkpoint 301 could not be written" in error
    assert "Read-only file system" in error
