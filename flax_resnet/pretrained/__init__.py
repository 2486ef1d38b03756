"""Weights from elsewhere and to elsewhere: fetched, read, written."""

from flax_resnet.pretrained.load import check_same as check_same
from flax_resnet.pretrained.load import is_path as is_path
from flax_resnet.pretrained.load import load as load
from flax_resnet.pretrained.load import open_weights as open_weights
from flax_resnet.pretrained.load import preprocessing as preprocessing
from flax_resnet.pretrained.published import tags as tags
from flax_resnet.pretrained.weights import Pretrained as Pretrained
from flax_resnet.pretrained.weights import image_shape as image_shape
from flax_resnet.pretrained.weights import read_weights as read_weights
from flax_resnet.pretrained.weights import write_weights as write_weights
