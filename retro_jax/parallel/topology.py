"""Devices of a machine that is not there: TPU slices by name, for compiling ahead of time, and virtual CPU devices.

A name is `v4:8x8x8`, `v5e:16x16`, `v5p:4x4x8`, `v6e:16x16` (chips along each axis of the slice), `2xv5e:16x16` (two
slices) or `cpu:8`. TPU names need the TPU compiler, libtpu, which runs anywhere; no TPU is needed.
"""

import contextlib
import importlib.util
import math
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from retro_jax.errors import UserError
from retro_jax.parallel.chips import CHIPS, Chip

# Environment for libtpu where there is no TPU: several processes may load it at once, and it shall not ask the cloud
# about the machine that it runs on, nor complain of it at length.
WITHOUT_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v4-8",
}

KNOWN = "v4:8x8x8, v5p:4x4x8 (chips along three axes), v5e:16x16, v6e:16x16 (two axes), 2xv5e:16x16 (two slices), cpu:8"


class Topology(NamedTuple):
    """What a name stands for.

    Attributes:
      name: as given.
      chip: its figures; None for virtual CPU devices.
      shape: chips along each axis of one slice.
      slices: slices, joined by the data-centre network.
    """

    name: str
    chip: Chip | None
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    def interconnect_bandwidth(self, group_size: int) -> float | None:
        """Bytes/s that each chip can send when groups of this size communicate, all links of theirs busy.

        Supposes that a group spans the fewest axes of the slice that hold it. Along an axis that closes to a ring
        both neighbours are sent to; along an open one the ends have one neighbour, which halves the speed.

        Returns:
          None for CPU devices; for groups larger than a slice that of the slice (the network between is slower).
        """
        if self.chip is None:
            return None
        held, bandwidth = 1, 0.0
        for size in sorted(self.shape, reverse=True):
            if held >= group_size or size == 1:
                break
            held *= size
            bandwidth += self.chip.link_bandwidth * (2 if self._is_ring(size) else 1)
        return bandwidth

    def _is_ring(self, size: int) -> bool:
        # 3-D slices are built of 4x4x4 cubes behind optical switches, which close every axis; smaller ones, and 2-D
        # slices, are parts of a pod, closed where they reach through it.
        if self.chip.torus_axes == 3:
            return all(axis % 4 == 0 for axis in self.shape)
        return size == 16


def parse_topology(name: str) -> Topology:
    """Reads a topology's name.

    Raises:
      UserError: unknown; lists what is known.
    """
    found = re.fullmatch(r"(?:(\d+)x)?(\w+):(\d+(?:x\d+)*)", name)
    chip = found and (CHIPS.get(found[2]) if found[2] != "cpu" else None)
    is_tpu = bool(chip and chip.torus_axes)
    if not found or not (is_tpu or found[2] == "cpu"):
        raise UserError(f"topology {name!r} is unknown; known: {KNOWN}")
    shape, slices = tuple(map(int, found[3].split("x"))), int(found[1] or 1)
    if not all(shape) or not slices or (len(shape) != chip.torus_axes if is_tpu else len(shape) > 1 or slices > 1):
        raise UserError(f"topology {name!r}: this is not a shape of {found[2]}; known: {KNOWN}")
    return Topology(name, chip, shape, slices)


def topology_devices(topology: Topology) -> list[jax.Device]:
    """Devices to make a mesh of: abstract ones of a TPU topology, or virtual CPU devices.

    Raises:
      UserError: libtpu is not installed or refuses the shape, or JAX has started with fewer CPU devices.
    """
    if topology.chip is None:
        return _cpu_devices(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"topology {topology.name!r} needs the TPU compiler: pip install 'jax[tpu]' (no TPU is needed); "
            f"without it --topology=cpu:{topology.chips} plans for as many virtual CPU devices"
        )
    settings = {"chips_per_host_bounds": _host_bounds(topology), "num_slices": topology.slices}
    if topology.chip.cores > 1:
        settings["chip_config_name"] = "megacore"
    layout = f"{topology.chip.name}:{'x'.join(map(str, topology.shape))}"
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=layout, **settings).devices)
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split()).removeprefix("INVALID_ARGUMENT: ")
        raise UserError(f"topology {topology.name!r}: {reason}; known: {KNOWN}") from None


def _host_bounds(topology: Topology) -> tuple[int, int, int]:
    """Chips of one host along each axis: 2x2 of them, or all of a smaller slice."""
    x, y = (topology.shape[axis] if topology.shape[axis] < 2 else 2 for axis in (0, 1))
    return x, y, 1


def _cpu_devices(topology: Topology) -> list[jax.Device]:
    if jax.config.jax_num_cpu_devices < topology.chips:
        with contextlib.suppress(RuntimeError):  # JAX has started: take what there is
            jax.config.update("jax_num_cpu_devices", topology.chips)
    devices = jax.devices("cpu")
    if len(devices) < topology.chips:
        raise UserError(f"topology {topology.name!r}: JAX has started with {len(devices)} CPU devices")
    return devices[: topology.chips]
