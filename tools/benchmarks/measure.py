"""Times steps with the standard library alone, so that a peer's environment times its own by the very same code."""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any


def limit_cores(count: int) -> int:
    """Keeps this process to `count` of the cores it may use, 0 for all; gives their number. To be called first."""
    if not hasattr(os, "sched_setaffinity"):
        return os.cpu_count() or 1
    allowed = sorted(os.sched_getaffinity(0))
    if count:
        os.sched_setaffinity(0, allowed[:count])
    return len(os.sched_getaffinity(0))


def time_steps(step: Callable[[Any], None], batches: Iterator[Any], *, warmup: int, steps: int) -> dict[str, Any]:
    """Runs `warmup` and then `steps` steps.

    Args:
      step: takes a batch and returns when its work is done.
      batches: endless.
      warmup: steps before those that count, at least 1.
      steps: at least 1.

    Returns:
      step_seconds: of each step that counts, the wait for its batch included. data_wait_seconds: of each.
      warmup_seconds: of each before. cores_busy: by this process while the steps that count ran;
      other_cores_busy: by all others and the hypervisor (None where the system does not tell).
      peak_memory_bytes: largest resident size of this process so far.
    """
    seconds, waits = [], []
    for number in range(warmup + steps):
        if number == warmup:
            window = _Cores()
        begun = time.perf_counter()
        batch = next(batches)
        waits.append(time.perf_counter() - begun)
        step(batch)
        seconds.append(time.perf_counter() - begun)
    own, others = window.busy()
    return {
        "step_seconds": seconds[warmup:],
        "data_wait_seconds": waits[warmup:],
        "warmup_seconds": seconds[:warmup],
        "cores_busy": own,
        "other_cores_busy": others,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def rate(work: Callable[[], Any], amount: int, seconds: float) -> float:
    """What is done in a second, when `work` does so much; over at least one run and so many seconds."""
    done, begun = 0, time.perf_counter()
    while True:
        work()
        done += amount
        spent = time.perf_counter() - begun
        if spent >= seconds:
            return done / spent


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def report(values: dict[str, Any]) -> None:
    """Prints the one line that the benchmark reads."""
    print(json.dumps(values), flush=True)


class _Cores:
    """Counts processor time from its creation on."""

    def __init__(self) -> None:
        self._wall, self._own, self._all = time.perf_counter(), _own_seconds(), _busy_seconds()

    def busy(self) -> tuple[float, float | None]:
        """Cores kept busy on average by this process, and by all else."""
        wall, own = time.perf_counter() - self._wall, _own_seconds() - self._own
        total = _busy_seconds()
        if total is None or self._all is None:
            return own / wall, None
        return own / wall, max(0.0, total - self._all - own) / wall


def _own_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _busy_seconds() -> float | None:
    """Processor seconds since the machine started: user, nice, system, interrupts and time stolen by a hypervisor."""
    try:
        with open("/proc/stat") as file:
            fields = [int(field) for field in file.readline().split()[1:9]]
    except OSError:
        return None
    user, nice, system, _, _, hard, soft, stolen = fields
    return (user + nice + system + hard + soft + stolen) / os.sysconf("SC_CLK_TCK")
