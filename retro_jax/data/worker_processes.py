"""Worker processes on this machine: Beam's `FnApiRunner` with several, in a process of its own that is watched.

Beam waits for ever for a worker process that was killed, and worker processes outlive a runner that was killed. So the
runner lives in a child process with its own process group, and both ends watch: when the runner or one of its workers
is lost, the whole group is killed and the coordinator says so; when the coordinator is lost, the runner sees the end of
its input and kills its group.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from retro_jax.data.distribute import WorkersError, build_pipeline, quiet_beam

_LOST_WORKER = 75
_LOG_TAIL = 4000
_SECONDS_FOR_THE_REASON = 5


def run(messages: Sequence[str], workers: int, note: Path) -> None:
    """Works off the messages with this many worker processes.

    Args:
      messages: of `distribute`.
      workers: at least 1.
      note: the run's file; a failure noted in it is left to the caller.

    Raises:
      WorkersError: a process was killed, by a person or for lack of memory.
    """
    # The workers import what the coordinator can import, whatever it has put on its path.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with tempfile.TemporaryFile() as log:
        runner = subprocess.Popen(
            [sys.executable, "-m", "retro_jax.data.worker_processes"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
        try:
            with contextlib.suppress(BrokenPipeError):
                runner.stdin.write(json.dumps({"messages": list(messages), "workers": workers}).encode() + b"\n")
                runner.stdin.flush()
            status = runner.wait()
        finally:
            _kill_group(runner.pid)
            runner.wait()
            with contextlib.suppress(BrokenPipeError):
                runner.stdin.close()
        if status == 0 or note.read_bytes().strip():
            return
        if status < 0 or status == _LOST_WORKER:
            raise WorkersError(
                f"a worker process was killed ({note.parent}); finished shards are kept: run the same command again, "
                "with fewer workers if memory is short"
            )
        log.seek(0, os.SEEK_END)
        log.seek(max(0, log.tell() - _LOG_TAIL))
        raise RuntimeError(f"the pipeline failed:\n{log.read().decode(errors='replace')}")


def main() -> None:
    """Runs the pipeline that the first line of the input describes; lives no longer than the input."""
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner

    description = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_input, daemon=True).start()
    threading.excepthook = _end_with_worker
    options = [f"--direct_num_workers={description['workers']}", "--direct_running_mode=multi_processing"]
    try:
        with quiet_beam():
            build_pipeline(FnApiRunner(), PipelineOptions(options), description["messages"]).run()
    except Exception:
        # A worker that is lost breaks the pipeline here as well; the thread that waits for it knows, and ends this.
        threading.Event().wait(_SECONDS_FOR_THE_REASON)
        raise


def _end_with_input() -> None:
    sys.stdin.read()
    _kill_group(os.getpid())


def _end_with_worker(failure: threading.ExceptHookArgs) -> None:
    """The thread in which Beam waits for a worker process raises when that process fails."""
    threading.__excepthook__(failure)
    sys.stderr.flush()
    status = re.search(r"Worker subprocess exited with return code (-?\d+)", str(failure.exc_value))
    if status is not None:  # else a thread that read from the worker, perhaps: the one that waits for it follows
        killed = not 0 <= int(status[1]) < 128  # by a signal, as Popen or as a shell says it
        os._exit(_LOST_WORKER if killed else 1)


def _kill_group(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)


if __name__ == "__main__":
    main()
