"""Writes a model for other tools: as safetensors with its configuration, or as a Hugging Face checkpoint.

A directory is written under another name, read back and compared with the model bit by bit, and only then renamed: it
is there whole and right, or not at all. Parameters are read, written and compared one at a time, in the order in which
the source has them.
"""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from retro_jax.config import RetroConfig, to_dict
from retro_jax.data.tokenizer import Tokenizer
from retro_jax.errors import UserError
from retro_jax.files import TEMPORARY, sync, write_json
from retro_jax.interop.architectures import with_context, write_config
from retro_jax.interop.card import model_card
from retro_jax.interop.huggingface import CONFIG
from retro_jax.interop.naming import Entry, entries
from retro_jax.interop.pretrained import (
    FORMAT,
    RETRIEVAL,
    VERSION,
    Opened,
    Pretrained,
    as_imported,
    open_pretrained,
    retrieval_shapes,
)
from retro_jax.interop.tensors import write_tensors
from retro_jax.lock import LOCK, DirectoryLock
from retro_jax.model.parameters import layer_shapes

SHARD_BYTES = 5_000_000_000
Source = Opened | Pretrained
Read = Callable[[str], Any]


@contextlib.contextmanager
def new_directory(path: str | os.PathLike) -> Iterator[Path]:
    """A directory to write in, that becomes `path` when all went well and vanishes when not.

    It lies in `.tmp-NAME` beside `path`, which is locked: what a killed export left there is removed by the next one of
    this path, and two at a time cannot be.

    Raises:
      UserError: `path` is there and not an empty directory, or another process is writing it.
    """
    path = Path(path).absolute()
    workshop = path.with_name(f"{TEMPORARY}{path.name}")
    _require_free(path)
    workshop.mkdir(parents=True, exist_ok=True)
    try:
        with DirectoryLock(workshop, "wait for it, or give another --output"):
            _clear(workshop)
            _require_free(path)  # its last holder may have finished it
            temporary = workshop / path.name
            temporary.mkdir()
            try:
                yield temporary
                for written in (*temporary.rglob("*"), temporary):
                    sync(written)
                os.replace(temporary, path)
                sync(path.parent)
            finally:
                _clear(workshop)
    finally:
        with contextlib.suppress(OSError):  # another process may be in it
            workshop.rmdir()


def _require_free(path: Path) -> None:
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} is there already; give another --output")


def _clear(workshop: Path) -> None:
    for left in workshop.iterdir():
        if left.name != LOCK:
            shutil.rmtree(left)


def export_native(source: Source, path: str | os.PathLike, *, name: str) -> None:
    """Writes one safetensors file, configuration, tokenizer and model card, as `load_pretrained` reads them.

    Args:
      source: the model.
      path: a directory that is not there yet.
      name: of the model, for the card.

    Raises:
      UserError: the directory is there, or what was written is not what was meant.
    """
    with new_directory(path) as directory:
        write_native(source, directory, name)


def write_native(source: Source, directory: Path, name: str) -> None:
    """As `export_native`, into a directory that is there."""
    read, dtype = source.read, _dtype_of(source.config)
    shapes = {key: (tuple(leaf.shape), dtype) for key, leaf in layer_shapes(source.config).items()}
    _write(directory, shapes, read, label="weights")
    write_json(directory / CONFIG, _values(source))
    _write_tokenizer(directory, source.tokenizer)
    (directory / "README.md").write_text(model_card(source, name), encoding="utf-8")
    found = open_pretrained(directory)
    _require_equal(source.config, found.config, directory)
    _compare(shapes, read, found.read, directory)


