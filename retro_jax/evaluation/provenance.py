"""What figures were made with: versions, machine, devices."""

import platform

import jax

from retro_jax import machine

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "scann", "sentencepiece", "numpy")


def made_with() -> dict[str, str]:
    """Name to value, for people: Python, packages, processor, devices."""
    devices = jax.devices()
    return {
        "Python": platform.python_version(),
        "packages": ", ".join(f"{name} {version}" for name, version in machine.versions(_PACKAGES).items()),
        "machine": machine.description(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
    }
