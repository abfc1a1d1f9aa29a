"""RETROfit: a trained decoder gets an encoder and chunked cross-attention (paper section 4.2, appendix B.2).

The decoder stays as it is, so that RETRO[OFF] is the model it was, bit for bit; with `model.lora_rank` it gets a small
trained addition, which changes OFF as well. The output projections of the new
cross-attention begin at 0, so that the first step of RETRO[ON] is that model too.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import optax
from jax.sharding import Mesh

from retro_jax.config import RetroConfig, TrainConfig, from_dict, to_dict
from retro_jax.errors import UserError
from retro_jax.model.parameters import fill_layers, layer_shapes
from retro_jax.model.presets import every_third
from retro_jax.training.checkpoint import saved_steps
from retro_jax.training.state import ModelPlan, TrainState, initialise
from retro_jax.training.workdir import CHECKPOINTS, begun_with

# Settings of `RetroConfig` that say how the retrieval is, and how all is computed; the others are the decoder's.
RETRIEVAL = (
    "chunk_length",
    "neighbour_length",
    "cca_layers",
    "encoder_width",
    "encoder_layers",
    "encoder_num_heads",
    "encoder_head_size",
    "encoder_ffw_width",
    "encoder_ca_layers",
    "neighbour_part",
    "cross_positions",
    "share_embeddings",
)
_COMPUTATION = ("dtype", "remat", "scan_layers", "init_scale")
_TABLE = ("encoder_embedding", "table")


class Base(NamedTuple):
    """A trained model: what it is, and how to get at its parameters, by the names of `retro_jax.model.parameters`.

    Attributes:
      name: where it is, for messages.
      config: of the model.
      open: gives a reader of its parameters, at no cost; None of a model that is there no more (`known_base`).
      tokenizers: fingerprints of its tokenizer's files, one of which data must be made with; none where nobody knows.
      settings: what it says of its context and special tokens, kept for exports of the run.
    """

    name: str
    config: RetroConfig
    open: Callable[[], Callable[[str], Any]] | None
    tokenizers: tuple[str, ...] = ()
    settings: Mapping[str, Any] = MappingProxyType({})

    def record(self) -> dict[str, Any] | None:
        """What a run keeps of it: name, configuration, settings, fingerprint; None when it is there no more.

        The fingerprint is of the last layer of every kind of parameter: training changes it, and of a large model it
        is read in a moment. Each is read by a reader of its own, which keeps nothing of those before.
        """
        if self.open is None:
            return None
        digest = hashlib.sha256()
        layers = sorted((name.split(".") for name in layer_shapes(self.config) if ".layers." in name), key=_layer)
        for name in {(*parts[:2], *parts[3:]): ".".join(parts) for parts in layers}.values():
            digest.update(np.asarray(self.open()(name), np.float32).tobytes())
        return {
            "init_from": self.name,
            "model": to_dict(self.config),
            "settings": dict(self.settings),
            "fingerprint": digest.hexdigest()[:16],
        }

    def check_tokenizer(self, fingerprint: str, owner: str) -> None:
        """Raises UserError when the data `owner` was made with another tokenizer than the model was trained with."""
        if self.tokenizers and fingerprint not in self.tokenizers:
            raise UserError(
                f"{owner} was made with tokenizer {fingerprint}, init_from {self.name} was trained with "
                f"{' or '.join(self.tokenizers)}; make the data with the tokenizer that lies there"
            )


def known_base(workdir: str | os.PathLike, name: str) -> Base | None:
    """The model that a run began with, from what the run knows of it: enough to go on from a checkpoint.

    Args:
      workdir: of the run.
      name: `init_from`.

    Returns:
      None where there is no checkpoint, or where the run began with a model of another name.
    """
    known = begun_with(workdir)
    if known is None or known["init_from"] != name:
        return None
    try:
        saved_steps(Path(workdir) / CHECKPOINTS)
    except UserError:
        return None
    return Base(name, from_dict(RetroConfig, known["model"]), None)


def resolve(config: TrainConfig, base: RetroConfig) -> TrainConfig:
    """The run with the decoder of the model that it begins with.

    A baseline gets the retrieval that `config.model` describes, in every third layer from the sixth where it names
    none; with `cca_gate` 0 it gets none then, and is trained further as it is. A RETRO keeps its own, and is trained
    further.

    Raises:
      UserError: the model is too shallow for that rule, it has LoRA of another rank, or the encoder cannot begin with
        its embedding.
    """
    own = RETRIEVAL + _COMPUTATION if base.is_baseline else _COMPUTATION
    changes = {name: getattr(config.model, name) for name in own}
    changes["lora_rank"] = base.lora_rank or config.model.lora_rank
    if config.model.lora_rank not in (0, changes["lora_rank"]):
        raise UserError(
            f"model.lora_rank is {config.model.lora_rank}, and {config.init_from} has LoRA of rank {base.lora_rank}; "
            f"leave it out, or begin with its hf export, which has LoRA in its projections"
        )
    if base.is_baseline:
        changes["cca_layers"] = config.model.cca_layers or (every_third(base.num_layers) if config.cca_gate else ())
        if config.cca_gate and not changes["cca_layers"]:
            raise UserError(f"init_from: a model of {base.num_layers} layers has no sixth; give model.cca_layers")
    resolved = dataclasses.replace(config, model=dataclasses.replace(base, **changes))
    if _copies_embedding(resolved, base) and resolved.model.encoder_width != base.width:
        raise UserError(
            f"encoder_embedding 'decoder' needs model.encoder_width {base.width}, the width of {config.init_from}; "
            f"it is {resolved.model.encoder_width}"
        )
    return resolved


def trains(config: TrainConfig) -> Callable[[tuple[str, ...]], bool] | None:
    """Of the path of a parameter, whether the run trains it; None where it trains all."""
    if not config.cca_gate:
        return lambda path: not _is_retrieval(path)
    frozen = config.init_from and not config.unfreeze_decoder
    return (lambda path: _is_retrieval(path) or _is_lora(path)) if frozen else None


def begin(
    config: TrainConfig, plan: ModelPlan, optimizer: optax.GradientTransformation, mesh: Mesh, base: Base
) -> TrainState:
    """A fresh state whose parameters are those of the base, where it has them.

    What the base has is never drawn, but put in its place one array after the other: the model is in memory once.

    Args:
      config: the run, resolved.
      plan, optimizer, mesh: as for `initialise`.
      base: the model that it begins with.

    Raises:
      UserError: the base is damaged.
    """
    read, there, shapes = base.open(), layer_shapes(base.config), layer_shapes(config.model)
    copies = _copies_embedding(config, base.config)

    def draws(path: tuple[str, ...]) -> bool:
        if not _is_retrieval(path):
            return _is_lora(path) and not base.config.lora_rank
        return base.config.is_baseline and path[-2:] != ("cca", "output") and not (copies and path[0] == _TABLE[0])

    def give(name: str) -> Any:
        if name in there:
            return read(name)
        if name == ".".join(_TABLE):
            return read("embedding.table")
        return np.zeros(shapes[name].shape, shapes[name].dtype)  # the output projection of a new cross-attention

    state = initialise(config.model, plan, optimizer, mesh, config.seed, draws)
    return dataclasses.replace(state, params=fill_layers(state.params, config.model, give))


def _copies_embedding(config: TrainConfig, base: RetroConfig) -> bool:
    """Whether the encoder gets a table of its own that begins as the base's."""
    new = base.is_baseline and not config.model.is_baseline and not config.model.share_embeddings
    return new and config.encoder_embedding == "decoder"


def _is_lora(path: tuple[str, ...]) -> bool:
    return any(name.endswith("_lora") for name in path)


def _is_retrieval(path: tuple[str, ...]) -> bool:
    return path[0] in ("encoder", "encoder_embedding") or "cca" in path


def _layer(parts: list[str]) -> int:
    return int(parts[2])
