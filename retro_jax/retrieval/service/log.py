"""Log lines as JSON objects: what happened, when, to which request. Never texts, tokens or vectors."""

import json
import sys
import threading
import time
from typing import Any, TextIO

_PER_SECOND = 20


class Log:
    """Writes one JSON object a line; at most so many of one event a second.

    The rest, and what could not be written, is counted in `suppressed` of the next line of that event.
    """

    def __init__(self, stream: TextIO | None = None, **always: Any) -> None:
        """Sets the stream (stderr) and fields that every line has."""
        self._stream = stream or sys.stderr
        self._always = always
        self._lock = threading.Lock()
        self._second = 0
        self._counts: dict[str, int] = {}
        self._suppressed: dict[str, int] = {}

    def event(self, event: str, *, level: str = "info", **fields: Any) -> None:
        """Writes a line.

        Args:
          event: what happened, in few words, always the same for the same thing.
          level: "info", "warning" or "error".
          fields: numbers and short strings about it.
        """
        now = time.time()
        with self._lock:
            if int(now) != self._second:
                self._second, self._counts = int(now), {}
            self._counts[event] = self._counts.get(event, 0) + 1
            if self._counts[event] > _PER_SECOND:
                self._suppressed[event] = self._suppressed.get(event, 0) + 1
                return
            line = {"time": round(now, 3), "level": level, "event": event, **self._always, **fields}
            if missing := self._suppressed.pop(event, 0):
                line["suppressed"] = missing
            try:
                self._stream.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
                self._stream.flush()
            except OSError:  # a full disk, or nobody who reads any more: no reason to stop serving
                self._suppressed[event] = missing + 1
