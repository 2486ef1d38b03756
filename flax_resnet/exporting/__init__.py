"""A trained network with its preprocessing, for use elsewhere: StableHLO, ONNX, safetensors."""

from flax_resnet.exporting.exports import Exported as Exported
from flax_resnet.exporting.exports import export as export
