"""Programs run in processes that have imported the large libraries already, which takes up to three seconds."""

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from pathlib import Path

LIBRARIES = ["jax", "flax.nnx", "optax", "orbax.checkpoint", "grain", "matplotlib.pyplot", "sentencepiece", __name__]
DEVICES = "JAX_NUM_CPU_DEVICES"


def _of_jax() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(("JAX_", "XLA_")) and name != DEVICES}


_SETTINGS = _of_jax()
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(LIBRARIES)


def run_prepared(path: Path, flags: tuple[str, ...], devices: int, timeout: float) -> tuple[int, str, str] | None:
    """Runs a program to its end: (exit status, stdout, stderr); None where JAX has been told something else since."""
    if _of_jax() != _SETTINGS:
        return None
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        streams = [f"/proc/{os.getpid()}/fd/{stream.fileno()}" for stream in (out, err)]
        process = _context.Process(target=_run, args=(path, flags, devices, dict(os.environ), streams))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
            raise TimeoutError(f"{path.name} has not ended after {timeout:g} s")
        out.seek(0)
        err.seek(0)
        return process.exitcode, out.read(), err.read()


def _run(path: Path, flags: tuple[str, ...], devices: int, environment: dict[str, str], streams: list[str]) -> None:
    import jax

    os.setsid()
    for place, stream in enumerate(("/dev/null", *streams)):
        os.dup2(os.open(stream, os.O_RDWR), place)
    os.environ.clear()
    os.environ.update(environment)
    os.environ[DEVICES] = str(devices)
    jax.config.update("jax_num_cpu_devices", devices)
    os.chdir(path.parents[1])
    sys.argv[:] = [str(path), *flags]
    sys.path.insert(0, str(path.parent))
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        atexit._run_exitfuncs()
