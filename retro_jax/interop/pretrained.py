"""A model with its tokenizer in one directory: what is exported, and what `load_pretrained` opens.

config.json        format, model (`RetroConfig`), context and neighbours of the training, tokenizer's file, and what
                   the Hugging Face checkpoint that its decoder came from says of context and special tokens
model.safetensors  parameters by the names of `retro_jax.model.parameters`, one layer at a time, float32
tokenizer.model    SentencePiece, or tokenizer.json of the tokenizers library
README.md          the model card
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from retro_jax.config import SPECIAL_TOKENS, RetroConfig, from_dict
from retro_jax.data.tokenizer import Tokenizer
from retro_jax.errors import UserError
from retro_jax.interop.architectures import base_settings, read_config, write_config
from retro_jax.interop.huggingface import CONFIG, BaseTensors, open_huggingface, read_json
from retro_jax.interop.tensors import Tensors, require_no_file
from retro_jax.model.parameters import assemble, layer_reader, layer_shapes
from retro_jax.model.retro import Retro

FORMAT, VERSION = "retro_jax", 1
RETRIEVAL = "retrieval"  # beside a Hugging Face checkpoint: encoder and chunked cross-attention
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model and what is needed to use it.

    Attributes:
      config, params: of the model.
      tokenizer: None where the directory has none.
      context: tokens of a sequence in its training; 0 where that is not known.
      neighbours: K in its training; 0 for a baseline.
      base_settings: what the Hugging Face checkpoint that its decoder came from says of context and special tokens (see
        `retro_jax.interop.architectures.base_settings`); empty where it came from none.
    """

    config: RetroConfig
    params: nnx.State
    tokenizer: Tokenizer | None
    context: int
    neighbours: int
    base_settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def read(self) -> Callable[[str], Any]:
        """Gives a parameter by its name in `retro_jax.model.parameters`."""
        return layer_reader(self.params, self.config)

    @property
    def model(self) -> Retro:
        """The module with these parameters."""
        return nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: Retro(self.config))), self.params)


def load_pretrained(path: str | os.PathLike) -> Pretrained:
    """Opens an exported model (`safetensors` or `hf`), or a Hugging Face checkpoint as a baseline.

    The model is in memory once: parameters are read one after the other.

    Args:
      path: the directory.

    Raises:
      UserError: no such model, an architecture that is not supported, tensors that are missing or of another shape, or
        a tokenizer that does not match.
    """
    return open_pretrained(path).load()


@dataclasses.dataclass(frozen=True)
class Opened:
    """A `Pretrained` whose parameters are read one at a time, by name, with `read`."""

    config: RetroConfig
    read: Callable[[str], np.ndarray]
    tokenizer: Tokenizer | None
    context: int
    neighbours: int
    base_settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    def load(self) -> Pretrained:
        """With the parameters in memory."""
        params = assemble(self.config, self.read)
        return Pretrained(self.config, params, self.tokenizer, self.context, self.neighbours, self.base_settings)


def open_pretrained(path: str | os.PathLike) -> Opened:
    """As `load_pretrained`, without reading the parameters yet."""
    path = Path(path)
    require_no_file(path)
    if not (path / CONFIG).is_file():
        raise UserError(f"{path / CONFIG}: no such file, so no model is here; export one with launch/export.py")
    values = read_json(path / CONFIG)
    if values.get("format") == FORMAT:
        config, read = open_native(path, values)
        return _finish(path, values, config, read, values.get("base", {}))
    if is_run(values):
        raise UserError(f"{path} is a run of launch/train.py; export it with launch/export.py first")
    config, base = open_huggingface(path)
    settings = base_settings(values, path / CONFIG)
    if not (path / RETRIEVAL / CONFIG).is_file():
        tokenizer = _tokenizer(path)
        if tokenizer is not None:
            _require_rows(path, tokenizer, config)
            _require_ends(path, tokenizer, settings)
            config = _with_ids(config, tokenizer)
        context = values.get("max_position_embeddings") or values.get("n_positions") or 0
        return Opened(config, base, tokenizer, context, 0, settings)
    values = read_json(path / RETRIEVAL / CONFIG)
    whole = _model_config(path / RETRIEVAL / CONFIG, values)
    if as_imported(whole, settings, path / CONFIG) != config:
        raise UserError(f"{path / RETRIEVAL}: made for another decoder than that of {path / CONFIG}")
    return _finish(path, values, whole, _joined(path, whole, base), settings)


def as_imported(config: RetroConfig, settings: dict[str, Any], path: Path) -> RetroConfig | None:
    """The decoder as `open_huggingface` gives it, with what has no bearing on it at its default.

    Args:
      config: of the model.
      settings: of its base, as of `base_settings`.
      path: of the base's config.json, for messages.

    Returns:
      Its configuration; None where no Hugging Face architecture has this decoder.
    """
    try:
        written = write_config(config, settings)
    except UserError:
        return None
    return read_config(written, path)


