"""What tests compare of two runs."""

from helpers import assert_trees_equal

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
    return timeless(read_metrics(workdir))


def assert_same_end(workdir, unbroken, step):
    """The last states of two runs are equal to the last bit, their records but for the clock."""
    (state, meta), (other, other_meta) = saved(workdir), saved(unbroken)
    assert_trees_equal(state, other)
    assert meta["step"] == other_meta["step"] == step
    assert numbers(workdir) == numbers(unbroken)
