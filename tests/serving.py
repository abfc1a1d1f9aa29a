"""A retrieval service of a test, as a process of its own."""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator

from small_run import program


@contextlib.contextmanager
def serving(*flags: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """Runs launch/serve_retrieval.py at a free port; gives its address and its process once it is ready."""
    server = program("launch/serve_retrieval.py", "--port=0", *flags)
    try:
        address, lines = None, []
        for line in server.stderr:
            lines.append(line)
            event = json.loads(line) if line.startswith("{") else {}
            address = event.get("address", address)
            if event.get("event") == "ready":
                break
        else:
            raise AssertionError("".join(lines))
        yield address, server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.communicate()
