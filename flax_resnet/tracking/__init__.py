"""Experiment tracking: a run's config, metrics, figures and end, for TensorBoard or a server.

``TrainConfig.tracking`` is TensorBoard(), MLflow(), Wandb() or Off(), or a Tracking of your own.
"""

from flax_resnet.tracking.base import About as About
from flax_resnet.tracking.base import End as End
from flax_resnet.tracking.base import Line as Line
from flax_resnet.tracking.base import Off as Off
from flax_resnet.tracking.base import TensorBoard as TensorBoard
from flax_resnet.tracking.base import Tracker as Tracker
from flax_resnet.tracking.base import Tracking as Tracking
from flax_resnet.tracking.follower import Follower as Follower
from flax_resnet.tracking.follower import following as following
from flax_resnet.tracking.to_mlflow import MLflow as MLflow
from flax_resnet.tracking.to_wandb import Wandb as Wandb

AnyTracking = TensorBoard | MLflow | Wandb | Off | Tracking
"""The classes that a flag can choose, and a user's own."""
