"""The name under which model cards of earlier versions import ``predict``."""

from flax_resnet.inference.classifier import predict_images as predict

__all__ = ["predict"]
