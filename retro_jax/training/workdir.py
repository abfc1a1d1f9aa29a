"""The directory of one run: its resolved configuration, tokenizer, metrics and checkpoints."""

import json
import os
from pathlib import Path
from typing import Any

from retro_jax.config import TrainConfig, from_dict, to_dict
from retro_jax.errors import UserError
from retro_jax.files import TEMPORARY, atomic_write, file_sha256, write_json
from retro_jax.lock import LOCK, DirectoryLock

CONFIG = "config.json"
SHARDINGS = "shardings.txt"  # how the parameters lie on the mesh of the last start
CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer.model"
WENT_BACK = "went_back.json"
BASE = "base.json"  # the model that the run began with

# Settings that change no number of the run beyond the last digits, so that a resumed run may have others: where and in
# which order the same sums are computed, what is kept, what is looked at besides. Sequences may have moved: their
# fingerprints stand in every checkpoint; so may the model that the run began with, whose fingerprint is kept.
# `stability` only says when a run that goes wrong is stopped.
CHANGEABLE = (
    "mesh.",
    "checkpoint.",
    "validation.",
    "stability.",
    "microbatches",
    "vocab_block",
    "model.remat",
    "log_every",
    "data.sequences",
    "init_from",
)


def claim_workdir(workdir: str | os.PathLike) -> DirectoryLock:
    """Creates the directory when absent, and locks it for this run; to be held until the run ends.

    Raises:
      UserError: another run is using it, or it holds other files than a run's.
      TemporaryError: another host holds it, which may be gone, and did not give it up within two minutes.
    """
    workdir = Path(workdir)
    _refuse_other_files(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    return DirectoryLock(workdir, "wait for that run, stop it, or give another --workdir")


def open_workdir(
    workdir: str | os.PathLike, config: TrainConfig, tokenizer: Path, base: dict[str, Any] | None = None
) -> Path:
    """Creates the directory, or checks that it belongs to this very configuration, and records what the run is.

    Args:
      workdir: the directory.
      config: the run.
      tokenizer: SentencePiece model its data was made with; copied, so that the run can be evaluated and sampled
        when its data is gone.
      base: `retrofit.Base.record` of the model that the run begins with; None where there is none, or where it is
        there no more.

    Raises:
      UserError: it holds another run (each differing setting is named), one that began with another model, or other
        files.
    """
    workdir = Path(workdir)
    _refuse_other_files(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    if (workdir / CONFIG).is_file():
        found, wanted = _flat(to_dict(load_config(workdir))), _flat(to_dict(config))
        different = [
            f"{key} = {found.get(key)} (now {wanted.get(key)})"
            for key in sorted(found.keys() | wanted.keys())
            if found.get(key) != wanted.get(key) and not key.startswith(CHANGEABLE)
        ]
        if different:
            raise UserError(
                f"{workdir} belongs to a run with {', '.join(different)}; give another --workdir or the same settings"
            )
    known = begun_with(workdir)
    if base and known and known["fingerprint"] != base["fingerprint"]:
        raise UserError(
            f"{workdir} began with another model, {known['fingerprint']} of {known['init_from']}, than "
            f"{base['init_from']} is now, {base['fingerprint']}; give another --workdir or the model it began with"
        )
    if not (workdir / TOKENIZER).is_file():
        with atomic_write(workdir / TOKENIZER) as temporary:
            temporary.write_bytes(tokenizer.read_bytes())
    elif file_sha256(workdir / TOKENIZER) != file_sha256(tokenizer):
        raise UserError(f"{workdir} was begun with another tokenizer than {tokenizer}; give another --workdir")
    write_json(workdir / CONFIG, to_dict(config))
    if base:
        write_json(workdir / BASE, base)
    return workdir


def begun_with(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """`retrofit.Base.record` of the model that the run of this directory began with, or None.

    Raises:
      UserError: it is not readable.
    """
    path = Path(workdir) / BASE
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); the model that the run began with cannot be told") from None


def load_config(workdir: str | os.PathLike) -> TrainConfig:
    """The configuration a run was started with.

    Raises:
      UserError: there is no run here, or its configuration is not readable.
    """
    path = Path(workdir) / CONFIG
    if not path.is_file():
        raise UserError(
            f"{workdir}: no {CONFIG}, so no run is here; --workdir names the directory given to launch/train.py"
        )
    try:
        return from_dict(TrainConfig, json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); the run cannot be identified") from None


def went_back_to(workdir: str | os.PathLike) -> int | None:
    """The step that the run last went back to on demand (see `note_going_back`), or None."""
    path = Path(workdir) / WENT_BACK
    return json.loads(path.read_text(encoding="utf-8"))["step"] if path.is_file() else None


def note_going_back(workdir: str | os.PathLike, step: int) -> None:
    """Remembers that going back to `step` is done: the same command after an interruption must not do it again."""
    write_json(Path(workdir) / WENT_BACK, {"step": step})


def _refuse_other_files(workdir: Path) -> None:
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"{workdir} is a file; --workdir names a directory")
    if not workdir.exists() or (workdir / CONFIG).is_file():
        return
    if any(path.name not in (TOKENIZER, LOCK) and not path.name.startswith(TEMPORARY) for path in workdir.iterdir()):
        raise UserError(f"{workdir} is not empty and holds no run; give another --workdir")


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    if isinstance(value, dict):
        return {key: leaf for name, item in value.items() for key, leaf in _flat(item, f"{prefix}{name}.").items()}
    return {prefix.removesuffix("."): value}
