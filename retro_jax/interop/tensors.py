"""Named arrays on disk in the safetensors format, one file or several with an index: read and written one at a time.

A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON: name to dtype, shape and
place), and the arrays' bytes. It cannot carry code, which pickled checkpoints can: those are never opened.
"""

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from retro_jax.errors import UserError
from retro_jax.files import atomic_write, write_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FLOATS = {"F64", "F32", "F16", "BF16"}
_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32"}
_LISTED = 3


def require_no_file(path: Path) -> None:
    """Raises UserError where a model is named by a file of its directory; a pickled one is refused with advice."""
    if path.is_file():
        if path.suffix in _PICKLED:
            raise _pickled(path)
        raise UserError(f"{path}: a file; give the directory of the model, with config.json and safetensors")


def _pickled(path: Path) -> UserError:
    return UserError(
        f"{path} is pickled, and a pickle can carry code, so it is never loaded; where you trust it, convert it: "
        "AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW) of the transformers library"
    )


class Tensors(Mapping[str, np.ndarray]):
    """The arrays of a checkpoint directory by name; each is read when it is asked for, and kept by nobody.

    Attributes:
      directory: where they are.
      shapes: of every array.
    """

    def __init__(self, directory: str | os.PathLike) -> None:
        """Reads the headers.

        Raises:
          UserError: no safetensors (pickled weights are named, with the way to convert them), an index without its
            files, or a file that is damaged or cut short.
        """
        self.directory = Path(directory)
        self._files: dict[str, Any] = {}
        self._places: dict[str, Path] = {}
        self._types: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in self._paths():
            try:
                file = safe_open(path, framework="numpy")
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    part = file.get_slice(name)
                    self.shapes[name], self._types[name] = tuple(part.get_shape()), part.get_dtype()
                    self._places[name] = path
            except (SafetensorError, OSError) as error:
                reason = " ".join(str(error).split())
                raise UserError(f"{path}: not a whole safetensors file ({reason}); fetch or export it again") from None
            self._files[str(path)] = file

    def __getitem__(self, name: str) -> np.ndarray:
        """The array in float32 (float64 as it is).

        Raises:
          UserError: its numbers are no floats (a quantised checkpoint), or not finite.
        """
        kind, path = self._types[name], self._places[name]
        if kind not in _FLOATS:
            raise UserError(f"{path}: tensor {name} is {kind}; quantised checkpoints are not read, only floats")
        array = self._files[str(path)].get_tensor(name)
        array = array if kind in ("F32", "F64") else array.astype(np.float32)
        if not np.isfinite(array).all():
            raise UserError(f"{path}: tensor {name} has numbers that are not finite; the file is damaged")
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def expect(
        self, shapes: Mapping[str, tuple[int, ...]], described_by: str, *, among: Iterable[str] | None = None
    ) -> None:
        """Raises UserError with the first differences unless these arrays, and no others, are there.

        Args:
          shapes: wanted, by name.
          described_by: what wants them, for the message.
          among: names that are looked at; all of them if not given.
        """
        differences = [f"{name} is missing" for name in shapes if name not in self.shapes]
        differences += [
            f"{name} is {list(self.shapes[name])}, not {list(shape)}"
            for name, shape in shapes.items()
            if name in self.shapes and self.shapes[name] != tuple(shape)
        ]
        differences += [f"{name} is unknown" for name in (self if among is None else among) if name not in shapes]
        if differences:
            more = f" and {len(differences) - _LISTED} more differences" if len(differences) > _LISTED else ""
            raise UserError(
                f"{self.directory}: the tensors are not those of {described_by}: "
                f"{'; '.join(differences[:_LISTED])}{more}"
            )

    def _paths(self) -> list[Path]:
        require_no_file(self.directory)
        if not self.directory.is_dir():
            raise UserError(f"{self.directory}: no such directory")
        single, index = self.directory / WEIGHTS, self.directory / INDEX
        if single.is_file():
            return [single]
        if not index.is_file():
            pickled = sorted(path.name for path in self.directory.iterdir() if path.suffix in _PICKLED)
            if pickled:
                raise _pickled(self.directory / pickled[0])
            raise UserError(f"{self.directory}: neither {WEIGHTS} nor {INDEX} is here")
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if any(Path(name).name != name for name in names):  # a file elsewhere is none of this checkpoint
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{index}: not the index of a sharded safetensors checkpoint") from None
        missing = [name for name in names if not (self.directory / name).is_file()]
        if missing:
            raise UserError(f"{index} names {len(names)} files, {missing[0]} is not here; fetch the whole checkpoint")
        return [self.directory / name for name in names]


def write_tensors(
    directory: str | os.PathLike,
    shapes: Mapping[str, tuple[tuple[int, ...], str]],
    read: Callable[[str], Any],
    *,
    metadata: Mapping[str, str],
    shard_bytes: int | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> list[Path]:
    """Writes arrays one after the other: no more than one is in memory.

    Args:
      directory: of the files, which must exist.
      shapes: name to shape and dtype, in the order they are written.
      read: gives the array of a name, NumPy or JAX; called once for each.
      metadata: of the files' headers.
      shard_bytes: how large a file may become before the next is begun (one array may be larger); None for one file.
      progress: called with the bytes of each array written.

    Returns:
      The files: `model.safetensors`, or several and their index, which is written last.
    """
    directory = Path(directory)
    shards = _shards(shapes, shard_bytes)
    names = [WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        with atomic_write(directory / name) as temporary, open(temporary, "wb") as file:
            file.write(_header({key: shapes[key] for key in shard}, metadata))
            for key in shard:
                shape, dtype = shapes[key]
                array = np.ascontiguousarray(np.asarray(read(key)).astype(jnp.dtype(dtype), copy=False))
                if array.shape != tuple(shape):
                    raise ValueError(f"{key} is {array.shape}, announced as {tuple(shape)}")
                file.write(array.reshape(-1).view(np.uint8).data)
                progress(array.nbytes)
                del array  # before the next is read
    if len(shards) > 1:
        total = sum(_bytes(*shapes[key]) for key in shapes)
        places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    return [directory / name for name in names] + ([directory / INDEX] if len(shards) > 1 else [])


def _shards(shapes: Mapping[str, tuple[tuple[int, ...], str]], limit: int | None) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, (shape, dtype) in shapes.items():
        count = _bytes(shape, dtype)
        if limit and shards[-1] and size + count > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += count
    return shards


def _header(shapes: Mapping[str, tuple[tuple[int, ...], str]], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (shape, dtype) in shapes.items():
        start, end = end, end + _bytes(shape, dtype)
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)  # the arrays begin at a multiple of 8
    return struct.pack("<Q", len(header)) + header


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    return int(np.prod(shape, dtype=np.int64)) * jnp.dtype(dtype).itemsize
