"""Runs on an MLflow server, or in a place of this machine that MLflow reads."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable, Sequence
from typing import ClassVar

from flax_resnet.errors import UserError, check_types
from flax_resnet.tracking.base import About, End, Line, Tracker, Tracking, masked

ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # a Follower tries again, and warns once
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""MLflow's settings where the environment has none."""


@dataclasses.dataclass(frozen=True)
class MLflow(Tracking):
    """An MLflow server; needs the [mlflow] extra."""

    package: ClassVar[str] = "mlflow"
    uri: str | None = None
    """Address, such as http://127.0.0.1:5000; None: $MLFLOW_TRACKING_URI, or else MLflow's own
    default. User and password: $MLFLOW_TRACKING_USERNAME and $MLFLOW_TRACKING_PASSWORD."""
    experiment: str = "flax_resnet"
    """The experiment; it is made where there is none of that name."""
    run_name: str | None = None
    """What the run is called; None: as its workdir."""

    def __post_init__(self) -> None:
        check_types(self, "tracking.")
        if self.uri is not None and (shown := masked(self.uri)) != self.uri:
            raise UserError(
                f"tracking.uri={shown}: user and password would be in config.json: set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
            )

    @property
    def address(self) -> str | None:
        """Address of the server, or None for the default of MLflow."""
        return self.uri or os.environ.get("MLFLOW_TRACKING_URI") or None

    @property
    def where(self) -> str:
        """The server and the experiment."""
        return f"MLflow {masked(self.address or 'here')}, experiment {self.experiment}"

    def open(self, about: About) -> Tracker:
        """Makes the run, or resumes it."""
        return _Run(self, about)


class _Run(Tracker):
    def __init__(self, config: MLflow, about: About):
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient
        from mlflow.entities import Param, RunTag

        self._client = client = MlflowClient(config.address)
        if about.run_id is None:
            experiment = client.get_experiment_by_name(config.experiment)
            number = experiment and experiment.experiment_id
            number = number or client.create_experiment(config.experiment)
            run = client.create_run(number, run_name=about.named(config.run_name))
        else:
            run = client.get_run(about.run_id)
            client.update_run(about.run_id, status="RUNNING")
        self.run_id = run.info.run_id
        known = run.data.params  # a param can be set once
        params = [Param(n, str(v)) for n, v in about.params.items() if n not in known]
        tags = dict(about.tags)
        if about.group:
            tags["group"] = about.group
        client.log_batch(self.run_id, params=params, tags=[RunTag(*tag) for tag in tags.items()])
        server = config.address or ""
        if server.startswith("http"):
            page = f"{server.rstrip('/')}/#/experiments/{run.info.experiment_id}"
            self.address = f"{page}/runs/{self.run_id}"

    def write(self, lines: Sequence[Line]) -> None:
        """Sends lines; MLflow keeps one that it gets twice only once."""
        self._log((n, v, line.step, line.time) for line in lines for n, v in line.named.items())

    def close(self, end: End) -> None:
        """Sends the result, the files and the status."""
        now = time.time()
        numbers = {n: v for n, v in end.result.items() if isinstance(v, (int, float))}
        try:
            self._log((f"result/{n}", v, end.step, now) for n, v in numbers.items())
            for path in end.files:
                self._client.log_artifact(self.run_id, str(path))
        finally:  # the store of files may want credentials that nobody gave
            self._client.set_terminated(self.run_id, end.status)

    def _log(self, values: Iterable[tuple[str, float, int, float]]) -> None:
        """Sends (name, value, step, time) of metrics."""
        from mlflow.entities import Metric

        metrics = [Metric(n, v, round(1000 * seconds), step) for n, v, step, seconds in values]
        self._client.log_batch(self.run_id, metrics=metrics)
