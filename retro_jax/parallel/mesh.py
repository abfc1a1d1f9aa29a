"""The device mesh of a run: axes `data`, `fsdp`, `tensor`, `context`."""

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from retro_jax.config import MeshConfig, TrainConfig
from retro_jax.errors import UserError

AXES = ("data", "fsdp", "tensor", "context")


def create_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Lays the devices out along the configured axes.

    Devices of several slices (TPU pods joined by a data-centre network) are laid out so that only `data` crosses from
    one slice to another.

    Args:
      config: sizes; one of them may be -1 and takes the devices that are left.
      devices: all devices of the run by default.

    Returns:
      A mesh with the axes `data`, `fsdp`, `tensor`, `context`, all of axis type Auto.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or `data` not to a multiple of the slices.
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
    types = (AxisType.Auto,) * len(AXES)
    # Of GPUs JAX calls every host a slice. There the order is enough: the last axes lie within a host.
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    # A mesh axis may take a part of an axis of the slice (8 x 64 on v4:8x8x8 has no other way).
    split = {"allow_split_physical_axes": True}
    if slices == 1:
        return Mesh(mesh_utils.create_device_mesh(sizes, devices, **split), AXES, axis_types=types)
    if sizes[0] % slices:
        raise UserError(f"mesh {written}: data must be a multiple of the {slices} slices, the other axes lie in one")
    inside, across = (sizes[0] // slices, *sizes[1:]), (slices, *(1 for _ in AXES[1:]))
    return Mesh(mesh_utils.create_hybrid_device_mesh(inside, across, devices, **split), AXES, axis_types=types)


def check_batch(config: TrainConfig, mesh: Mesh) -> None:
    """Raises UserError when a micro-batch of sequences of `data.length` tokens does not divide over the mesh."""
    rows, context = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["context"]
    if config.batch_size % (config.microbatches * rows):
        parts = f" x microbatches {config.microbatches}" if config.microbatches > 1 else ""
        raise UserError(f"batch_size {config.batch_size} is not a multiple of the mesh's data x fsdp = {rows}{parts}")
    length, chunk_length = config.data.length, config.model.chunk_length
    if length % (context * chunk_length):
        raise UserError(
            f"sequences of {length} tokens are not cut by mesh.context = {context} at chunk boundaries: "
            f"the length must be a multiple of {context} x {chunk_length}"
        )
