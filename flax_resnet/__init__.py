"""Residual networks in JAX and Flax: the families, their training and their study.

Networks
  create              The network called ``name``, with any of its fields set.
  names               The names that ``create`` and ``load`` know.
  initialize          Fresh variables of a network.
  summarize           A network's layers, parameters and multiply-adds, without computing any of it.
  ResNet              The residual network: stem, stages of ``block_cls``, global average, head.
  imagenet_resnet     ResNet-18 to 200 (He et al. 2016).
  keras_resnet        The ResNets of keras.applications, V1 and V2, with their arguments.
  cifar_resnet        ResNet-20 to 1202 for small images (He et al. 2016, section 4.2).
  cifar_preact        ResNet-110, 164 and 1001 with pre-activation (He et al. 2016b).
  wide_resnet         Wide ResNets for small images (Zagoruyko and Komodakis 2016).
  highway_net         Highway networks for small images (Srivastava et al. 2015).
  MiniModel           The CIFAR-10 tutorial's pre-activated network.
  DropBlockResNet     The CIFAR-100 tutorial's network.

Blocks and layers
  Block, ConvSpec     Base class of blocks, and one convolution of a block's branch.
  BasicBlock, BottleneckBlock, PreActBasicBlock, PreActBottleneckBlock
                      The blocks of He et al. 2016 and 2016b.
  ResidualUnit, HighwayLayer
                      The units of MiniModel and of highway networks.
  DropBlock, drop_block, drop_path
                      DropBlock and stochastic depth.
  Feature             The map of one stage, as ``module.apply(..., method="features")`` gives it.
  replace_head, trainable, stack_blocks, unstack_blocks
                      A new head; which parameters train; blocks as a scan and one by one.

Weights
  load                A network and its variables: fresh, published, from a file, or from a run.
  open_weights        The same with preprocessing and class names.
  tags                The tags of a network's published weights.
  read_weights, write_weights
                      Weight files of torch, Keras and safetensors.
  Preprocessing, preprocessing
                      How images are prepared for weights.
  predict_images      The best classes of image files, one by one.
  export              Writes a network for StableHLO, ONNX or torch.
  push_to_hub, pull_from_hub
                      Weights and a model card on the Hugging Face hub.
  WeightsError        Weights that do not fit a network.

Training
  train_and_evaluate  Trains, evaluates and records a run; resumes the one in its directory.
  TrainConfig         Everything that decides a run's numbers.
  recipes             First configs for digits, a tfds set or a folder of images.
  DataConfig, Data    Which images; their splits as batches on a mesh.
  Augment             Random changes to training batches.
  SGD, Adam, AdamW, LARS, LAMB, Muon
                      Optimizers.
  Constant, Cosine, OneCycle, Piecewise, ReduceOnPlateau
                      Learning-rate schedules.
  linear_scaled_lr, decoupled
                      Learning rates by batch size, and as airbench states them.
  CheckpointConfig, Checkpoints
                      When and where to save; the checkpoints of one run.
  Guard               What counts as a run that goes wrong.
  Tracking, Tracker, TensorBoard, MLflow, Wandb
                      Where metrics go besides metrics.jsonl.
  TrainState, create_state, train_step, eval_step
                      The state and the two pure steps, for a loop of your own.
  data_mesh           The devices that a batch is split over.
  Hosts, joined       Several processes as one run.
  Preempted           Raised when a run was stopped from outside, after it has saved.
  UserError           Bad input: one line that says what to do.

Studies
  grid, replaced      Configs that differ in some fields.
  sweep, train_seeds  Trains them, and writes their table.
"""

