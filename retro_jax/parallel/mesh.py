"""The device mesh of a run: axes `data`, `fsdp`, `tensor`."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from retro_jax.config import MeshConfig
from retro_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")


def create_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Lays the devices out along the configured axes.

    Args:
      config: sizes; one of them may be -1 and takes the devices that are left.
      devices: all devices of the run by default.

    Returns:
      A mesh with the axes `data`, `fsdp`, `tensor`, all of axis type Auto.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    written = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh {written}: sizes are positive, and at most one of them is -1")
    known = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, len(devices) // known)
    if int(np.prod(sizes)) != len(devices):
        raise UserError(f"mesh {written} does not multiply to the {len(devices)} devices of this run")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
