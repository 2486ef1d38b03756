"""Trackers: one in memory, MLflow's own server, W&B's offline files, and servers that are down."""

import contextlib
import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import jax
import pytest
from helpers import QUICK, tiny_resnet

import flax_resnet
from flax_resnet import tracking
from flax_resnet.checkpoints.checkpoints import CheckpointConfig
from flax_resnet.cli.flags import parse
from flax_resnet.config import TrainConfig
from flax_resnet.data_config import DataConfig
from flax_resnet.distributed import data_mesh
from flax_resnet.errors import UserError
from flax_resnet.optim import Adam
from flax_resnet.preemption import Preempted
from flax_resnet.records.configs import flatten, from_record, to_record
from flax_resnet.run_dir import read_config, read_metrics
from flax_resnet.tracking import follower, to_wandb
from flax_resnet.tracking.run_log import RunLog
from flax_resnet.train import train_and_evaluate
from flax_resnet.workdir import differences, write_record

HERE = pathlib.Path(__file__).parent
RUNS = {}


class InMemory(tracking.Tracker):
    """Keeps what it is given; ``fails`` calls raise, and calls wait until it is ``free``."""

    def __init__(self, run_id, about):
        self.run_id, self.about = run_id, [about]
        self.lines, self.ends, self.threads = [], [], set()
        self.fails = 0
        self.free = threading.Event()
        self.free.set()

    def write(self, lines):
        self.threads.add(threading.current_thread())
        self.free.wait(60)
        if self.fails:
            self.fails -= 1
            raise ConnectionError("http://ann:secret@host is away\nfor now")
        self.lines += lines

    def close(self, end):
        self.ends.append(end)


@dataclasses.dataclass(frozen=True)
class Mine(tracking.Tracking):
    """A tracker that a user might write."""

    key: str = "a"
    """A flag of it."""

    def open(self, about):
        run = RUNS.get(about.run_id)
        if run is None:
            run = RUNS[f"run{len(RUNS)}"] = InMemory(f"run{len(RUNS)}", about)
        else:
            run.about.append(about)
        return run


@pytest.fixture(autouse=True)
def no_runs():
    RUNS.clear()


@contextlib.contextmanager
def logging(workdir, start=0):
    """A RunLog with its tracker, as the training loop has it; the tracker is open."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_record(workdir, TrainConfig(tracking=Mine()))
    with tracking.following({workdir: Mine()}) as followers:
        log = RunLog(workdir, start, 99, quiet=True, follower=followers[workdir])
        with contextlib.closing(log):
            wait_for((workdir / "tracking.json").exists)
            yield log


def wait_for(condition):
    until = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def write(log, *places):
    for step, split in places:
        log.write(split, step, step / 7, {"loss": step + len(split) / 7, "top1": 1 / 3})


def records(run):
    """A tracker's lines as metrics.jsonl has them."""
    return [{"step": x.step, "epoch": x.epoch, "split": x.split, **x.values} for x in run.lines]


def test_a_tracker_gets_the_config_every_line_and_the_end_from_one_thread(tmp_path):
    workdir = tmp_path / "deep" / "seed3"
    with logging(workdir) as log:
        write(log, (3, "train"), (5, "train"), (5, "eval"))
    run = RUNS["run0"]
    assert records(run) == read_metrics(workdir)
    assert [(line.step, line.split) for line in run.lines] == [
        (3, "train"), (5, "train"), (5, "eval")
    ]  # fmt: skip
    assert run.lines[0].named == {
        "train/loss": 3 + 5 / 7, "train/top1": 1 / 3, "train/epoch": round(3 / 7, 4)
    }  # fmt: skip
    assert len(run.threads) == 1
    (end,) = run.ends
    assert (end.status, end.step, end.result) == ("FINISHED", 5, {})
    assert [path.name for path in end.files] == ["config.json"]
    (about,) = run.about
    assert (about.name, about.group) == ("deep/seed3", str(tmp_path / "deep"))
    assert (about.named("trial"), about.run_id) == ("trial/seed3", None)
    assert about.params["optimizer.learning_rate"] == 0.1
    assert about.params["tracking"] == "Mine"
    assert about.tags["devices"] == "8 x cpu"
    assert about.tags["package.jax"] == jax.__version__


