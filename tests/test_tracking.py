"""Trackers: one in memory, the real MLflow server of this machine, and W&B's offline files."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.request

import jax
import pytest
from helpers import QUICK, assert_trees_equal, line_of_bad_input, tiny_resnet
from test_train import saved, timeless
from wandb_files import read_runs

import flax_resnet
from flax_resnet import main, metrics, tracking
from flax_resnet.checkpoint import CheckpointConfig
from flax_resnet.config import TrainConfig, differences, write_record
from flax_resnet.data import DataConfig
from flax_resnet.distributed import data_mesh
from flax_resnet.errors import UserError
from flax_resnet.flags import parse
from flax_resnet.inspection.opened import read_record
from flax_resnet.optim import Adam
from flax_resnet.preemption import Preempted
from flax_resnet.record import from_record, to_record
from flax_resnet.tracking import base, follower, to_mlflow, to_wandb
from flax_resnet.train import train_and_evaluate

HERE = pathlib.Path(__file__).parent
RUNS = {}


class InMemory(tracking.Tracker):
    """Keeps what it is given, and fails or hangs as it is told."""

    def __init__(self, run_id, about):
        self.run_id, self.about = run_id, [about]
        self.lines, self.rewound, self.ends = [], [], []
        self.fails, self.tries = 0, 0
        self.free = threading.Event()
        self.free.set()
        self.threads = set()

    def write(self, lines):
        self.threads.add(threading.current_thread().name)
        self.free.wait(60)
        self.tries += 1
        if self.tries <= self.fails:
            raise ConnectionError("http://ann:secret@host is away\nfor now")
        self.lines += lines

    def rewind(self, step):
        self.rewound.append((step, len(self.lines)))

    def close(self, end):
        self.ends.append(end)


@dataclasses.dataclass(frozen=True)
class Mine(tracking.Tracking):
    """A tracker that a user might write."""

    key: str = "a"
    """The run is RUNS[key]."""

    def open(self, about):
        known = RUNS.get(self.key, {}).get(about.run_id)
        if known is None:
            known = InMemory(f"run{len(RUNS.get(self.key, {}))}", about)
            RUNS.setdefault(self.key, {})[known.run_id] = known
        else:
            known.about.append(about)
        return known


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    RUNS.clear()
    monkeypatch.setattr(follower, "RETRY_SECONDS", (0.01, 0.02))
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def only(key="a"):
    (run,) = RUNS[key].values()
    return run


VALUES = {"loss": 0.1 + 0.2, "top1": 1 / 3}


def write(log, *places):
    for step, split in places:
        log.write(split, step, step / 7, {**VALUES, "loss": step + len(split) / 7})


@contextlib.contextmanager
def logging(workdir, start=0, chosen=Mine()):
    """A RunLog with its tracker, as the loop has it."""
    workdir.mkdir(exist_ok=True)
    write_record(workdir, TrainConfig(tracking=chosen))
    with tracking.following({workdir: chosen}) as followers:
        log = metrics.RunLog(workdir, start, 99, quiet=True, follower=followers.get(workdir))
        try:
            yield log
        finally:
            log.close()


def records(run):
    """A tracker's lines as metrics.jsonl has them."""
    return [{"step": x.step, "epoch": x.epoch, "split": x.split, **x.values} for x in run.lines]


def test_a_tracker_gets_every_line_in_order_from_one_thread(tmp_path):
    with logging(tmp_path / "w") as log:
        write(log, (3, "train"), (5, "train"), (5, "eval"))
    run = only()
    assert records(run) == metrics.read_metrics(tmp_path / "w")
    assert [x.place for x in run.lines] == [(3, "train"), (5, "train"), (5, "eval")]
    assert run.lines[0].named == {
        "train/loss": 3 + 5 / 7, "train/top1": 1 / 3, "train/epoch": round(3 / 7, 4)
    }  # fmt: skip
    assert run.threads == {"to Mine"}
    assert [(end.status, end.step, dict(end.result)) for end in run.ends] == [("FINISHED", 5, {})]
    assert [path.name for path in run.ends[0].files] == ["config.json"]


def test_a_tracker_is_told_what_the_run_is(tmp_path):
    with logging(tmp_path / "w"):
        pass
    (about,) = only().about
    assert (about.name, about.group, about.run_id) == ("w", None, None)
    assert about.params["optimizer.learning_rate"] == 0.1
    assert about.params["tracking"] == "Mine"
    assert about.tags["devices"] == "8 x cpu"
    assert about.tags["workdir"] == str(tmp_path / "w")
    assert about.tags["package.jax"] == jax.__version__
    assert about.named("trial") == "trial"


