"""Weights from elsewhere and to elsewhere: fetched, read, written."""

from flax_resnet.weights.loading import check_same as check_same
from flax_resnet.weights.loading import is_path as is_path
from flax_resnet.weights.loading import load as load
from flax_resnet.weights.loading import open_weights as open_weights
from flax_resnet.weights.loading import preprocessing as preprocessing
from flax_resnet.weights.pretrained import Pretrained as Pretrained
from flax_resnet.weights.pretrained import image_shape as image_shape
from flax_resnet.weights.published import tags as tags
from flax_resnet.weights.reading import read_weights as read_weights
from flax_resnet.weights.writing import write_weights as write_weights
