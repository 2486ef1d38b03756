"""What tests compare of two runs."""

from flax_resnet.checkpoints.checkpoints import Checkpoints
from flax_resnet.records.run_dir import read_metrics


def saved(workdir, which="latest"):
    """(state arrays, meta) of a workdir's checkpoint."""
    reader = Checkpoints(workdir / "checkpoints")
    found = reader.read(which)
    reader.close()
    return found


def timeless(records):
    """Metrics records without what depends on the clock."""
    clock = ("images_per_second", "data_wait")
    return [{k: v for k, v in record.items() if k not in clock} for record in records]


def numbers(workdir):
    """What a run's metrics say, without times."""
    times = ("images_per_second", "data_wait")
    records = read_metrics(workdir)
    return [{k: v for k, v in record.items() if k not in times} for record in records]