def test_seeds_have_a_group(tmp_path):
    (tmp_path / "deep").mkdir()
    with logging(tmp_path / "deep" / "seed3"):
        pass
    (about,) = only().about
    assert (about.name, about.group) == ("deep/seed3", str(tmp_path / "deep"))
    assert about.named("trial") == "trial/seed3"


def test_a_run_started_again_goes_on_and_sends_no_line_twice(tmp_path):
    with contextlib.suppress(Preempted), logging(tmp_path / "w") as log:
        write(log, (3, "train"), (5, "train"), (5, "eval"), (8, "train"))
        raise Preempted
    assert only().ends[0].status == "KILLED"
    with logging(tmp_path / "w", start=5) as log:  # it was saved there: 8 comes again
        assert len(metrics.read_metrics(tmp_path / "w")) == 3
        write(log, (8, "train"), (10, "train"), (10, "eval"))
    run = only()
    assert [x.place for x in run.lines] == [
        (3, "train"), (5, "train"), (5, "eval"), (8, "train"), (10, "train"), (10, "eval")
    ]  # fmt: skip
    assert records(run) == metrics.read_metrics(tmp_path / "w")
    assert [about.run_id for about in run.about] == [None, "run0"]
    assert [end.status for end in run.ends] == ["KILLED", "FINISHED"]


def test_a_tracker_chosen_later_gets_what_came_before(tmp_path):
    log = metrics.RunLog(tmp_path, 0, 99, quiet=True)
    write(log, *((step, "train") for step in range(1, 250)))
    log.close()
    with logging(tmp_path, start=200) as log:
        write(log, (201, "train"))
    assert [x.step for x in only().lines] == list(range(1, 202))
    assert json.loads((tmp_path / "tracking.json").read_text()) == {
        "Mine": {"run_id": "run0", "sent": [201, "train"]}
    }


def test_what_was_not_sent_is_sent_when_the_run_is_started_again(tmp_path, capfd):
    with contextlib.suppress(Preempted), logging(tmp_path) as log:
        only().fails = 10**9
        write(log, (1, "train"), (2, "train"))
        raise Preempted
    assert (only().lines, only().ends) == ([], [])
    assert "did not get the last 2 of 2 lines" in capfd.readouterr().err
    only().fails = 0
    with logging(tmp_path, start=2) as log:
        write(log, (3, "train"))
    assert [x.step for x in only().lines] == [1, 2, 3]


def test_a_run_that_is_gone_there_begins_anew_with_everything(tmp_path):
    with logging(tmp_path) as log:
        write(log, (1, "train"))
    RUNS["a"] = {"other": None}  # one of somebody else's
    with logging(tmp_path, start=1) as log:
        write(log, (2, "train"))
    assert [x.step for x in RUNS["a"]["run1"].lines] == [1, 2]


def test_a_tracker_that_fails_for_a_while_gets_everything_and_is_warned_of_once(tmp_path, capfd):
    with logging(tmp_path) as log:
        only().fails = 5
        write(log, (1, "train"), (2, "train"))
        for _ in range(500):
            if only().lines:
                break
            time.sleep(0.01)
        write(log, (3, "train"))
    assert only().tries > 5
    assert [x.step for x in only().lines] == [1, 2, 3]
    assert capfd.readouterr().err == (
        "tracking: Mine does not take the metrics (ConnectionError: http://***@host is away for "
        "now): the run goes on and tries again; metrics.jsonl has them\n"
    )


@pytest.mark.parametrize("hangs", [True, False])
def test_a_tracker_that_stays_away_neither_stops_nor_fails_a_run(
    tmp_path, capfd, monkeypatch, hangs
):
    monkeypatch.setattr(follower, "FINISHED_SECONDS", 0.5)
    monkeypatch.setattr(follower, "SLOW_SECONDS", 0.1)
    began = time.monotonic()
    with logging(tmp_path) as log:
        write(log, (1, "train"))
        while not only().lines:
            time.sleep(0.01)
        if hangs:
            only().free.clear()
        else:
            only().fails = 10**9
        write(log, (2, "train"))
        time.sleep(0.3)
        write(log, (3, "train"))
    assert time.monotonic() - began < 5
    first, last = capfd.readouterr().err.splitlines()
    assert ("no answer for 0 s" if hangs else "ConnectionError") in first
    assert last == (
        f"tracking: Mine did not get the last 2 of 3 lines and the end of the run; {tmp_path} has "
        "all of it"
    )
    assert len(metrics.read_metrics(tmp_path)) == 3
    only().free.set()