def test_a_run_started_again_goes_on_in_the_same_run_of_the_tracker(tmp_path):
    with contextlib.suppress(Preempted), logging(tmp_path) as log:
        write(log, (3, "train"), (5, "train"), (5, "eval"))
        raise Preempted
    with logging(tmp_path, start=5) as log:
        write(log, (8, "train"))
    (run,) = RUNS.values()
    assert records(run) == read_metrics(tmp_path)
    assert [about.run_id for about in run.about] == [None, "run0"]
    assert [end.status for end in run.ends] == ["KILLED", "FINISHED"]
    RUNS["gone"] = RUNS.pop("run0")  # the tracker made a new run, which gets everything
    with contextlib.suppress(ZeroDivisionError), logging(tmp_path, start=8) as log:
        write(log, (9, "train"))
        _ = 1 / 0
    run = RUNS["run1"]
    assert records(run) == read_metrics(tmp_path)
    assert [line.step for line in run.lines] == [3, 5, 5, 8, 9]
    assert [end.status for end in run.ends] == ["FAILED"]


def test_a_tracker_that_fails_for_a_while_gets_everything_and_is_warned_of_once(tmp_path, capfd):
    with logging(tmp_path) as log:
        RUNS["run0"].fails = 2
        for step in (1, 2):
            write(log, (step, "train"))
            wait_for(lambda step=step: RUNS["run0"].fails == 2 - step)
        write(log, *((step, "train") for step in range(3, 251)))
    assert [line.step for line in RUNS["run0"].lines] == list(range(1, 251))
    assert capfd.readouterr().err == (
        "tracking: Mine does not take the metrics (ConnectionError: http://***@host is away for "
        "now): the run goes on, and tries again with the next line\n"
    )


@pytest.mark.parametrize("hangs", [True, False])
def test_a_tracker_that_is_down_costs_at_most_30_seconds_and_no_line(
    tmp_path, capfd, monkeypatch, hangs
):
    assert follower.FINISHED_SECONDS + to_wandb.FINISH_SECONDS <= 30
    monkeypatch.setattr(follower, "FINISHED_SECONDS", 0.5 if hangs else 20)
    with logging(tmp_path) as log:
        run = RUNS["run0"]
        write(log, (1, "train"))
        wait_for(lambda: run.lines)
        if hangs:
            run.free.clear()
        else:
            run.fails = 10**9
        write(log, (2, "train"), (3, "train"))
    *warned, last = capfd.readouterr().err.splitlines()
    assert ["ConnectionError" in line for line in warned] == ([] if hangs else [True])
    assert last == (
        f"tracking: Mine did not get the end of the run and 2 lines; {tmp_path} has all of it"
    )
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]
    run.free.set()


@pytest.mark.parametrize(
    ("flags", "config", "expected"),
    [
        ("mlflow --tracking.uri http://h:1", TrainConfig(), flax_resnet.MLflow("http://h:1")),
        ("wandb --tracking.mode offline", TrainConfig(), flax_resnet.Wandb(mode="offline")),
        ("off", TrainConfig(), tracking.Off()),
        ("mine --tracking.key b", TrainConfig(tracking=Mine()), Mine("b")),
    ],
)
def test_flags_choose_a_tracker(flags, config, expected):
    words = ["--tracking", *flags.split()]
    if isinstance(expected, Mine):
        words = words[2:]
    assert parse(config, "w", words).config.tracking == expected
    assert expected.events == (expected != tracking.Off())


