"""What a trained run sees: numbers from its checkpoint and its data, to be drawn by ``figures``.

``open_run`` opens a working directory; the rest takes what it gives. One device is used, the first.
"""

from flax_resnet.inspection.embed import pca as pca
from flax_resnet.inspection.embed import tsne as tsne
from flax_resnet.inspection.eval_outputs import Predictions as Predictions
from flax_resnet.inspection.eval_outputs import predictions as predictions
from flax_resnet.inspection.eval_outputs import worst as worst
from flax_resnet.inspection.gallery import PARTS as PARTS
from flax_resnet.inspection.gallery import Part as Part
from flax_resnet.inspection.gallery import Session as Session
from flax_resnet.inspection.layers import first_filters as first_filters
from flax_resnet.inspection.layers import forward as forward
from flax_resnet.inspection.layers import grad_cam as grad_cam
from flax_resnet.inspection.layers import heat as heat
from flax_resnet.inspection.layers import stage_maps as stage_maps
from flax_resnet.inspection.lr_finder import RateSearch as RateSearch
from flax_resnet.inspection.lr_finder import find_rate as find_rate
from flax_resnet.inspection.run import Inspected as Inspected
from flax_resnet.inspection.run import open_run as open_run
from flax_resnet.inspection.samples import Augmented as Augmented
from flax_resnet.inspection.samples import augmented as augmented
from flax_resnet.inspection.samples import eval_images as eval_images
from flax_resnet.inspection.samples import folder_images as folder_images
from flax_resnet.records.run_dir import read_record as read_record
from flax_resnet.records.run_dir import variants as variants
