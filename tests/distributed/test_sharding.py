import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from flax_resnet.distributed import sharding
from flax_resnet.errors import UserError


def test_a_batch_is_split_over_the_data_axis_and_a_state_is_whole_everywhere(meshes):
    assert sharding.data_mesh().size == 8
    assert (meshes[1].axis_names, meshes[1].axis_types) == (("data",), (AxisType.Auto,))
    batch = sharding.put_batch(meshes[1], {"x": np.arange(16)})["x"]
    assert [s.data.tolist() for s in batch.addressable_shards][:2] == [[0, 1], [2, 3]]
    state = sharding.put_replicated(meshes[1], {"w": np.arange(3)})["w"]
    assert [s.data.tolist() for s in state.addressable_shards] == [[0, 1, 2]] * 8


@pytest.mark.parametrize("which", [0, 1])
def test_what_was_placed_may_be_donated_without_harm_to_the_original(meshes, which):
    original = {"x": jnp.arange(4.0)}
    placed = sharding.put_replicated(meshes[which], original)
    jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)(placed)
    assert original["x"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("batch_size", "advice"), [(12, "use 8 or 16"), (3, "use 8"), (0, "use 8"), (-8, "use 8")]
)
def test_batch_sizes_must_divide_over_the_devices(meshes, batch_size, advice):
    with pytest.raises(UserError, match=f"batch_size={batch_size} is not .* 8 devices: {advice}"):
        sharding.check_divisible("batch_size", batch_size, meshes[1])
    sharding.check_divisible("batch_size", 16, meshes[1])
