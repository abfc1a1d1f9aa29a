"""A training sequence as a `tf.train.Example` of constant size, written and read by hand.

Every feature is a bytes feature that holds a little-endian array of a shape the schema fixes. So all records of a
data set have the same size and differ only inside the arrays: the bytes between them form a template that is made
once, filled for encoding and compared for decoding. Any tool that reads `tf.train.Example` reads the records.
"""

import dataclasses
import math
from functools import cached_property

import numpy as np

from retro_jax.data.chunking import token_dtype
from retro_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class SequenceSchema:
    """Shapes of a training sequence.

    Attributes:
      length: T, tokens of the model's input; a record holds one more, the label of the last position.
      chunk_length: M.
      neighbours: K, neighbours of each chunk.
      neighbour_length: R, tokens of a neighbour with its continuation.
      vocab_size: V.
    """

    length: int
    chunk_length: int
    neighbours: int
    neighbour_length: int
    vocab_size: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise UserError(f"{field.name} must be at least 1, is {getattr(self, field.name)}")
        if self.length % self.chunk_length:
            raise UserError(f"length {self.length} is no multiple of chunk_length {self.chunk_length}")

    @property
    def chunks(self) -> int:
        """L, chunks of a sequence."""
        return self.length // self.chunk_length

    @cached_property
    def features(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Name to (stored dtype, shape), in order of name.

        bytes: [L] UTF-8 bytes of each chunk's text. chunks: [L] ids in the corpus, -1 for padding. distances: [L, K]
        squared L2, inf where there is no neighbour. document_keys: [L] keys of the documents' groups, -1 for padding.
        documents: [L] indices in the corpus, -1 for padding. neighbour_ids: [L, K] chunk ids in the database, -1 for
        none. neighbours: [L, K, R] their tokens, PAD for none. tokens: [T + 1].
        """
        L, K = self.chunks, self.neighbours
        tokens = token_dtype(self.vocab_size)
        return {
            "bytes": (np.dtype("<u4"), (L,)),
            "chunks": (np.dtype("<i8"), (L,)),
            "distances": (np.dtype("<f4"), (L, K)),
            "document_keys": (np.dtype("<i8"), (L,)),
            "documents": (np.dtype("<i8"), (L,)),
            "neighbour_ids": (np.dtype("<i8"), (L, K)),
            "neighbours": (tokens, (L, K, self.neighbour_length)),
            "tokens": (tokens, (self.length + 1,)),
        }

    @property
    def payload_bytes(self) -> int:
        """Size of every encoded example."""
        return len(self._template)

    def encode(self, example: dict[str, np.ndarray]) -> bytes:
        """The `tf.train.Example` of one sequence.

        Args:
          example: an array of the right shape for every feature; integers are checked to fit their stored type.
        """
        if example.keys() != self.features.keys():
            raise ValueError(f"features {sorted(example)}, the schema has {sorted(self.features)}")
        parts = []
        end = 0
        for name, (dtype, shape) in self.features.items():
            start, stop = self._spans[name]
            stored = np.ascontiguousarray(example[name], dtype)
            if stored.shape != shape:
                raise ValueError(f"{name} has shape {stored.shape}, the schema says {shape}")
            if dtype.kind != "f" and not np.array_equal(stored, example[name]):
                raise ValueError(f"{name} does not fit {dtype}")
            parts += [self._template[end:start], stored.tobytes()]
            end = stop
        return b"".join(parts)

    def decode(self, payload: bytes) -> dict[str, np.ndarray]:
        """Arrays of an encoded example, read-only views of `payload` in their stored dtypes.

        Raises:
          UserError: `payload` is not an example of this schema.
        """
        example = {}
        end = 0
        sound = len(payload) == len(self._template)
        for name, (dtype, shape) in self.features.items():
            start, stop = self._spans[name]
            sound = sound and payload[end:start] == self._template[end:start]
            if not sound:
                raise UserError(f"a record of {len(payload)} bytes is not of the schema {self}")
            example[name] = np.frombuffer(payload, dtype, math.prod(shape), start).reshape(shape)
            end = stop
        return example

    @cached_property
    def _template(self) -> bytes:
        return self._layout[0]

    @cached_property
    def _spans(self) -> dict[str, tuple[int, int]]:
        return self._layout[1]

    @cached_property
    def _layout(self) -> tuple[bytes, dict[str, tuple[int, int]]]:
        """An example of zero bytes, and where in it each array lies."""
        # Example{1: Features{1: map entry{1: name, 2: Feature{1: BytesList{1: bytes}}}, ...}}
        features = b""
        starts = {}
        for name, (dtype, shape) in self.features.items():
            size = dtype.itemsize * math.prod(shape)
            entry = _field(1, name.encode()) + _field(2, _field(1, _field(1, bytes(size))))
            features += _field(1, entry)
            starts[name] = len(features) - size  # the array is the last thing in its entry
        template = _field(1, features)
        prefix = len(template) - len(features)
        spans = {}
        for name, (dtype, shape) in self.features.items():
            start = prefix + starts[name]
            spans[name] = (start, start + dtype.itemsize * math.prod(shape))
        return template, spans


def _field(number: int, value: bytes) -> bytes:
    """A length-delimited field of a protocol buffer."""
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
