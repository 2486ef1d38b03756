"""What the tests of faults compare runs by."""

from helpers import assert_trees_equal

from flax_resnet.checkpoints.checkpoints import Checkpoints
from flax_resnet.records.run_dir import read_metrics


def assert_same_end(workdir, unbroken, step):
    """The last states of two runs are equal to the last bit, their records but for the clock."""
    ends = []
    for place in (workdir, unbroken):
        reader = Checkpoints(place / "checkpoints")
        ends.append(reader.read())
        reader.close()
    (state, meta), (other, other_meta) = ends
    assert_trees_equal(state, other)
    assert meta["step"] == other_meta["step"] == step
    clock = ("images_per_second", "data_wait")
    records = [
        [{k: v for k, v in record.items() if k not in clock} for record in read_metrics(place)]
        for place in (workdir, unbroken)
    ]
    assert records[0] == records[1]
