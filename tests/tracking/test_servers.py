"""The trackers' own servers and files: what they have of a run that was stopped and went on."""

import contextlib
import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
import urllib.request

import jax
import pytest
from helpers import QUICK, wait_for

from flax_resnet import tracking
from flax_resnet.distributed.preemption import Preempted
from flax_resnet.distributed.sharding import data_mesh
from flax_resnet.records.configs import flatten, to_record
from flax_resnet.records.run_dir import read_metrics
from flax_resnet.training.loop import train_and_evaluate

SUPPORT = pathlib.Path(__file__).parents[1] / "support"


def train_with_a_stop(config, workdir, chosen):
    """Trains with a tracker, is stopped after eight steps, and resumes."""
    config, times = dataclasses.replace(config, tracking=chosen), iter(range(100))
    mesh = data_mesh(jax.devices()[:1])
    with pytest.raises(Preempted):
        train_and_evaluate(config, workdir, mesh=mesh, quiet=True, stop=lambda: next(times) >= 8)
    return train_and_evaluate(config, workdir, mesh=mesh, quiet=True)


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
    numbers = {name: value for name, value in result.items() if not isinstance(value, str)}
    expected = {(f"result/{name}", 12, value) for name, value in numbers.items()}
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
            "PYTHONPATH": os.pathsep.join([str(SUPPORT), str(SUPPORT.parents[1])]),
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
