""".npy files written row block by row block, so that a file larger than memory is fine, and files that share rows."""

from pathlib import Path
from types import TracebackType

import numpy as np


class ArrayWriter:
    """Writes an .npy file of unknown length; use as a context manager.

    with ArrayWriter(path, dtype) as writer:
        writer.append(rows)          # rows: array [n, *row_shape] of the dtype

    Attributes:
      rows: rows written so far.
    """

    def __init__(self, path: str | Path, dtype: np.dtype, row_shape: tuple[int, ...] = ()) -> None:
        self.rows = 0
        self._row_shape = row_shape
        self._dtype = np.dtype(dtype)
        self._file = open(path, "wb")  # noqa: SIM115  closed by __exit__
        self._write_header()
        self._header_size = self._file.tell()

    def append(self, rows: np.ndarray) -> None:
        """Writes rows [n, *row_shape] behind those before."""
        rows = np.ascontiguousarray(rows, self._dtype)
        if rows.shape[1:] != self._row_shape:
            raise ValueError(f"rows of shape {rows.shape[1:]}, expected {self._row_shape}")
        self._file.write(rows.reshape(-1).view(np.uint8))
        self.rows += len(rows)

    def __enter__(self) -> "ArrayWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._file.seek(0)
                self._write_header()
                # NumPy pads the header so that the first axis can grow in place.
                assert self._file.tell() == self._header_size
        finally:
            self._file.close()

    def _write_header(self) -> None:
        description = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": description, "fortran_order": False, "shape": (self.rows, *self._row_shape)}
        np.lib.format.write_array_header_1_0(self._file, header)


def save_array(path: str | Path, array: np.ndarray) -> None:
    """Writes what `np.save` would write; the error of a full disk has its number, which NumPy leaves out."""
    with ArrayWriter(path, array.dtype, array.shape[1:]) as writer:
        writer.append(array)


def files_of(offsets: np.ndarray, rows: range) -> slice:
    """Which of some files hold these rows.

    Args:
      offsets: int64 [files + 1], the row that each file begins with, and the number of rows.
      rows: consecutive ones.
    """
    return slice(int(np.searchsorted(offsets, rows.start, "right")) - 1, int(np.searchsorted(offsets, rows.stop)))
