"""What figures were made with: versions, machine, devices."""

import importlib.metadata
import os
import platform
from pathlib import Path

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "scann", "sentencepiece", "numpy")
_CPUINFO = Path("/proc/cpuinfo")


def made_with() -> dict[str, str]:
    """Name to value, for people: Python, packages, processor, devices."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    devices = jax.devices()
    return {
        "Python": platform.python_version(),
        "packages": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "devices": f"{len(devices)} x {devices[0].device_kind}",
    }


def _processor() -> str:
    lines = _CPUINFO.read_text(encoding="utf-8").splitlines() if _CPUINFO.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
