"""Names of topologies, and the devices behind them."""

import importlib.util

import jax
import numpy as np
import pytest

from retro_jax.config import MeshConfig
from retro_jax.errors import UserError
from retro_jax.parallel.chips import CHIPS, chip_of
from retro_jax.parallel.mesh import create_mesh
from retro_jax.parallel.topology import parse_topology, topology_devices


@pytest.mark.parametrize(
    "name, chip, chips, slices",
    [
        ("v4:8x8x8", "v4", 512, 1),
        ("v5p:4x4x8", "v5p", 128, 1),
        ("v5e:16x16", "v5e", 256, 1),
        ("v6e:4x4", "v6e", 16, 1),
        ("2xv5e:16x16", "v5e", 512, 2),
        ("cpu:8", None, 8, 1),
    ],
)
def test_a_name_tells_chip_and_number(name, chip, chips, slices):
    topology = parse_topology(name)
    assert (topology.chip and topology.chip.name, topology.chips, topology.slices) == (chip, chips, slices)


@pytest.mark.parametrize(
    "name", ["v9:4x4", "v4", "v4:4x4", "v5e:2x2x2", "v5e:0x4", "0xv5e:4x4", "cpu:2x4", "2xcpu:8", "H100:8", "v4:8x8xx"]
)
def test_a_wrong_name_is_refused_with_those_that_are_known(name):
    with pytest.raises(UserError, match=r"v4:8x8x8.*v5p:4x4x8.*v5e:16x16.*v6e:16x16.*cpu:8"):
        parse_topology(name)


def test_a_group_uses_the_links_of_the_axes_it_spans():
    link = CHIPS["v4"].link_bandwidth
    pod = parse_topology("v4:8x8x8")
    assert pod.interconnect_bandwidth(8) == 2 * link  # one closed axis, both directions
    assert pod.interconnect_bandwidth(64) == 4 * link
    assert pod.interconnect_bandwidth(512) == 6 * link
    assert parse_topology("v4:2x2x4").interconnect_bandwidth(4) == link  # too small to close an axis
    assert parse_topology("v5e:4x16").interconnect_bandwidth(64) == 3 * CHIPS["v5e"].link_bandwidth
    assert parse_topology("cpu:8").interconnect_bandwidth(8) is None


def test_virtual_cpu_devices_stand_for_a_topology():
    assert topology_devices(parse_topology("cpu:4")) == jax.devices("cpu")[:4]


def test_more_cpu_devices_than_jax_started_with_are_refused():
    jax.devices("cpu")
    with pytest.raises(UserError, match="'cpu:4096': JAX has started with"):
        topology_devices(parse_topology("cpu:4096"))


def test_a_tpu_topology_without_the_tpu_compiler_names_the_remedies(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'jax\[tpu\]'.*--topology=cpu:512"):
        topology_devices(parse_topology("v4:8x8x8"))


needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")


@needs_libtpu
@pytest.mark.parametrize("name", ["v4:2x2x4", "v5p:4x4x8", "v5e:16x16", "v5e:1x1", "v6e:2x4", "2xv5e:4x4"])
def test_abstract_tpu_devices_are_the_chips_of_the_name(name, monkeypatch):
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    topology = parse_topology(name)
    devices = topology_devices(topology)
    assert len(devices) == topology.chips
    assert {chip_of(device.device_kind) for device in devices} == {topology.chip}
    assert len({getattr(device, "slice_index", 0) for device in devices}) == topology.slices


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "sizes"),
    [("v4:8x8x8", (8, 64, 1, 1)), ("v4:8x8x8", (4, 128, 1, 1)), ("v4:8x8x8", (8, 32, 2, 1)), ("v5e:4x4", (2, 2, 2, 2))],
)
def test_a_mesh_axis_may_take_a_part_of_an_axis_of_the_slice(name, sizes, monkeypatch):
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topology_devices(parse_topology(name))
    mesh = create_mesh(MeshConfig(*sizes), devices)
    assert mesh.devices.shape == sizes and set(mesh.devices.flat) == set(devices)


@needs_libtpu
def test_only_the_data_axis_crosses_slices(monkeypatch):
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topology_devices(parse_topology("2xv5e:2x2"))
    mesh = create_mesh(MeshConfig(data=4, fsdp=2), devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert mesh.devices.shape == (4, 2, 1, 1)
    assert slices[:2].max() == 0 and slices[2:].min() == 1
    with pytest.raises(UserError, match="data must be a multiple of the 2 slices"):
        create_mesh(MeshConfig(data=1, fsdp=8), devices)


@needs_libtpu
def test_a_shape_that_the_compiler_refuses_is_one_line(monkeypatch):
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    with pytest.raises(UserError, match=r"'v4:3x3x3'.*not divisible.*known: v4") as caught:
        topology_devices(parse_topology("v4:3x3x3"))
    assert "\n" not in str(caught.value)