def is_run(values: dict[str, Any]) -> bool:
    """Whether this is the config.json of a run, not of a model."""
    return "model" in values and not {"format", "model_type"} & set(values)


def open_native(path: Path, values: dict[str, Any]) -> tuple[RetroConfig, Callable[[str], np.ndarray]]:
    """The configuration and the reader of the parameters of an exported model.

    Args:
      path: its directory.
      values: content of its config.json.

    Raises:
      UserError: another version of the format, a setting that is unknown, or tensors that are not those of the model.
    """
    config = _model_config(path / CONFIG, values)
    tensors = Tensors(path)
    tensors.expect({name: leaf.shape for name, leaf in layer_shapes(config).items()}, str(path / CONFIG))
    return config, tensors.__getitem__


def retrieval_shapes(config: RetroConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a RETRO has beside its decoder's base: encoder and chunked cross-attention."""
    base = layer_shapes(dataclasses.replace(config, cca_layers=()))
    return {name: tuple(leaf.shape) for name, leaf in layer_shapes(config).items() if name not in base}


def _joined(path: Path, config: RetroConfig, base: BaseTensors) -> Callable[[str], np.ndarray]:
    own, tensors = retrieval_shapes(config), Tensors(path / RETRIEVAL)
    tensors.expect(own, str(path / RETRIEVAL / CONFIG))
    return lambda name: tensors[name] if name in own else base(name)


def _model_config(path: Path, values: dict[str, Any]) -> RetroConfig:
    if values.get("version") != VERSION:
        raise UserError(f"{path}: version {values.get('version')} of the format, this program reads {VERSION}")
    if not isinstance(values.get("model"), dict):
        raise UserError(f"{path}: no model in it")
    try:
        return from_dict(RetroConfig, values["model"], "model")
    except UserError as error:  # of the settings themselves too, which know no file
        raise UserError(f"{path}: {error}") from None


def _finish(
    path: Path,
    values: dict[str, Any],
    config: RetroConfig,
    read: Callable[[str], np.ndarray],
    settings: dict[str, Any],
) -> Opened:
    tokenizer = _tokenizer(path)
    counts = {name: values.get(name, 0) for name in ("context", "neighbours")}
    for name, count in counts.items():
        if not isinstance(count, int) or count < 0:
            raise UserError(f"{path}: {name} is {count!r}, not a number")
    if not isinstance(settings, dict):
        raise UserError(f"{path / CONFIG}: base is {settings!r}, not a group of settings")
    if values.get("tokenizer") != (tokenizer and tokenizer.fingerprint):
        found = f"has fingerprint {tokenizer.fingerprint}" if tokenizer else "is missing"
        raise UserError(f"{path}: the tokenizer {found}, the model was made with {values.get('tokenizer')}")
    if tokenizer is not None:
        _require_rows(path, tokenizer, config)
        if _with_ids(config, tokenizer) != config:
            raise UserError(f"{tokenizer.path}: other ids of PAD, BOS, EOS or unknown than the model's")
    return Opened(config, read, tokenizer, **counts, base_settings=base_settings(settings, path / CONFIG))


def _require_rows(path: Path, tokenizer: Tokenizer, config: RetroConfig) -> None:
    last = tokenizer.vocab_size - 1
    if last > config.vocab_size or (last == config.vocab_size and tokenizer.pad_id != last):
        raise UserError(
            f"{tokenizer.path}: {tokenizer.vocab_size} tokens, the model of {path / CONFIG} has {config.vocab_size} "
            f"rows; give the tokenizer that it was trained with"
        )


def _require_ends(path: Path, tokenizer: Tokenizer, settings: dict[str, Any]) -> None:
    """What config.json names as BOS or EOS must be a special token of the tokenizer: one of them is enough.

    It need not be the begin or end that the tokenizer is known by: models for chats end otherwise.
    """
    named = (settings.get(name) for name in ("bos_token_id", "eos_token_id"))
    ids = [token for each in named for token in (each if isinstance(each, list) else [each]) if isinstance(token, int)]
    special = set(np.flatnonzero(tokenizer.token_bytes == 0).tolist()) - {tokenizer.pad_id, tokenizer.unk_id}
    if ids and special.isdisjoint(ids):
        raise UserError(
            f"{tokenizer.path}: BOS {tokenizer.bos_id} and EOS {tokenizer.eos_id}, where {path / CONFIG} names "
            f"{', '.join(map(str, dict.fromkeys(ids)))}; give the tokenizer that the model was trained with"
        )


def _with_ids(config: RetroConfig, tokenizer: Tokenizer) -> RetroConfig:
    """The configuration with the special tokens of a tokenizer."""
    return dataclasses.replace(config, **{name: getattr(tokenizer, name) for name in SPECIAL_TOKENS})


def _tokenizer(path: Path) -> Tokenizer | None:
    return next((Tokenizer(path / name) for name in TOKENIZER_FILES if (path / name).is_file()), None)
