"""The networks. Each is a flax linen module called as ``module.apply(variables, x, train=...)``."""

from flax_resnet.models.mini import MiniModel as MiniModel
from flax_resnet.models.mini import ResidualUnit as ResidualUnit
from flax_resnet.models.resnet import BasicBlock as BasicBlock
from flax_resnet.models.resnet import ResNet as ResNet
from flax_resnet.models.resnet import cifar_resnet as cifar_resnet
