"""Runs on an MLflow server, or in a place of this machine that MLflow reads."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from flax_resnet.errors import UserError
from flax_resnet.tracking.base import (
    About,
    End,
    Line,
    Place,
    Tracker,
    Tracking,
    check_installed,
    masked,
    reach,
)

SENT = "flax_resnet.sent"
"""The tag that says which line came last: it is set in the request that brings the line."""
LONGEST_PARAM, LONGEST_TAG = 6000, 5000
MOST_AT_ONCE, MOST_PARAMS = 900, 100


@dataclasses.dataclass(frozen=True)
class MLflow(Tracking):
    """An MLflow server; needs the [mlflow] extra."""

    uri: str | None = None
    """Address, such as http://127.0.0.1:5000; None: $MLFLOW_TRACKING_URI, or else MLflow's own
    default. User and password: $MLFLOW_TRACKING_USERNAME and $MLFLOW_TRACKING_PASSWORD."""
    experiment: str = "flax_resnet"
    """The experiment; it is made where there is none of that name."""
    run_name: str | None = None
    """What the run is called; None: as its workdir."""

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.uri or "")
            secret = parts.username is not None or parts.password is not None
            _ = parts.port
        except ValueError as error:
            raise UserError(
                f"tracking.uri={masked(self.uri or '')!r} is no address ({error}): expected one "
                "such as http://127.0.0.1:5000"
            ) from None
        shown = masked(self.uri or "")
        if secret or shown != (self.uri or ""):
            raise UserError(
                f"tracking.uri={shown}: user and password would be in config.json: "
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment, or "
                "the whole address as MLFLOW_TRACKING_URI"
            )
        if not self.experiment:
            raise UserError("tracking.experiment='': expected a name")

    @property
    def _address(self) -> str | None:
        return self.uri or os.environ.get("MLFLOW_TRACKING_URI") or None

    @property
    def where(self) -> str:
        """The server and the experiment."""
        return f"MLflow {masked(self._address or 'here')}, experiment {self.experiment}"

    def check(self) -> None:
        """Asks the server for the experiment.

        Raises:
          UserError: MLflow is not installed, or the experiment was deleted.
        """
        check_installed("mlflow")
        reach(self._address)
        found = self._client().get_experiment_by_name(self.experiment)
        if found is not None and found.lifecycle_stage == "deleted":
            raise UserError(
                f"tracking.experiment={self.experiment!r} was deleted there: restore it (mlflow "
                f"experiments restore -x {found.experiment_id}), or give another"
            )

    def _client(self) -> Any:
        from mlflow import MlflowClient

        # Its lines with addresses go to stdout, whatever is run; the run's start says it.
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        logging.getLogger("urllib3.connectionpool").addFilter(_not_ours)
        return MlflowClient(self._address)

    def open(self, about: About) -> Tracker:
        """Makes the run, or goes on with it where it is still there."""
        return _Run(self._client(), self, about, self._address)


class _Run(Tracker):
    def __init__(self, client: Any, config: MLflow, about: About, address: str | None):
        self._client, self._server = client, address
        run = self._earlier(about.run_id)
        tags = {**about.tags, **({"group": about.group} if about.group else {})}
        if commit := about.tags.get("git.commit"):
            tags["mlflow.source.git.commit"] = commit  # where its page looks for it
        if run is None:
            experiment = self._experiment(config.experiment)
            name = about.named(config.run_name)
            run = client.create_run(experiment, run_name=name)
        self.run_id = run.info.run_id
        client.update_run(self.run_id, status="RUNNING")
        said = run.data.tags.get(SENT, "").split()
        self.sent: Place | None = (int(said[0]), said[1]) if len(said) == 2 else None
        self._log(params=_missing(about.params, run.data.params), tags=tags)
        if address and address.startswith("http"):
            self.address = (
                f"{address.rstrip('/')}/#/experiments/{run.info.experiment_id}/runs/{self.run_id}"
            )

    def _earlier(self, run_id: str | None) -> Any:
        """The run of an earlier start; None where it is not there any more."""
        from mlflow.exceptions import MlflowException

        if run_id is None:
            return None
        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            with contextlib.suppress(MlflowException):  # another run has made it just now
                return str(self._client.create_experiment(name))
            found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id)

    def _log(
        self,
        metrics: Iterable[Any] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> None:
        from mlflow.entities import Param, RunTag

        for some in _chunks([Param(*pair) for pair in (params or {}).items()], MOST_PARAMS):
            self._client.log_batch(self.run_id, params=some)
        found = list(_chunks(list(metrics), MOST_AT_ONCE))
        for some in found[:-1]:
            self._client.log_batch(self.run_id, metrics=some)
        own = [RunTag(_key(k), str(v)[:LONGEST_TAG]) for k, v in (tags or {}).items()]
        self._client.log_batch(self.run_id, metrics=found[-1] if found else (), tags=own)

    def write(self, lines: Sequence[Line]) -> None:
        """In one request, as a rule."""
        from mlflow.entities import Metric

        reach(self._server)  # MLflow itself tries for minutes where nobody listens
        found = [
            Metric(_key(name), float(value), round(1000 * line.time), line.step)
            for line in lines
            for name, value in line.named.items()
        ]
        step, split = lines[-1].place
        self._log(found, tags={SENT: f"{step} {split}"})

    def rewind(self, step: int) -> None:
        """What was there of later steps stays, and the new values stand beside it."""
        reach(self._server)
        self._log(tags={SENT: f"{step} eval", "flax_resnet.went_back_to": step})

    def close(self, end: End) -> None:
        """Result, files and status."""
        from mlflow.entities import Metric

        reach(self._server)
        now = round(1000 * time.time())
        numbers = {
            f"result/{name}": float(value)
            for name, value in end.result.items()
            if isinstance(value, (int, float))
        }
        try:
            self._log([Metric(_key(n), v, now, end.step) for n, v in numbers.items()])
            for path in end.files:
                self._client.log_artifact(self.run_id, str(path))
        finally:  # the files' store may want credentials that nobody gave
            self._client.set_terminated(self.run_id, end.status)


def _not_ours(record: logging.LogRecord) -> bool:
    """Keeps from stderr each retry of a request of ours: one line warns of them all."""
    return " MLflow " not in (record.threadName or "")


def _missing(params: Mapping[str, Any], there: Mapping[str, str]) -> dict[str, str]:
    """Those that the run does not have: MLflow takes a param once."""
    found = {_key(name): str(value) for name, value in params.items()}
    return {
        name: value if len(value) <= LONGEST_PARAM else value[: LONGEST_PARAM - 3] + "..."
        for name, value in found.items()
        if name not in there
    }


def _key(name: str) -> str:
    """A name of the letters that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))