def test_a_guard_that_goes_back_is_told_between_the_lines(tmp_path):
    with logging(tmp_path) as log:
        write(log, (2, "train"), (4, "train"))
        while len(only().lines) < 2:
            time.sleep(0.01)
        log.rewind(2)
        write(log, (4, "train"), (6, "train"))
    run = only()
    assert run.rewound == [(2, 2)]
    assert [x.step for x in run.lines] == [2, 4, 4, 6]
    with logging(tmp_path, start=4) as log:
        write(log, (6, "train"), (8, "train"))
    assert [x.step for x in run.lines] == [2, 4, 4, 6, 8]


def test_a_run_that_fails_is_marked_so(tmp_path):
    with pytest.raises(ZeroDivisionError), logging(tmp_path):
        _ = 1 / 0
    assert [end.status for end in only().ends] == ["FAILED"]


@dataclasses.dataclass(frozen=True)
class Broken(Mine):
    def check(self):
        raise ConnectionError("nobody there")

    def open(self, about):
        time.sleep(30)


def test_what_cannot_be_opened_is_bad_input(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"Broken cannot be used \(ConnectionError: nobody there"):
        tracking.check(Broken())
    monkeypatch.setattr(tracking, "OPEN_SECONDS", 0.1)
    with pytest.raises(UserError, match="Broken does not answer"), logging(tmp_path, 0, Broken()):
        pytest.fail("it was opened")


def test_off_writes_no_events(tmp_path):
    assert tracking.TensorBoard().events
    log = metrics.RunLog(tmp_path, 0, 9, quiet=True, events=tracking.Off().events)
    write(log, (1, "train"))
    log.rewind(0)
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_flags_choose_a_tracker():
    got = parse(TrainConfig(), "w", ["--tracking", "mlflow", "--tracking.uri", "http://h:5000"])
    assert got.config.tracking == flax_resnet.MLflow(uri="http://h:5000")
    got = parse(TrainConfig(), "w", ["--tracking=wandb", "--tracking.mode", "offline"])
    assert got.config.tracking == flax_resnet.Wandb(mode="offline")
    assert parse(TrainConfig(), "w", ["--tracking", "off"]).config.tracking == tracking.Off()
    got = parse(TrainConfig(tracking=Mine()), "w", ["--tracking.key", "b"])
    assert got.config.tracking == Mine("b")
    with pytest.raises(UserError, match="did you mean 'mlflow'"):
        parse(TrainConfig(), "w", ["--tracking", "mlfow"])


def test_a_resumed_run_may_change_its_tracker():
    there = to_record(TrainConfig(tracking=tracking.MLflow("http://h:1", run_name="x")))
    assert from_record(there).tracking == tracking.MLflow("http://h:1", run_name="x")
    for chosen in (tracking.TensorBoard(), tracking.Wandb(), Mine("b")):
        assert differences(there, TrainConfig(tracking=chosen)) == []
    del there["tracking"]  # as of a run begun before there was the field
    assert differences(there, TrainConfig(tracking=Mine())) == []
    with pytest.raises(UserError, match=r"tracking='mlflow': expected TensorBoard\(\)"):
        TrainConfig(tracking="mlflow")


def test_a_run_is_read_where_its_tracker_is_not_known(tmp_path):
    write_record(tmp_path, TrainConfig(seed=5, tracking=Mine()))
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace("test_tracking:Mine", "elsewhere:Mine"))
    assert read_record(tmp_path)[0] == TrainConfig(seed=5)


@pytest.mark.parametrize(
    "uri",
    ["http://ann:hunter2@h:5000", "https://hunter2@h", "postgresql://u:hunter2@db/m", "http://a:hun"
     "ter2@@h"],
)  # fmt: skip
def test_a_password_is_refused_and_not_repeated(uri, capfd):
    with pytest.raises(UserError, match="set MLFLOW_TRACKING_USERNAME") as refused:
        tracking.MLflow(uri=uri)
    assert "hunter2" not in str(refused.value)
    experiment = types.SimpleNamespace(get_config=lambda: TrainConfig())
    line = line_of_bad_input(
        lambda argv: main.main(experiment.get_config, "w", argv),
        ["--tracking", "mlflow", "--tracking.uri", uri],
        capfd,
    )
    assert "hunter2" not in line


