"""A trained network with its preprocessing, for use elsewhere: StableHLO, ONNX, safetensors."""

from flax_resnet.exporting.write import Exported as Exported
from flax_resnet.exporting.write import export as export
