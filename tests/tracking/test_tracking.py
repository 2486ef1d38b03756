"""Trackers: one in memory, MLflow's own server, W&B's offline files, and servers that are down."""

import contextlib
import dataclasses
import sys
import threading

import jax
import pytest
from helpers import wait_for

import flax_resnet
from flax_resnet import tracking
from flax_resnet.cli.flags import parse
from flax_resnet.distributed.preemption import Preempted
from flax_resnet.errors import UserError
from flax_resnet.records.configs import from_record, to_record
from flax_resnet.records.run_dir import read_config, read_metrics
from flax_resnet.tracking import follower, to_wandb
from flax_resnet.tracking.run_log import RunLog
from flax_resnet.training.config import TrainConfig
from flax_resnet.training.workdir import differences, write_record

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
    (tmp_path / "config.json").write_text(text.replace(f"{__name__}:Mine", "elsewhere:Mine"))
    assert read_config(tmp_path) == TrainConfig(seed=5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tracking.MLflow("http://ann:hunter2@h:5000"), r"uri=.*\*\*\*.*: set MLFLOW_TR"),
        (lambda: tracking.MLflow("postgresql://u:hunter2@db/m"), r"uri=.*\*\*\*.*: set MLFLOW_TR"),
        (lambda: tracking.Wandb(mode="offlin"), "mode='offlin'"),
        (lambda: tracking.Wandb("p", "t").check(), "W&B t/p: no key for https://api.wandb.ai"),
        (lambda: TrainConfig(tracking="mlflow"), r"tracking='mlflow': expected TensorBoard or"),
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
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ann:hunter2@127.0.0.1:1")
    assert tracking.MLflow().where == "MLflow http://***@127.0.0.1:1, experiment flax_resnet"


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