from flax_resnet.checkpoints.checkpoints import CheckpointConfig as CheckpointConfig
from flax_resnet.checkpoints.checkpoints import Checkpoints as Checkpoints
from flax_resnet.data.augment import Augment as Augment
from flax_resnet.data.batches import Data as Data
from flax_resnet.data.config import DataConfig as DataConfig
from flax_resnet.data.preprocess import Preprocessing as Preprocessing
from flax_resnet.distributed.hosts import Hosts as Hosts
from flax_resnet.distributed.hosts import joined as joined
from flax_resnet.distributed.preemption import Preempted as Preempted
from flax_resnet.distributed.sharding import data_mesh as data_mesh
from flax_resnet.errors import UserError as UserError
from flax_resnet.exporting import export as export
from flax_resnet.exporting.hub import pull_from_hub as pull_from_hub
from flax_resnet.exporting.hub import push_to_hub as push_to_hub
from flax_resnet.inference.prediction import predict_images as predict_images
from flax_resnet.models import BasicBlock as BasicBlock
from flax_resnet.models import Block as Block
from flax_resnet.models import BottleneckBlock as BottleneckBlock
from flax_resnet.models import ConvSpec as ConvSpec
from flax_resnet.models import DropBlockResNet as DropBlockResNet
from flax_resnet.models import Feature as Feature
from flax_resnet.models import HighwayLayer as HighwayLayer
from flax_resnet.models import MiniModel as MiniModel
from flax_resnet.models import PreActBasicBlock as PreActBasicBlock
from flax_resnet.models import PreActBottleneckBlock as PreActBottleneckBlock
from flax_resnet.models import ResidualUnit as ResidualUnit
from flax_resnet.models import ResNet as ResNet
from flax_resnet.models import WeightsError as WeightsError
from flax_resnet.models import cifar_preact as cifar_preact
from flax_resnet.models import cifar_resnet as cifar_resnet
from flax_resnet.models import create as create
from flax_resnet.models import highway_net as highway_net
from flax_resnet.models import imagenet_resnet as imagenet_resnet
from flax_resnet.models import initialize as initialize
from flax_resnet.models import keras_resnet as keras_resnet
from flax_resnet.models import names as names
from flax_resnet.models import replace_head as replace_head
from flax_resnet.models import stack_blocks as stack_blocks
from flax_resnet.models import trainable as trainable
from flax_resnet.models import unstack_blocks as unstack_blocks
from flax_resnet.models import wide_resnet as wide_resnet
from flax_resnet.models.regularize import DropBlock as DropBlock
from flax_resnet.models.regularize import drop_block as drop_block
from flax_resnet.models.regularize import drop_path as drop_path
from flax_resnet.models.summary import summarize as summarize
from flax_resnet.optim.optimizers import LAMB as LAMB
from flax_resnet.optim.optimizers import LARS as LARS
from flax_resnet.optim.optimizers import SGD as SGD
from flax_resnet.optim.optimizers import Adam as Adam
from flax_resnet.optim.optimizers import AdamW as AdamW
from flax_resnet.optim.optimizers import Constant as Constant
from flax_resnet.optim.optimizers import Cosine as Cosine
from flax_resnet.optim.optimizers import Muon as Muon
from flax_resnet.optim.optimizers import OneCycle as OneCycle
from flax_resnet.optim.optimizers import Piecewise as Piecewise
from flax_resnet.optim.optimizers import ReduceOnPlateau as ReduceOnPlateau
from flax_resnet.optim.optimizers import decoupled as decoupled
from flax_resnet.optim.optimizers import linear_scaled_lr as linear_scaled_lr
from flax_resnet.studies.grids import grid as grid
from flax_resnet.studies.grids import replaced as replaced
from flax_resnet.studies.sweeps import sweep as sweep
from flax_resnet.studies.sweeps import train_seeds as train_seeds
from flax_resnet.tracking import MLflow as MLflow
from flax_resnet.tracking import TensorBoard as TensorBoard
from flax_resnet.tracking import Tracker as Tracker
from flax_resnet.tracking import Tracking as Tracking
from flax_resnet.tracking import Wandb as Wandb
from flax_resnet.training import recipes as recipes
from flax_resnet.training.config import TrainConfig as TrainConfig
from flax_resnet.training.guards import Guard as Guard
from flax_resnet.training.loop import train_and_evaluate as train_and_evaluate
from flax_resnet.training.step import TrainState as TrainState
from flax_resnet.training.step import create_state as create_state
from flax_resnet.training.step import eval_step as eval_step
from flax_resnet.training.step import train_step as train_step
from flax_resnet.weights import load as load
from flax_resnet.weights import open_weights as open_weights
from flax_resnet.weights import preprocessing as preprocessing
from flax_resnet.weights import read_weights as read_weights
from flax_resnet.weights import tags as tags
from flax_resnet.weights import write_weights as write_weights

__version__ = "0.1.0"
