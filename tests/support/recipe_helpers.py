"""What tests of the experiments' configs share."""

import dataclasses

from flax_resnet.data.config import DataConfig

SMALL = {"num_filters": 4, "stem_filters": None, "stage_filters": (4,), "dense_features": (8,)}


def shrunk(config, folder):
    """A recipe as it is, on a few small images, one narrow block, from no weights, for a step."""
    model = config.model
    fields = {name: small for name, small in SMALL.items() if hasattr(model, name)}
    if hasattr(model, "stage_sizes"):
        fields["stage_sizes"] = (1,)
    if hasattr(model, "frozen_stages"):
        fields["frozen_stages"] = min(1, model.frozen_stages)
    return dataclasses.replace(
        config,
        model=model.clone(num_classes=10, **fields),
        data=DataConfig(folder=str(folder), holdout_every=2),
        weights=None,
        normalization="imagenet" if config.normalization == "weights" else config.normalization,
        batch_size=4,
        accum_steps=1,
        eval_batch_size=4,
        num_steps=1,
    )
