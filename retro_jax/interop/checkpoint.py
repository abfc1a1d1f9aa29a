"""Any model of this framework on disk, opened the same way: a run, one of its checkpoints, or an export."""

import os
from collections.abc import Iterable
from pathlib import Path

import jax

from retro_jax.data.stage import file_sha256
from retro_jax.errors import UserError
from retro_jax.interop.huggingface import CONFIG, read_json
from retro_jax.interop.pretrained import TOKENIZER_FILES, Pretrained, is_run, load_pretrained, open_pretrained
from retro_jax.interop.tensors import require_no_file
from retro_jax.model.parameters import layer_reader
from retro_jax.training.retrofit import Base
from retro_jax.training.trained import load_trained
from retro_jax.training.workdir import CHECKPOINTS, TOKENIZER, load_config


def open_checkpoint(path: str | os.PathLike) -> Pretrained:
    """A model for export.

    Args:
      path: directory of a run (for its newest checkpoint), `RUN/checkpoints/STEP`, or what `load_pretrained` opens.

    Raises:
      UserError: nothing of this is there, or it is damaged.
    """
    workdir, step = _run(Path(path))
    if workdir is None:
        return load_pretrained(path)
    run = load_trained(workdir, step=step)
    neighbours = 0 if run.config.model.is_baseline else run.config.data.neighbours
    return Pretrained(run.config.model, run.params, run.tokenizer, run.config.data.length, neighbours)


def open_base(path: str | os.PathLike) -> Base:
    """A model for a run to begin with; `path` and errors as for `open_checkpoint`.

    Parameters are read when they are asked for: one at a time, but for those of a run, which must lie whole in one
    process.
    """
    workdir, _ = _run(Path(path))
    if workdir is None:
        opened = open_pretrained(path)
        return Base(str(path), opened.config, lambda: opened.read, _fingerprints(Path(path), TOKENIZER_FILES))
    if jax.process_count() > 1:
        raise UserError(f"{path}: several processes cannot begin with a run; write it with launch/export.py first")
    config = load_config(workdir).model
    tokenizers = _fingerprints(workdir, (TOKENIZER,))
    return Base(str(path), config, lambda: layer_reader(open_checkpoint(path).params, config), tokenizers)


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