def export_huggingface(source: Source, path: str | os.PathLike, *, name: str, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes the decoder, RETRO[OFF], as transformers reads it, and encoder and cross-attention in `retrieval/`.

    What LoRA adds is put into the projections.

    Args:
      source, path, name: as for `export_native`.
      shard_bytes: how large a file of weights may become.

    Raises:
      UserError: no Hugging Face architecture has this decoder, the directory is there, or what was written is not what
        was meant.
    """
    source = _merged(source)
    config, read, tokenizer, dtype = source.config, source.read, source.tokenizer, _dtype_of(source.config)
    ids = {"bos_token_id": tokenizer and tokenizer.bos_id, "eos_token_id": tokenizer and tokenizer.eos_id}
    settings = with_context(ids | source.base_settings, source.context)
    values = write_config(config, settings)
    base = _BaseReader(config, read)
    with new_directory(path) as directory:
        write_json(directory / CONFIG, values | {"torch_dtype": dtype})
        _write(directory, {key: (shape, dtype) for key, shape in base.shapes.items()}, base, "weights", shard_bytes)
        _write_tokenizer(directory, tokenizer)
        (directory / "README.md").write_text(model_card(source, name, huggingface=True), encoding="utf-8")
        if not config.is_baseline:
            own = {key: (shape, dtype) for key, shape in retrieval_shapes(config).items()}
            (directory / RETRIEVAL).mkdir()
            _write(directory / RETRIEVAL, own, read, label="retrieval")
            write_json(directory / RETRIEVAL / CONFIG, _values(source))
        found = open_pretrained(directory)
        if config.is_baseline:  # in a RETRO `open_pretrained` compares the decoders, and the whole is written out
            wanted, there = (as_imported(each, settings, directory / CONFIG) for each in (config, found.config))
            _require_equal(wanted, there, directory)
        else:
            _require_equal(config, found.config, directory)
        _compare(layer_shapes(config), read, found.read, directory)


def _merged(source: Source) -> Opened:
    """The model with what LoRA adds put into the projections."""
    read = source.read
    adapted = {f".attention.{name}": f".attention.{name}_lora" for name in ("query", "value")}

    def merged(name: str) -> Any:
        ending = next((ending for ending in adapted if name.endswith(ending)), None)
        if not source.config.lora_rank or ending is None or not name.startswith("decoder"):
            return read(name)
        lora = name.removesuffix(ending) + adapted[ending]
        down, up = np.asarray(read(f"{lora}.down")), np.asarray(read(f"{lora}.up"))
        return np.asarray(read(name)) + np.einsum("dr,rnh->dnh", down, up)

    config = dataclasses.replace(source.config, lora_rank=0)
    return Opened(config, merged, source.tokenizer, source.context, source.neighbours, source.base_settings)


class _BaseReader:
    """Called with the name of a tensor of a Hugging Face checkpoint, makes it of the decoder's parameters.

    Attributes:
      shapes: of all tensors, in the order of the parameters.
    """

    def __init__(self, config: RetroConfig, read: Read) -> None:
        self._read = read
        self._parts: dict[str, list[Entry]] = {}
        prefix = "transformer." if config.positions == "learned" else "model."
        for entry in entries(config):
            theirs = entry.theirs if entry.theirs.startswith("lm_head") else prefix + entry.theirs
            self._parts.setdefault(theirs, []).append(entry)
        order = {name: place for place, name in enumerate(layer_shapes(config))}
        names = sorted(self._parts, key=lambda name: order[self._parts[name][0].ours])
        self.shapes = {name: self._parts[name][0].their_shape for name in names}

    def __call__(self, name: str) -> np.ndarray:
        parts = [entry.to_theirs(np.asarray(self._read(entry.ours))) for entry in self._parts[name]]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


def _dtype_of(config: RetroConfig) -> str:
    """The parameters', one for all."""
    return str(next(iter(layer_shapes(config).values())).dtype)


def _values(source: Source) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": to_dict(source.config),
        "context": source.context,
        "neighbours": source.neighbours,
        "base": source.base_settings,
        "tokenizer": source.tokenizer and source.tokenizer.fingerprint,
    }


def _write(
    directory: Path,
    shapes: dict[str, tuple[tuple[int, ...], str]],
    read: Read,
    label: str,
    shard_bytes: int | None = None,
) -> None:
    total = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in shapes.values())
    with tqdm(desc=label, total=total, unit="B", unit_scale=True, delay=2) as bar:
        # The header that torch's reader wants.
        write_tensors(directory, shapes, read, metadata={"format": "pt"}, shard_bytes=shard_bytes, progress=bar.update)


def _write_tokenizer(directory: Path, tokenizer: Tokenizer | None) -> None:
    if tokenizer is not None:
        content = tokenizer.path.read_bytes()
        kind = "json" if content.lstrip()[:1] == b"{" else "model"
        (directory / f"tokenizer.{kind}").write_bytes(content)


def _require_equal(wanted: RetroConfig | None, found: RetroConfig | None, directory: Path) -> None:
    if wanted != found:
        raise UserError(f"{directory / CONFIG}: the configuration read back is another one; the disk may be failing")


def _compare(shapes: dict[str, Any], wanted: Read, written: Read, directory: Path) -> None:
    """Raises UserError unless every parameter read back is the model's, bit for bit."""
    for name in tqdm(shapes, desc="reading back", unit="parameter", delay=2):
        if not np.array_equal(_bits(wanted(name)), _bits(written(name))):
            raise UserError(f"{directory}: {name} read back is not what was written; the disk may be failing")


def _bits(parameter: Any) -> np.ndarray:
    array = np.ascontiguousarray(parameter)
    return array.reshape(-1).view(f"u{array.itemsize}")
