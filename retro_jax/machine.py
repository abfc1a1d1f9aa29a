"""What a machine is: its processor, cores and memory, and what its cores can do."""

import os
import platform
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_BFLOAT16 = ("avx512_bf16", "amx_bf16")


def description() -> str:
    """Processor, cores and memory, for people."""
    processor = _cpuinfo("model name") or platform.processor() or platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{processor}, {os.cpu_count()} cores, {memory / 2**30:.0f} GiB"


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products of bfloat16; without them they are slower than float32's."""
    return any(name in _cpuinfo("flags").split() for name in _BFLOAT16)


def _cpuinfo(key: str) -> str:
    """The first value of a key of Linux's description of the processor; empty where there is none."""
    lines = _CPUINFO.read_text(encoding="utf-8").splitlines() if _CPUINFO.is_file() else []
    values = [line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key]
    return values[0] if values else ""