def test_a_password_of_the_environment_is_not_shown(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ann:hunter2@127.0.0.1:1")
    assert tracking.MLflow().where == "MLflow http://***@127.0.0.1:1, experiment flax_resnet"
    assert base.masked("a http://u:p@h/x b sqlite:///y@z") == "a http://***@h/x b sqlite:///y@z"


@pytest.mark.parametrize("name", ["MLflow", "Wandb"])
def test_a_package_that_is_missing_is_named(name, monkeypatch):
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda package: None)
    chosen = getattr(flax_resnet, name)()
    with pytest.raises(UserError, match=rf"pip install 'flax_resnet\[{name.lower()}\]'"):
        tracking.check(chosen)


def test_neither_is_imported_unless_it_is_chosen():
    code = (
        "import sys, experiments.digits, flax_resnet.main as main\n"
        "try: main.main(experiments.digits.get_config, 'w', ['--help'])\n"
        "except SystemExit: pass\n"
        "print({'mlflow', 'wandb', 'requests'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE.parent
    )
    assert done.stderr.splitlines()[-1] == "set()"
    assert "--tracking tensorboard|mlflow|wandb|off" in done.stdout


def test_names_and_values_that_mlflow_does_not_take():
    assert to_mlflow._key("train/a b.c-d:e_é%") == "train/a b.c-d:e_é_"
    found = to_mlflow._missing({"a": "x" * 7000, "b": (1, 2), "c": None}, {"c": "None"})
    assert {name: len(value) for name, value in found.items()} == {"a": 6000, "b": 6}
    assert found["b"] == "(1, 2)"


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


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


def tracked(config, chosen):
    return dataclasses.replace(config, tracking=chosen)


@pytest.fixture(scope="module")
def untracked(config, tmp_path_factory):
    """The workdir of the same run without a tracker."""
    workdir = tmp_path_factory.mktemp("untracked") / "w"
    train_and_evaluate(config, workdir, mesh=data_mesh(jax.devices()[:1]), quiet=True)
    return workdir


def assert_same_run(workdir, other):
    """Equal to the last bit, but for what the clock says."""
    assert_trees_equal(saved(workdir)[0], saved(other)[0])
    read = metrics.read_metrics
    assert timeless(read(workdir)) == timeless(read(other))


def train_with_a_stop(config, workdir, mesh):
    """Trains, is stopped after eight steps, which are saved, and goes on."""
    times = iter(range(100))
    with pytest.raises(Preempted):
        train_and_evaluate(config, workdir, mesh=mesh, quiet=True, stop=lambda: next(times) >= 8)
    return train_and_evaluate(config, workdir, mesh=mesh, quiet=True)


def test_a_tracker_of_ones_own_follows_a_run_that_is_stopped(config, tmp_path, mesh):
    result = train_with_a_stop(tracked(config, Mine()), tmp_path / "w", mesh)
    run = only()
    assert records(run) == metrics.read_metrics(tmp_path / "w")
    assert [end.status for end in run.ends] == ["KILLED", "FINISHED"]
    assert run.ends[1].result == result
    assert [path.name for path in run.ends[1].files] == [
        "config.json", "result.json", "curves.png", "confusion.png"
    ]  # fmt: skip
    assert run.about[0].params["num_steps"] == 12


def test_nobody_at_the_address_is_one_line_and_nothing_is_written(config, tmp_path):
    pytest.importorskip("mlflow")
    chosen = tracking.MLflow(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match=r"cannot be used \(ConnectionRefusedError.*leave --track"):
        train_and_evaluate(tracked(config, chosen), tmp_path / "w")
    assert list(tmp_path.iterdir()) == []


