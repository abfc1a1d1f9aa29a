"""The TFRecord file format without TensorFlow: length, its CRC, payload, its CRC; all little-endian.

`FixedStrideReader` reads record i of a file whose records are all of one size straight from i x stride. It uses
positioned reads rather than a memory map: they let other threads run while the disk is slow, and a file cut short
under a reader is an error there, where a map would end the process.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import google_crc32c

from retro_jax.errors import UserError

_LENGTH = struct.Struct("<Q")
_CRC = struct.Struct("<I")
_HEADER = _LENGTH.size + _CRC.size
FRAME_BYTES = _HEADER + _CRC.size


def masked_crc(data: bytes) -> int:
    """CRC32C as TFRecord stores it: rotated and shifted, so that a CRC of data with CRCs in it stays good."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


class RecordWriter:
    """Writes records one after another; use as a context manager.

    Attributes:
      records: how many were written.
    """

    def __init__(self, path: str | Path) -> None:
        self.records = 0
        self._file = open(path, "wb")  # noqa: SIM115  closed by __exit__

    def write(self, payload: bytes) -> None:
        length = _LENGTH.pack(len(payload))
        self._file.write(length + _CRC.pack(masked_crc(length)))
        self._file.write(payload)
        self._file.write(_CRC.pack(masked_crc(payload)))
        self.records += 1

    def flush(self) -> None:
        """Hands what was written to the operating system."""
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def read_records(path: str | Path) -> Iterator[bytes]:
    """Gives the payloads of a file in order, whatever their sizes.

    Raises:
      UserError: naming file and record: cut short, or a wrong checksum.
    """
    with open(path, "rb") as file:
        record = 0
        while header := file.read(_HEADER):
            length = _checked_length(header, path, record)
            payload = file.read(length)
            _check_payload(payload, file.read(_CRC.size), length, path, record)
            yield payload
            record += 1


class FixedStrideReader:
    """Random access to a file of records of one size; may be shared by threads.

    Attributes:
      path: the file.
      payload_bytes: size of every payload.
    """

    def __init__(self, path: str | Path, payload_bytes: int) -> None:
        """Opens the file.

        Raises:
          UserError: it is missing or is not a whole number of records of this size.
        """
        self.path = Path(path)
        self.payload_bytes = payload_bytes
        self._stride = payload_bytes + FRAME_BYTES
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            raise UserError(f"{self.path}: no such file") from None
        size = os.fstat(self._descriptor).st_size
        self._records = size // self._stride
        if size % self._stride:
            self.close()
            raise UserError(
                f"{self.path}: cut short in record {self._records} ({size} bytes, a record takes {self._stride}); "
                "rebuild it"
            )

    def __len__(self) -> int:
        return self._records

    def read(self, record: int, *, verify: bool = True) -> bytes:
        """Payload of record `record`.

        Args:
          record: from 0.
          verify: check the checksums (15 GB/s with the processor's CRC instruction).

        Raises:
          UserError: naming file and record: cut short, or a wrong checksum.
        """
        if not 0 <= record < self._records:
            raise IndexError(f"record {record} of {self._records} in {self.path}")
        frame = os.pread(self._descriptor, self._stride, record * self._stride)
        payload = frame[_HEADER : _HEADER + self.payload_bytes]
        if verify or len(frame) < self._stride:
            length = _checked_length(frame[:_HEADER], self.path, record)
            if length != self.payload_bytes:
                raise UserError(
                    f"{self.path}: record {record} has {length} bytes, expected {self.payload_bytes}; rebuild it"
                )
            _check_payload(payload, frame[_HEADER + length :], length, self.path, record)
        return payload

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            self.close()


def _checked_length(header: bytes, path: str | Path, record: int) -> int:
    if len(header) < _HEADER:
        raise UserError(f"{path}: cut short in record {record}; rebuild it")
    if masked_crc(header[: _LENGTH.size]) != _CRC.unpack(header[_LENGTH.size :])[0]:
        raise UserError(f"{path}: wrong checksum of the length of record {record}: the file is damaged; rebuild it")
    return _LENGTH.unpack(header[: _LENGTH.size])[0]


def _check_payload(payload: bytes, crc: bytes, length: int, path: str | Path, record: int) -> None:
    if len(payload) < length or len(crc) < _CRC.size:
        raise UserError(f"{path}: cut short in record {record}; rebuild it")
    if masked_crc(payload) != _CRC.unpack(crc)[0]:
        raise UserError(f"{path}: wrong checksum of record {record}: the file is damaged; rebuild it")
