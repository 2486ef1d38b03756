"""Residual networks in JAX and Flax: the families, their training and their study."""

from flax_resnet.augment import Augment as Augment
from flax_resnet.checkpoint import CheckpointConfig as CheckpointConfig
from flax_resnet.checkpoint import Checkpoints as Checkpoints
from flax_resnet.config import TrainConfig as TrainConfig
from flax_resnet.data import Data as Data
from flax_resnet.data import DataConfig as DataConfig
from flax_resnet.distributed import data_mesh as data_mesh
from flax_resnet.errors import UserError as UserError
from flax_resnet.models import BasicBlock as BasicBlock
from flax_resnet.models import MiniModel as MiniModel
from flax_resnet.models import ResidualUnit as ResidualUnit
from flax_resnet.models import ResNet as ResNet
from flax_resnet.models import cifar_resnet as cifar_resnet
from flax_resnet.optim import LAMB as LAMB
from flax_resnet.optim import LARS as LARS
from flax_resnet.optim import SGD as SGD
from flax_resnet.optim import Adam as Adam
from flax_resnet.optim import AdamW as AdamW
from flax_resnet.optim import Constant as Constant
from flax_resnet.optim import Cosine as Cosine
from flax_resnet.optim import OneCycle as OneCycle
from flax_resnet.optim import Piecewise as Piecewise
from flax_resnet.optim import ReduceOnPlateau as ReduceOnPlateau
from flax_resnet.optim import linear_scaled_lr as linear_scaled_lr
from flax_resnet.step import TrainState as TrainState
from flax_resnet.step import create_state as create_state
from flax_resnet.step import eval_step as eval_step
from flax_resnet.step import train_step as train_step
from flax_resnet.train import train_and_evaluate as train_and_evaluate

__version__ = "0.1.0"
