"""The scripts of launch/ run as a user runs them."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def environment(**changes: str) -> dict[str, str]:
    """This process's environment with the tests' Python first on the PATH, and without a cluster's variables."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "JAX_"))}
    return {**inherited, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **changes}


def start(name: str, *arguments: object, cwd: Path = ROOT, **changes: str) -> subprocess.Popen:
    """Starts launch/NAME as a process of its own."""
    return subprocess.Popen(
        ["bash", f"launch/{name}", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=environment(**changes),
        start_new_session=True,
    )


def run(name: str, *arguments: object, timeout: float = 60, **options: object) -> tuple[int, str, str]:
    """Runs launch/NAME to its end: (exit status, stdout, stderr)."""
    process = start(name, *arguments, **options)
    stdout, stderr = process.communicate(timeout=timeout)
    return process.returncode, stdout, stderr


def dry_run(name: str, *arguments: object, **options: object) -> list[str]:
    """The lines that it prints under --dry_run."""
    status, stdout, stderr = run(name, *arguments, **options)
    assert status == 0, stderr
    return stdout.splitlines()


def wait_until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Returns as soon as the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether the process runs; one that only waits for its parent to ask how it ended does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
