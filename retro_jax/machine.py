"""What a program runs on: processor, cores, memory, versions of packages, the commit that is checked out."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_BFLOAT16 = ("avx512_bf16", "amx_bf16")


def description() -> str:
    """Processor, cores and memory, for people."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{processor()}, {os.cpu_count()} cores, {memory / 2**30:.0f} GiB"


def processor() -> str:
    """The processor's name, else its architecture."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Package to version, of those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit(root: Path) -> str | None:
    """The commit that is checked out, with `-dirty` when files differ from it; None where there is no repository."""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products of bfloat16; without them they are slower than float32's."""
    return any(name in _cpuinfo("flags").split() for name in _BFLOAT16)


def _cpuinfo(key: str) -> str:
    """The first value of a key of Linux's description of the processor; empty where there is none."""
    lines = _CPUINFO.read_text(encoding="utf-8").splitlines() if _CPUINFO.is_file() else []
    values = [line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key]
    return values[0] if values else ""