def test_a_record_names_its_tracker_and_a_resumed_run_may_change_it(tmp_path):
    there = to_record(TrainConfig(tracking=tracking.MLflow("http://h:1", run_name="x")))
    assert there["tracking"]["class"] == "flax_resnet.tracking.to_mlflow:MLflow"
    assert from_record(there).tracking == tracking.MLflow("http://h:1", run_name="x")
    for name in ("base:TensorBoard", "base:Off", "to_wandb:Wandb"):
        assert isinstance(from_record({"class": f"flax_resnet.tracking.{name}"}), tracking.Tracking)
    for chosen in (tracking.TensorBoard(), tracking.Wandb(), Mine("b")):
        assert differences(there, TrainConfig(tracking=chosen)) == []
    write_record(tmp_path, TrainConfig(seed=5, tracking=Mine()))
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace("test_tracking:Mine", "elsewhere:Mine"))
    assert read_config(tmp_path) == TrainConfig(seed=5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tracking.MLflow("http://ann:hunter2@h:5000"), r"uri=.*\*\*\*.*: set MLFLOW_TR"),
        (lambda: tracking.MLflow("postgresql://u:hunter2@db/m"), r"uri=.*\*\*\*.*: set MLFLOW_TR"),
        (lambda: tracking.Wandb(mode="offlin"), "mode='offlin'"),
        (lambda: tracking.Wandb("p", "t").check(), "W&B t/p: no key for https://api.wandb.ai"),
        (lambda: TrainConfig(tracking="mlflow"), r"tracking='mlflow': expected TensorBoard\(\)"),
        (lambda: parse(TrainConfig(), "w", ["--tracking", "mlfow"]), "did you mean 'mlflow'"),
        (lambda: tracking.MLflow().check(), r"mlflow is .*: pip install 'flax_resnet\[mlflow\]'"),
    ],
)
def test_bad_input_is_one_line(make, message, monkeypatch, tmp_path):
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setitem(sys.modules, "wandb", sys)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    for name in ("API_KEY", "MODE", "IDENTITY_TOKEN_FILE", "BASE_URL"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    with pytest.raises(UserError, match=message) as refused:
        make()
    assert "hunter2" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_password_of_the_environment_is_not_shown(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ann:hunter2@127.0.0.1:1")
    assert tracking.MLflow().where == "MLflow http://***@127.0.0.1:1, experiment flax_resnet"


@pytest.fixture(scope="module")
def config(digits_dir):
    return TrainConfig(
        model=tiny_resnet(),
        data=DataConfig(data_dir=digits_dir),
        optimizer=Adam(),
        batch_size=360,
        eval_batch_size=200,
        num_steps=12,
        log_every_steps=3,
        checkpoint=CheckpointConfig(every_steps=6),
    )


def train_with_a_stop(config, workdir, chosen):
    """Trains with a tracker, is stopped after eight steps, and resumes."""
    config, times = dataclasses.replace(config, tracking=chosen), iter(range(100))
    mesh = data_mesh(jax.devices()[:1])
    with pytest.raises(Preempted):
        train_and_evaluate(config, workdir, mesh=mesh, quiet=True, stop=lambda: next(times) >= 8)
    return train_and_evaluate(config, workdir, mesh=mesh, quiet=True)


def test_seeds_that_train_together_are_a_run_each_of_one_group(config, tmp_path):
    config = dataclasses.replace(config, tracking=Mine())
    root = tmp_path / "both"
    flax_resnet.train_seeds(config, root, 2, together=True)
    assert sorted(run.about[0].name for run in RUNS.values()) == ["both/seed0", "both/seed1"]
    for run in RUNS.values():
        (about,), (end,) = run.about, run.ends
        assert about.group == str(root)
        assert records(run) == read_metrics(about.workdir)
        assert (end.status, end.step) == ("FINISHED", 12)


@pytest.fixture
def server(tmp_path):
    """The address of MLflow's own server."""
    pytest.importorskip("mlflow")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    command = [
        sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{tmp_path}/runs.db",
        "--artifacts-destination", str(tmp_path / "artifacts"),
    ]  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)

    def answers():
        assert process.poll() is None, (tmp_path / "log").read_text()
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close() or 1

    wait_for(answers)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait()


@pytest.mark.slow
def test_an_mlflow_server_has_a_stopped_run_as_one_with_every_line(config, server, tmp_path):
    from mlflow import MlflowClient

    workdir, chosen = tmp_path / "w", tracking.MLflow(server, "stopped", run_name="trial")
    result = train_with_a_stop(config, workdir, chosen)
    client = MlflowClient(server)
    experiment = client.get_experiment_by_name("stopped")
    (run,) = client.search_runs([experiment.experiment_id])
    stored = {
        (name, m.step, m.value)
        for name in run.data.metrics
        for m in client.get_metric_history(run.info.run_id, name)
    }
    expected = {(f"result/{name}", 12, value) for name, value in result.items()}
    for record in read_metrics(workdir):
        step, split = record.pop("step"), record.pop("split")
        expected |= {(f"{split}/{name}", step, value) for name, value in record.items()}
    assert stored == expected
    assert (run.info.status, run.info.run_name) == ("FINISHED", "trial")
    flat = flatten(to_record(dataclasses.replace(config, tracking=chosen)))
    assert run.data.params == {name: str(value) for name, value in flat.items()}
    assert (run.data.tags["starts"], run.data.tags["devices"]) == ("2", "8 x cpu")
    files = [file.path for file in client.list_artifacts(run.info.run_id)]
    assert files == ["config.json", "confusion.png", "curves.png", "result.json"]


@pytest.mark.slow
def test_wandb_offline_has_a_stopped_run_as_one(config, tmp_path):
    pytest.importorskip("wandb")
    train_with_a_stop(config, tmp_path / "w", tracking.Wandb(project="p", mode="offline"))
    run_id = json.loads((tmp_path / "w/tracking.json").read_text())["W&B p"]["run_id"]
    places = sorted((tmp_path / "w/wandb").glob("offline-run-*"))
    assert [place.name.rsplit("-", 1)[1] for place in places] == [run_id] * 2
    stopped, finished = (next(place.glob("*.wandb")).read_bytes() for place in places)
    for name in (b"train/loss", b"eval/top1", b"optimizer.learning_rate", b"run.devices"):
        assert name in stopped
        assert name in finished
    assert b"result/top1" in finished
    pictures = {path.name.split("_")[0] for path in places[1].glob("files/media/images/*")}
    assert pictures == {"curves", "confusion"}


COMMAND = """
from helpers import tiny_resnet
from flax_resnet import DataConfig, MLflow, TrainConfig, Wandb
from flax_resnet.cli import experiment
def get_config():
    return TrainConfig(
        model=tiny_resnet(), data=DataConfig(data_dir={data!r}), batch_size=360,
        num_steps=4, log_every_steps=1, tracking={tracking})
experiment.main(get_config, {workdir!r}, [])
"""


@pytest.mark.slow
@pytest.mark.parametrize("accepts", [True, False], ids=["black hole", "refused"])
@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_server_that_is_down_costs_a_run_at_most_30_seconds_and_no_line(
    tmp_path, digits_dir, clean_environment, name, accepts
):
    pytest.importorskip(name)
    workdir = tmp_path / "w"
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        if not accepts:
            listening.close()
        chosen = f"MLflow({address!r})" if name == "mlflow" else "Wandb()"
        code = COMMAND.format(data=digits_dir, workdir=str(workdir), tracking=chosen)
        environment = clean_environment | QUICK | {
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
            "WANDB_BASE_URL": address, "WANDB_API_KEY": "x" * 40,
        }  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-c", code], env=environment, cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        wait_for(lambda: (workdir / "result.json").exists() or process.poll() is not None)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    steps = [r["step"] for r in read_metrics(workdir) if r["split"] == "train"]
    assert steps == [1, 2, 3, 4]
    assert "does not take the metrics (" in err or name == "mlflow"
    assert "did not get the end of the run and 5 lines" in err
