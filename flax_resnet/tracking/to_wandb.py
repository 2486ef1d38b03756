"""Runs of Weights & Biases, online or in files that are uploaded later."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import uuid
from collections.abc import Sequence
from typing import ClassVar, Literal
from urllib.error import HTTPError
from urllib.request import urlopen

from flax_resnet.errors import UserError, check_types
from flax_resnet.tracking.base import About, End, Line, Tracker, Tracking

REACH_SECONDS, OPEN_SECONDS, FINISH_SECONDS = 5.0, 20.0, 8.0
"""Limits of the server's first answer, of wandb.init, and of the uploads at the end of a run."""


@dataclasses.dataclass(frozen=True)
class Wandb(Tracking):
    """Weights & Biases; needs the [wandb] extra."""

    package: ClassVar[str] = "wandb"
    project: str = "flax_resnet"
    """The project."""
    entity: str | None = None
    """The user or team it belongs to; None: the account's own."""
    run_name: str | None = None
    """What the run is called; None: as its workdir."""
    mode: Literal["online", "offline"] | None = None
    """"offline" writes WORKDIR/wandb, which `wandb sync` uploads; None: $WANDB_MODE, else online.
    The key is $WANDB_API_KEY, or what `wandb login` has left."""

    def __post_init__(self) -> None:
        check_types(self, "tracking.")

    @property
    def where(self) -> str:
        """The team and the project."""
        return "W&B " + "/".join(name for name in (self.entity, self.project) if name)

    @property
    def _host(self) -> str:
        """The server's address; "" if nothing is sent."""
        is_online = (self.mode or os.environ.get("WANDB_MODE", "online")) == "online"
        return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai") if is_online else ""

    def check(self) -> None:
        """Raises UserError if W&B is not installed, or has no key, for which it would ask."""
        super().check()
        from requests.utils import get_netrc_auth

        known = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")
        if (host := self._host) and not (known or get_netrc_auth(host)):
            raise UserError(
                f"{self.where}: no key for {host}: run `wandb login`, set WANDB_API_KEY in the "
                "environment, or take --tracking.mode offline"
            )

    def open(self, about: About) -> Tracker:
        """Makes the run, or resumes it, if the server answers at all."""
        if host := self._host:
            with contextlib.suppress(HTTPError):  # an error is an answer too
                urlopen(host, timeout=REACH_SECONDS).close()
        return _Run(self, about)


class _Run(Tracker):
    def __init__(self, config: Wandb, about: About):
        import wandb

        self.run_id = about.run_id or uuid.uuid4().hex[:12]
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            name=about.named(config.run_name),
            group=about.group,
            id=self.run_id,
            resume="allow",
            mode=config.mode,
            dir=str(about.workdir),
            config={**about.params, **{f"run.{name}": v for name, v in about.tags.items()}},
            allow_val_change=True,  # a resumed run may change some fields
            reinit="create_new",  # several seeds, and runs of the user's own
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=OPEN_SECONDS,
                finish_timeout=FINISH_SECONDS,
            ),
        )
        self._run.define_metric("step")  # W&B's own step cannot go back
        self._run.define_metric("*", step_metric="step")
        self.address = "" if self._run.offline else self._run.url or ""

    def write(self, lines: Sequence[Line]) -> None:
        """Hands the lines to W&B's own process, which sends or keeps them."""
        for line in lines:
            self._run.log({**line.named, "step": line.step})

    def close(self, end: End) -> None:
        """Sends the result, the figures and the status."""
        import wandb

        self._run.summary.update({f"result/{name}": v for name, v in end.result.items()})
        for path in end.files:
            if path.suffix == ".png":
                self._run.log({path.stem: wandb.Image(str(path)), "step": end.step})
        if end.status == "KILLED":
            self._run.mark_preempting()
        self._run.finish(exit_code=int(end.status != "FINISHED"))
