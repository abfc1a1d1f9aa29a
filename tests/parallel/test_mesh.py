"""Meshes multiply to the devices; every logical axis has one rule."""

import pytest
from jax.sharding import PartitionSpec as P

from retro_jax.config import MeshConfig
from retro_jax.errors import UserError
from retro_jax.parallel.mesh import create_mesh
from retro_jax.parallel.rules import partition_spec


def test_one_size_may_take_the_devices_that_are_left():
    assert dict(create_mesh(MeshConfig(data=2, fsdp=-1, tensor=2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=3), "mesh data=3 x fsdp=-1 x tensor=1 does not multiply to the 8 devices"),
        (MeshConfig(data=2, fsdp=2, tensor=1), "does not multiply to the 8 devices"),
        (MeshConfig(data=-1, fsdp=-1), "at most one of them is -1"),
        (MeshConfig(data=0), "sizes are positive"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        create_mesh(config)


def test_no_mesh_axis_splits_two_dimensions_and_odd_sizes_stay_whole():
    mesh = create_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    assert partition_spec(("vocab", "embed"), (10, 8), mesh) == P("tensor", "fsdp")
    assert partition_spec(("embed", "encoder_embed"), (8, 8), mesh) == P("fsdp", None)
    assert partition_spec(("layers", "embed", "heads", "head"), (3, 6, 3, 4), mesh) == P(None, None, None, None)


def test_an_axis_without_a_rule_is_a_defect_not_a_default():
    mesh = create_mesh(MeshConfig())
    with pytest.raises(ValueError, match="no sharding rule for the logical axis 'embedd'"):
        partition_spec(("embedd",), (8,), mesh)
    with pytest.raises(ValueError, match="1 axis names"):
        partition_spec(("embed",), (8, 8), mesh)