def test_wandb_without_a_key_is_bad_input(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name in ("API_KEY", "MODE", "IDENTITY_TOKEN_FILE", "BASE_URL"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    with pytest.raises(UserError, match=r"W&B t/p: no key for https://api.wandb.ai: run `wandb"):
        tracking.check(tracking.Wandb(project="p", entity="t"))
    tracking.check(tracking.Wandb(mode="offline"))
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listening.getsockname()[1]}")
        tracking.check(tracking.Wandb())
    with pytest.raises(UserError, match=r"W&B flax_resnet cannot be used \(ConnectionRefused"):
        tracking.check(tracking.Wandb())
    with pytest.raises(UserError, match="mode='offlin'"):
        tracking.Wandb(mode="offlin")


@pytest.mark.slow
def test_wandb_offline_has_every_line_once(config, untracked, tmp_path, mesh):
    pytest.importorskip("wandb")
    chosen = tracking.Wandb(project="p", mode="offline")
    workdir = tmp_path / "w"
    result = train_with_a_stop(tracked(config, chosen), workdir, mesh)
    found = read_runs(workdir / "wandb")
    rows = found["rows"]
    (run_id,) = {one[0] for one in found["ids"]}
    assert {one[1:] for one in found["ids"]} == {("", "w")}
    assert run_id == json.loads((workdir / "tracking.json").read_text())["W&B p"]["run_id"]
    lines = [row for row in rows if "train/loss" in row or "eval/loss" in row]
    got = [{k: v for k, v in row.items() if not k.startswith("_")} for row in lines]
    want = [
        {f"{r['split']}/{k}": v for k, v in r.items() if k not in ("step", "split")}
        | {"step": r["step"]}
        for r in metrics.read_metrics(workdir)
    ]
    assert got == want
    assert sum("curves/path" in row for row in rows) == 1
    assert found["config"]["optimizer.learning_rate"] == config.optimizer.learning_rate
    assert found["config"]["run.devices"] == "8 x cpu"
    assert found["summary"]["result/top1"] == result["top1"]
    assert found["codes"] == [75, 0]
    assert_same_run(workdir, untracked)
    assert to_wandb.STOPPED_STATUS == {"FINISHED": 0, "FAILED": 1, "KILLED": 75}


class Server:
    """MLflow's own server, with a database and a store of this directory."""

    def __init__(self, place):
        self.place, self.port = place, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self):
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1",
            "--port", str(self.port), "--backend-store-uri", f"sqlite:///{self.place}/runs.db",
            "--artifacts-destination", str(self.place / "artifacts"),
        ]  # fmt: skip
        environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
        with (self.place / "log").open("a") as log:
            self.process = subprocess.Popen(
                command, cwd=self.place, env=environment, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.uri}/health", timeout=1).close()
                return
            assert self.process.poll() is None, (self.place / "log").read_text()[-2000:]
            time.sleep(0.2)
        pytest.fail("the server did not start: " + (self.place / "log").read_text()[-2000:])

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pytest.importorskip("mlflow")
    server = Server(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.kill()


def there(server, experiment):
    """(the client, the runs of an experiment)."""
    from mlflow import MlflowClient

    client = MlflowClient(server.uri)
    found = client.get_experiment_by_name(experiment)
    return client, client.search_runs([found.experiment_id])


def histories(client, run):
    """{name: [(step, value), ...]} of every metric of the run's lines."""
    names = [name for name in run.data.metrics if not name.startswith("result/")]
    found = {name: client.get_metric_history(run.info.run_id, name) for name in names}
    return {name: sorted((m.step, m.value) for m in values) for name, values in found.items()}


def in_file(workdir):
    """The same of metrics.jsonl."""
    found = {}
    for record in metrics.read_metrics(workdir):
        for name, value in record.items():
            if name not in ("step", "split"):
                found.setdefault(f"{record['split']}/{name}", []).append((record["step"], value))
    return found


@pytest.mark.slow
def test_an_mlflow_server_has_a_run_that_was_stopped_as_one_with_every_line_once(
    config, untracked, server, tmp_path, mesh
):
    chosen = tracking.MLflow(server.uri, "stopped", run_name="trial")
    workdir, times = tmp_path / "w", iter(range(100))
    config = tracked(config, chosen)
    with pytest.raises(Preempted):
        train_and_evaluate(config, workdir, mesh=mesh, stop=lambda: next(times) >= 8)
    _, (run,) = there(server, "stopped")
    assert run.info.status == "KILLED"
    result = train_and_evaluate(config, workdir, mesh=mesh)
    client, (run,) = there(server, "stopped")
    assert histories(client, run) == in_file(workdir)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "trial")
    flat = flax_resnet.record.flatten(to_record(config))
    assert run.data.params == {name: str(value) for name, value in flat.items()}
    assert run.data.tags["starts"] == "2"
    assert run.data.tags["devices"] == "8 x cpu"
    assert {k: v for k, v in run.data.metrics.items() if k.startswith("result/")} == {
        f"result/{name}": value for name, value in result.items()
    }
    assert sorted(file.path for file in client.list_artifacts(run.info.run_id)) == [
        "config.json", "confusion.png", "curves.png", "result.json"
    ]  # fmt: skip
    got = pathlib.Path(client.download_artifacts(run.info.run_id, "curves.png", str(tmp_path)))
    assert got.read_bytes() == (workdir / "curves.png").read_bytes()
    assert_same_run(workdir, untracked)


