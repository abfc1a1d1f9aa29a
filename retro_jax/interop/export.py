"""Writes a model for other tools: as safetensors with its configuration, or as a Hugging Face checkpoint.

A directory is written under another name, read back and compared with the model bit by bit, and only then renamed: it
is there whole and right, or not at all. One parameter at a time is in memory.
"""

import contextlib
import dataclasses
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from retro_jax.config import RetroConfig, to_dict
from retro_jax.data.stage import TEMPORARY, write_json
from retro_jax.data.tokenizer import Tokenizer
from retro_jax.errors import UserError
from retro_jax.interop.architectures import write_config
from retro_jax.interop.card import model_card
from retro_jax.interop.huggingface import CONFIG, open_huggingface
from retro_jax.interop.naming import Entry, entries
from retro_jax.interop.pretrained import (
    FORMAT,
    RETRIEVAL,
    VERSION,
    Pretrained,
    open_native,
    retrieval_shapes,
)
from retro_jax.interop.tensors import Tensors, write_tensors
from retro_jax.model.parameters import layer_reader, layer_shapes

SHARD_BYTES = 5_000_000_000
Read = Callable[[str], Any]


@contextlib.contextmanager
def new_directory(path: str | os.PathLike) -> Iterator[Path]:
    """A directory to write in, that becomes `path` when all went well and vanishes when not.

    Raises:
      UserError: `path` is there and not an empty directory.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} is there already; give another --output")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}-{path.name}")
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def export_native(source: Pretrained, path: str | os.PathLike, *, name: str) -> None:
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


def write_native(source: Pretrained, directory: Path, name: str) -> None:
    """As `export_native`, into a directory that is there."""
    config, read, dtype = source.config, layer_reader(source.params, source.config), _dtype_of(source.config)
    shapes = {key: (tuple(leaf.shape), dtype) for key, leaf in layer_shapes(config).items()}
    values = _values(source)
    _write(directory, shapes, read, label="weights")
    write_json(directory / CONFIG, values)
    _write_tokenizer(directory, source.tokenizer)
    (directory / "README.md").write_text(model_card(source, name), encoding="utf-8")
    found, written = open_native(directory, values)
    _require_equal(config, found, directory)
    _compare(shapes, read, written, directory)


def export_huggingface(
    source: Pretrained, path: str | os.PathLike, *, name: str, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes the decoder, RETRO[OFF], as transformers reads it, and encoder and cross-attention in `retrieval/`.

    What LoRA adds is put into the projections.

    Args:
      source, path, name: as for `export_native`.
      shard_bytes: how large a file of weights may become.

    Raises:
      UserError: no Hugging Face architecture has this decoder, the directory is there, or what was written is not what
        was meant.
    """
    read = _merged(source)
    source = dataclasses.replace(source, config=dataclasses.replace(source.config, lora_rank=0))
    config, tokenizer, dtype = source.config, source.tokenizer, _dtype_of(source.config)
    values = write_config(
        config,
        context=source.context,
        bos_id=tokenizer and tokenizer.bos_id,
        eos_id=tokenizer and tokenizer.eos_id,
    )
    base = _BaseReader(config, read)
    with new_directory(path) as directory:
        write_json(directory / CONFIG, values | {"torch_dtype": dtype})
        _write(directory, {key: (shape, dtype) for key, shape in base.shapes.items()}, base, "weights", shard_bytes)
        _write_tokenizer(directory, tokenizer)
        (directory / "README.md").write_text(model_card(source, name, huggingface=True), encoding="utf-8")
        found, written = open_huggingface(directory)
        ours = {key: (tuple(leaf.shape), dtype) for key, leaf in layer_shapes(found).items()}
        _compare(ours, read, written, directory)
        if config.is_baseline:
            return
        own = {key: (shape, dtype) for key, shape in retrieval_shapes(config).items()}
        (directory / RETRIEVAL).mkdir()
        _write(directory / RETRIEVAL, own, read, label="retrieval")
        write_json(directory / RETRIEVAL / CONFIG, _values(source))
        _compare(own, read, Tensors(directory / RETRIEVAL).__getitem__, directory / RETRIEVAL)


def _merged(source: Pretrained) -> Read:
    """Reads the parameters with what LoRA adds put into the projections."""
    read = layer_reader(source.params, source.config)
    adapted = {f".attention.{name}": f".attention.{name}_lora" for name in ("query", "value")}

    def merged(name: str) -> Any:
        ending = next((ending for ending in adapted if name.endswith(ending)), None)
        if not source.config.lora_rank or ending is None or not name.startswith("decoder"):
            return read(name)
        lora = name.removesuffix(ending) + adapted[ending]
        down, up = np.asarray(read(f"{lora}.down")), np.asarray(read(f"{lora}.up"))
        return np.asarray(read(name)) + np.einsum("dr,rnh->dnh", down, up)

    return merged


class _BaseReader:
    """Called with the name of a tensor of a Hugging Face checkpoint, makes it of the decoder's parameters."""

    def __init__(self, config: RetroConfig, read: Read) -> None:
        self._read = read
        self._parts: dict[str, list[Entry]] = {}
        prefix = "transformer." if config.positions == "learned" else "model."
        for entry in entries(config):
            theirs = entry.theirs if entry.theirs.startswith("lm_head") else prefix + entry.theirs
            self._parts.setdefault(theirs, []).append(entry)
        self.shapes = {name: parts[0].their_shape for name, parts in self._parts.items()}

    def __call__(self, name: str) -> np.ndarray:
        parts = [entry.to_theirs(np.asarray(self._read(entry.ours))) for entry in self._parts[name]]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


def _dtype_of(config: RetroConfig) -> str:
    """The parameters', one for all."""
    return str(next(iter(layer_shapes(config).values())).dtype)


def _values(source: Pretrained) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": to_dict(source.config),
        "context": source.context,
        "neighbours": source.neighbours,
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


def _require_equal(wanted: RetroConfig, found: RetroConfig, directory: Path) -> None:
    if wanted != found:
        raise UserError(f"{directory / CONFIG}: the configuration read back is another one; the disk may be failing")


def _compare(shapes: dict[str, Any], wanted: Read, written: Read, directory: Path) -> None:
    """Raises UserError unless every parameter read back is the model's, bit for bit."""
    for name in tqdm(shapes, desc="reading back", unit="parameter", delay=2):
        if np.asarray(wanted(name)).tobytes() != np.asarray(written(name)).tobytes():
            raise UserError(f"{directory}: {name} read back is not what was written; the disk may be failing")
