"""Hugging Face checkpoints as the decoder."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax.config import RetroConfig
from retro_jax.errors import UserError
from retro_jax.interop.architectures import read_config
from retro_jax.interop.naming import Entry, entries
from retro_jax.interop.tensors import Tensors

CONFIG = "config.json"
# Buffers that some versions wrote beside the weights; they are made from the configuration.
_BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
_PREFIXES = ("model.", "transformer.")  # none where the base was saved without its head


def open_huggingface(directory: str | os.PathLike) -> tuple[RetroConfig, "BaseTensors"]:
    """A checkpoint as a baseline: its configuration, and the reader of its tensors by our names; none is read yet.

    Args:
      directory: with config.json and safetensors, in one file or several.

    Raises:
      UserError: an architecture or a setting that is not supported, or tensors that are not those of config.json.
    """
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise UserError(f"{path}: no such file; a Hugging Face checkpoint is a directory with {CONFIG} and safetensors")
    config = read_config(read_json(path), path)
    return config, BaseTensors(config, Tensors(directory))


class BaseTensors:
    """Called with the name of a parameter, gives its array out of a Hugging Face checkpoint."""

    def __init__(self, config: RetroConfig, tensors: Tensors) -> None:
        """Compares names and shapes.

        Args:
          config: the baseline that the tensors are to make up.
          tensors: of the checkpoint.

        Raises:
          UserError: with the first differences.
        """
        self._tensors = tensors
        self._entries = {entry.ours: entry for entry in entries(config)}
        names = [name for name in tensors if not name.endswith(_BUFFERS)]
        self._prefix = next((prefix for prefix in _PREFIXES if any(name.startswith(prefix) for name in names)), "")
        wanted = {self._name(entry): entry.their_shape for entry in self._entries.values()}
        if config.tie_embeddings:  # the head may be there as well, which is then the table once more
            names = [name for name in names if name != "lm_head.weight"]
        tensors.expect(wanted, str(tensors.directory / CONFIG), among=names)

    def __call__(self, name: str) -> np.ndarray:
        """The parameter in our shape, float32 or float64 as it is stored; errors as of `Tensors`."""
        entry = self._entries[name]
        return entry.to_ours(self._tensors[self._name(entry)])

    def _name(self, entry: Entry) -> str:
        return entry.theirs if entry.theirs.startswith("lm_head") else self._prefix + entry.theirs


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises UserError naming the file where it is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object")
    return values
