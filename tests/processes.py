"""Programs as several processes on this machine, each with its own virtual CPU devices."""

import random
import socket
import subprocess
from collections.abc import Sequence

from small_run import program


def free_port() -> int:
    """A port to listen at; below those that the system gives to outgoing connections, so that none takes it."""
    while True:
        port = random.randrange(15_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue


def start(count: int, name: str, *flags: str, devices: int = 1, **environment: str) -> list[subprocess.Popen]:
    """Starts a program of launch/ in `count` processes that find each other by flags."""
    place = (f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={count}")
    return [
        program(name, *flags, *place, f"--process_id={process}", devices=devices, **environment)
        for process in range(count)
    ]


def finish(processes: Sequence[subprocess.Popen], timeout: float = 300) -> list[tuple[int, str, str]]:
    """Waits for all: (exit status, stdout, stderr) of each."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def succeeded(processes: Sequence[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """The same, all with exit status 0."""
    ends = finish(processes)
    assert all(status == 0 for status, _, _ in ends), ends
    return ends
