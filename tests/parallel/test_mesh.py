"""Meshes multiply to the devices; every logical axis has one rule."""

import dataclasses

import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from retro_jax.config import DataConfig, MeshConfig, RetroConfig, TrainConfig
from retro_jax.errors import UserError
from retro_jax.parallel.mesh import check_batch, create_mesh
from retro_jax.parallel.rules import partition_spec


def test_one_size_may_take_the_devices_that_are_left():
    mesh = create_mesh(MeshConfig(data=2, fsdp=-1, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=3), "mesh data=3 x fsdp=-1 x tensor=1 x context=1 does not multiply to the 8"),
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


def test_vectors_stay_whole():
    mesh = create_mesh(MeshConfig(fsdp=8))
    assert partition_spec(("embed",), (16,), mesh) == P(None)
    assert partition_spec(("layers", "embed"), (8, 16), mesh) == P(None, None)


def test_an_axis_without_a_rule_and_two_that_claim_one_mesh_axis_are_defects():
    mesh = create_mesh(MeshConfig())
    with pytest.raises(ValueError, match="no sharding rule for the logical axis 'embedd'"):
        partition_spec(("embedd", "heads"), (8, 8), mesh)
    with pytest.raises(ValueError, match="1 axis names"):
        partition_spec(("embed",), (8, 8), mesh)
    with pytest.raises(ValueError, match=r"axes 'heads' and 'ffw' .* both claim the mesh axis 'tensor'"):
        partition_spec(("heads", "ffw"), (8, 8), mesh)


@dataclasses.dataclass(frozen=True)
class SlicedDevice:
    """What the layout of a mesh asks of a device."""

    id: int
    slice_index: int
    platform: str
    device_kind: str
    process_index: int


def test_hosts_with_gpus_are_no_slices():
    devices = [SlicedDevice(number, number // 8, "gpu", "NVIDIA H100 80GB HBM3", number // 8) for number in range(32)]
    assert create_mesh(MeshConfig(), devices).shape["fsdp"] == 32
    hosts = np.vectorize(lambda device: device.process_index)(create_mesh(MeshConfig(tensor=8), devices).devices)
    assert (hosts == np.arange(4).reshape(1, 4, 1, 1)).all()  # tensor lies within a host


def test_a_batch_that_does_not_divide_is_refused():
    mesh = create_mesh(MeshConfig(data=2, fsdp=2, context=2))

    def check(batch_size, microbatches, length):
        model = RetroConfig.preset("tiny")
        check_batch(
            TrainConfig(model, DataConfig(length=length), batch_size=batch_size, microbatches=microbatches), mesh
        )

    check(8, 2, 256)
    with pytest.raises(UserError, match="batch_size 6 is not a multiple of the mesh's data x fsdp = 4"):
        check(6, 1, 256)
    with pytest.raises(UserError, match="data x fsdp = 4 x microbatches 4"):
        check(8, 4, 256)
    with pytest.raises(UserError, match=r"not cut by mesh.context = 2 at chunk boundaries"):
        check(4, 1, 192)
