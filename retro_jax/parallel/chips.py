"""What one accelerator chip can do, by the name that JAX gives it; published figures, dense, without sparsity.

TPU figures are those of Google's system architecture pages and of JAX's `tpu_info`; HBM is what the TPU compiler says
it may use (it names the limit when a program is too large). GPU figures are of NVIDIA's data sheets (SXM boards).
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """One chip, which JAX shows as one device.

    Attributes:
      name: short, as in topology names ("v5e") or data sheets ("H100").
      bf16_flops: peak of dense bfloat16 matrix products, FLOP/s.
      float32_flops: peak of float32 products at JAX's default precision: one bfloat16 pass on TPU, TF32 on GPU.
      hbm_bytes: memory that programs can use.
      hbm_bandwidth: bytes/s.
      link_bandwidth: bytes/s of one interconnect link in one direction; 0 for GPUs (switched).
      torus_axes: dimensions of the interconnect's torus, two links each; 0 for GPUs.
      cores: TensorCores that make up the chip (two fused into one device: "megacore"); 1 for GPUs.
    """

    name: str
    bf16_flops: float
    float32_flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float = 0.0
    torus_axes: int = 0
    cores: int = 1


def _gpu(name: str, bf16_flops: float, hbm_gib: float, hbm_bandwidth: float) -> Chip:
    return Chip(name, bf16_flops, bf16_flops / 2, hbm_gib * 2**30, hbm_bandwidth)


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 275e12, 30.75 * 2**30, 1.23e12, 45e9, 3, 2),
        Chip("v5e", 197e12, 197e12, 15.75 * 2**30, 0.82e12, 45e9, 2),
        Chip("v5p", 459e12, 459e12, 95.74 * 2**30, 2.77e12, 90e9, 3, 2),
        Chip("v6e", 918e12, 918e12, 31.25 * 2**30, 1.64e12, 90e9, 2),
        _gpu("A100", 312e12, 80, 2.04e12),
        _gpu("H100", 989e12, 80, 3.35e12),
        _gpu("H200", 989e12, 141, 4.8e12),
    )
}

# Names of `jax.Device.device_kind`, and for GPUs how they begin: the rest tells memory and board. Boards with other
# clocks (PCIe, NVL) have other peaks and are not listed.
_TPU_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}
_GPU_PREFIXES = {
    "NVIDIA A100": "A100",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA GH200": "H100",
    "NVIDIA H200": "H200",
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip behind `jax.Device.device_kind`, or None when it is not known (a CPU, a board not listed)."""
    if device_kind in _TPU_KINDS:
        return CHIPS[_TPU_KINDS[device_kind]]
    if device_kind.endswith("NVL"):
        return None
    for prefix, name in _GPU_PREFIXES.items():
        if device_kind.startswith(prefix):
            return CHIPS[name]
    return None
