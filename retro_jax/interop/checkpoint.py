"""Any model of this framework on disk, opened the same way: a run, one of its checkpoints, or an export."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from retro_jax.config import MeshConfig, RetroConfig
from retro_jax.data.tokenizer import Tokenizer
from retro_jax.errors import UserError
from retro_jax.files import file_sha256
from retro_jax.interop.architectures import base_settings, with_context
from retro_jax.interop.huggingface import CONFIG, read_json
from retro_jax.interop.pretrained import TOKENIZER_FILES, Opened, is_run, open_pretrained
from retro_jax.interop.tensors import require_no_file
from retro_jax.model.parameters import layer_places
from retro_jax.parallel.mesh import create_mesh
from retro_jax.training.checkpoint import open_params
from retro_jax.training.retrofit import Base
from retro_jax.training.state import plan_model
from retro_jax.training.workdir import BASE, CHECKPOINTS, TOKENIZER, begun_with, load_config

Place = tuple[str | int, ...]


def open_checkpoint(path: str | os.PathLike) -> Opened:
    """A model for export, whose parameters are read when they are asked for.

    Args:
      path: directory of a run (for its newest checkpoint), `RUN/checkpoints/STEP`, or what `load_pretrained` opens.

    Raises:
      UserError: nothing of this is there, or it is damaged.
    """
    workdir, step = _run(Path(path))
    if workdir is None:
        return open_pretrained(path)
    config = load_config(workdir)
    return Opened(
        config.model,
        _readers(workdir, config.model, step)(),
        Tokenizer(workdir / TOKENIZER),
        context=config.data.length,
        neighbours=0 if config.model.is_baseline else config.data.neighbours,
        base_settings=_base_settings(workdir),
    )


def open_base(path: str | os.PathLike) -> Base:
    """A model for a run to begin with; `path` and errors as for `open_checkpoint`.

    Parameters are read when they are asked for, one at a time; those of a run must lie whole in one process.
    """
    workdir, step = _run(Path(path))
    if workdir is None:
        opened = open_pretrained(path)
        settings = with_context(opened.base_settings, opened.context)
        return Base(str(path), opened.config, lambda: opened.read, _fingerprints(Path(path), TOKENIZER_FILES), settings)
    if jax.process_count() > 1:
        raise UserError(f"{path}: several processes cannot begin with a run; write it with launch/export.py first")
    config = load_config(workdir)
    return Base(
        str(path),
        config.model,
        _readers(workdir, config.model, step),
        _fingerprints(workdir, (TOKENIZER,)),
        with_context(_base_settings(workdir), config.data.length),
    )


def _readers(workdir: Path, config: RetroConfig, step: int | None) -> Callable[[], Callable[[str], np.ndarray]]:
    """Gives readers of a run's parameters by the names of `retro_jax.model.parameters`."""
    read = open_params(workdir / CHECKPOINTS, plan_model(config, create_mesh(MeshConfig())).params, step)
    places = layer_places(config)
    return lambda: _layers(places, read)


def _layers(
    places: dict[str, tuple[Place, int | None]], read: Callable[[Place], jax.Array]
) -> Callable[[str], np.ndarray]:
    """Reads parameters by name, of which an array holds those of equal layers.

    An array is kept until each of its parameters was asked for: in the order of `layer_shapes` one is in memory.
    """
    kept: dict[Place, tuple[np.ndarray, set[str]]] = {}

    def parameter(name: str) -> np.ndarray:
        path, index = places[name]
        if path not in kept:
            kept[path] = np.asarray(read(path)), {other for other, (there, _) in places.items() if there == path}
        whole, unread = kept[path]
        unread.discard(name)
        if not unread:
            del kept[path]
        return whole if index is None else whole[index]

    return parameter


def _base_settings(workdir: Path) -> dict[str, Any]:
    """What is known of the model that a run began with."""
    known = begun_with(workdir)
    return base_settings(known["settings"], workdir / BASE) if known else {}


def _fingerprints(directory: Path, names: Iterable[str]) -> tuple[str, ...]:
    """As `Tokenizer.fingerprint`, of those that are there."""
    return tuple(file_sha256(directory / name)[:16] for name in names if (directory / name).is_file())


def _run(path: Path) -> tuple[Path | None, int | None]:
    """The run's directory and the step where `path` is one or a checkpoint of one; None for a model.

    Raises:
      UserError: it is neither.
    """
    require_no_file(path)
    if path.parent.name == CHECKPOINTS and path.name.isdigit():
        return path.parent.parent, int(path.name)
    if not (path / CONFIG).is_file():
        raise UserError(f"{path}: no {CONFIG}, so neither a run nor a model is here")
    return (path if is_run(read_json(path / CONFIG)) else None), None