COMMAND = """
import sys, time
from flax_resnet import main, metrics
sys.path.insert(0, {here!r})
import jax
from test_tracking import *
jax.config.update("jax_num_cpu_devices", 1)
write = metrics.RunLog.write
def slowly(self, *args):
    write(self, *args)
    time.sleep({pause})
metrics.RunLog.write = slowly
def get_config():
    return TrainConfig(
        model=tiny_resnet(), data=DataConfig(data_dir={data!r}), optimizer=Adam(), batch_size=360,
        eval_batch_size=200, num_steps=40, log_every_steps=1, checkpoint=CheckpointConfig(
        every_steps=10), tracking=tracking.MLflow({uri!r}, "killed"))
main.main(get_config, {workdir!r}, [])
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_is_killed_goes_on_as_the_same_run(
    server, tmp_path, digits_dir, clean_environment, how
):
    workdir = tmp_path / f"{how.name}"

    def start(pause):
        code = COMMAND.format(
            here=str(HERE), data=digits_dir, uri=server.uri, workdir=str(workdir), pause=pause
        )
        path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
        environment = clean_environment | QUICK | {"PYTHONPATH": path}
        environment["MLFLOW_DISABLE_TELEMETRY"] = "true"
        return subprocess.Popen(
            [sys.executable, "-c", code], env=environment, cwd=HERE.parent,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    process = start(0.3)
    until = time.monotonic() + 120
    while len(metrics.read_metrics(workdir)) < 15:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(how)
    began = time.monotonic()
    process.communicate(timeout=60)
    if how is signal.SIGTERM:
        assert process.returncode == 75
        assert time.monotonic() - began < 20
    again = start(0.0)
    _, err = again.communicate(timeout=200)
    assert again.returncode == 0, err
    client, runs = there(server, "killed")
    (run,) = [run for run in runs if run.info.run_name == workdir.name]
    assert run.info.status == "FINISHED"
    got, want = histories(client, run), in_file(workdir)
    steps = {name: [step for step, _ in values] for name, values in want.items()}
    assert {name: [step for step, _ in values] for name, values in got.items()} == steps
    assert steps["train/loss"] == list(range(1, 41))
    for name in ("train/loss", "train/top1", "train/learning_rate", "eval/loss", "train/epoch"):
        assert got[name] == want[name]


@pytest.mark.slow
def test_a_server_that_dies_in_the_middle_changes_no_bit_and_no_exit(
    config, untracked, tmp_path_factory, tmp_path, mesh, monkeypatch, capfd
):
    pytest.importorskip("mlflow")
    monkeypatch.setattr(follower, "FINISHED_SECONDS", 5)
    mortal = Server(tmp_path_factory.mktemp("mortal"))
    mortal.start()
    asked = iter(range(100))

    def kill_at_the_eighth_step():
        if next(asked) == 8:
            mortal.kill()
        return False

    try:
        result = train_and_evaluate(
            tracked(config, tracking.MLflow(mortal.uri, "dies")), tmp_path / "w", mesh=mesh,
            quiet=True, stop=kill_at_the_eighth_step,
        )  # fmt: skip
    finally:
        mortal.kill()
    *first, last = capfd.readouterr().err.splitlines()
    # None where its end comes before MLflow's own client has given up the request under way.
    assert first == [] or "does not take the metrics (Connection" in first[0]
    assert re.search(r"experiment dies did not get (the last \d of 9 lines and )?the end", last)
    assert result["step"] == 12
    assert_same_run(tmp_path / "w", untracked)


@pytest.mark.slow
def test_seeds_that_train_together_are_a_run_each_of_one_group(config, server, tmp_path):
    config = tracked(config, tracking.MLflow(server.uri, "together"))
    root = tmp_path / "both"
    flax_resnet.train_seeds(config, root, 2, together=True)
    client, runs = there(server, "together")
    assert sorted(run.info.run_name for run in runs) == ["both/seed0", "both/seed1"]
    assert {run.data.tags["group"] for run in runs} == {str(root)}
    for run in runs:
        own = root / run.info.run_name.partition("/")[2]
        assert histories(client, run) == in_file(own)
        assert run.info.status == "FINISHED"
