"""Any model of this framework on disk, opened the same way: a run, one of its checkpoints, or an export."""

import os
from pathlib import Path

from retro_jax.interop.huggingface import read_json
from retro_jax.interop.pretrained import CONFIG, FORMAT, Pretrained, load_pretrained
from retro_jax.training.trained import load_trained
from retro_jax.training.workdir import CHECKPOINTS


def open_checkpoint(path: str | os.PathLike) -> Pretrained:
    """A model for export.

    Args:
      path: directory of a run (its newest checkpoint is taken), `RUN/checkpoints/STEP`, or what `load_pretrained` opens.

    Raises:
      UserError: nothing of this is there, or it is damaged.
    """
    path, step = Path(path), None
    if path.parent.name == CHECKPOINTS and path.name.isdigit():
        path, step = path.parent.parent, int(path.name)
    elif (path / CONFIG).is_file():
        values = read_json(path / CONFIG)
        if values.get("format") == FORMAT or "model_type" in values:
            return load_pretrained(path)
    run = load_trained(path, step=step)
    neighbours = 0 if run.config.model.is_baseline else run.config.data.neighbours
    return Pretrained(run.config.model, run.params, run.tokenizer, run.config.data.length, neighbours)
