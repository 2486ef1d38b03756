"""Networks that are trained, applied to images: classified, predicted, evaluated."""
