"""The name under which model cards of earlier versions import ``open_weights``."""

from flax_resnet.weights import open_weights as open_weights
