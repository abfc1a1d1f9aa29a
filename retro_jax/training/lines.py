"""JSON lines that a kill cannot spoil: each is appended by one write, and one that was cut is dropped."""

import json
import os
from pathlib import Path
from typing import Any

_BLOCK = 1 << 16


class LineWriter:
    """Appends to a file, which is created when absent; a context manager, or call `close`."""

    def __init__(self, path: str | os.PathLike) -> None:
        self._path = Path(path)
        self._file = open(self._path, "a+b", buffering=0)  # noqa: SIM115 (closed by close)
        size = end = self._file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - _BLOCK)
            self._file.seek(start)
            newline = self._file.read(end - start).rfind(b"\n")
            end = start
            if newline >= 0:
                end += newline + 1
                break
        if end < size:
            self._file.truncate(end)

    def append(self, line: dict[str, Any]) -> None:
        """Writes one line at once.

        Raises:
          OSError: the disk is full; it names the file.
        """
        rest = (json.dumps(line, allow_nan=False) + "\n").encode()
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "LineWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The complete lines of a file, in order; none when there is no file."""
    path = Path(path)
    if not path.is_file():
        return []
    *complete, _ = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in complete]
