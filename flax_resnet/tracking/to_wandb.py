"""Runs of Weights & Biases, online or in files that are uploaded later."""

from __future__ import annotations

import dataclasses
import os
import uuid
from collections.abc import Sequence
from typing import Any, Literal

from flax_resnet.errors import UserError, check_choices
from flax_resnet.tracking.base import About, End, Line, Tracker, Tracking, check_installed, reach
from flax_resnet.tracking.follower import OPEN_SECONDS

PICTURES = (".png",)
FINISH_SECONDS = 20.0
"""That W&B's own process may take to upload the rest, when Python ends too."""
STOPPED_STATUS = {"FINISHED": 0, "FAILED": 1, "KILLED": 75}


@dataclasses.dataclass(frozen=True)
class Wandb(Tracking):
    """Weights & Biases; needs the [wandb] extra."""

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
        check_choices(self)
        if not self.project:
            raise UserError("tracking.project='': expected a name")

    @property
    def where(self) -> str:
        """The team and the project."""
        return "W&B " + "/".join(name for name in (self.entity, self.project) if name)

    def check(self) -> None:
        """Looks for the key, which W&B would ask for, and for the server.

        Raises:
          UserError: W&B is not installed, or has no key.
          OSError: nobody listens at its address.
        """
        check_installed("wandb")
        if (self.mode or os.environ.get("WANDB_MODE", "online")) != "online":
            return
        from requests.utils import get_netrc_auth

        host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
        known = any(os.environ.get(f"WANDB_{n}") for n in ("API_KEY", "IDENTITY_TOKEN_FILE"))
        if not (known or get_netrc_auth(host)):
            raise UserError(
                f"{self.where}: no key for {host}: run `wandb login`, set WANDB_API_KEY in the "
                "environment, or take --tracking.mode offline"
            )
        reach(host)  # W&B itself tries for a minute

    def open(self, about: About) -> Tracker:
        """Makes the run, or goes on with it."""
        return _Run(self, about)


class _Run(Tracker):
    def __init__(self, config: Wandb, about: About):
        import wandb

        settings: dict[str, Any] = {
            "silent": True,
            "console": "off",
            "init_timeout": OPEN_SECONDS - 5,
            "finish_timeout": FINISH_SECONDS,
            "reinit": "create_new",  # several seeds, and runs of the user's own
        }
        known = wandb.Settings.model_fields
        self._wandb = wandb
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
            allow_val_change=True,  # what a resumed run may change
            settings=wandb.Settings(**{k: v for k, v in settings.items() if k in known}),
        )
        self._run.define_metric("step")  # not W&B's own, which cannot go back
        self._run.define_metric("*", step_metric="step")
        self.address = "" if self._run.offline else self._run.url or ""

    def write(self, lines: Sequence[Line]) -> None:
        """Hands them to W&B's own process, which sends or keeps them."""
        for line in lines:
            self._run.log({**line.named, "step": line.step})

    def rewind(self, step: int) -> None:
        """What was there of later steps stays, and the new values stand beside it."""
        self._run.summary["went_back_to"] = step

    def close(self, end: End) -> None:
        """Result, pictures, other files and the status."""
        self._run.summary.update({f"result/{name}": v for name, v in end.result.items()})
        for path in end.files:
            if path.suffix in PICTURES:
                self._run.log({path.stem: self._wandb.Image(str(path)), "step": end.step})
        if end.status == "KILLED":
            self._run.mark_preempting()
        self._run.finish(exit_code=STOPPED_STATUS[end.status])
