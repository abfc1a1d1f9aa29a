"""What a run reads: that it suits the model, and how a batch gets to the devices."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from retro_jax.config import SPECIAL_TOKENS, TrainConfig
from retro_jax.data.sequences import SequenceSource
from retro_jax.data.tokenizer import Tokenizer
from retro_jax.errors import UserError
from retro_jax.parallel import hosts


def check_data(config: TrainConfig, sources: Sequence[SequenceSource], held_out: Sequence[SequenceSource]) -> None:
    """Raises UserError, naming the data set, when one does not suit the model or the others.

    Args:
      config: the run.
      sources: data sets of `data.sequences`.
      held_out: those of `validation.sequences`.
    """
    if not sources:
        raise UserError("data.sequences is empty; name the output of tools/write_sequences.py")
    directories = [*config.data.sequences, *config.validation.sequences]
    for directory, source in zip(directories, [*sources, *held_out], strict=True):
        schema, model = source.schema, config.model
        # PAD, the last token, may have no row.
        if schema.vocab_size - (model.pad_id == schema.vocab_size - 1) > model.vocab_size:
            raise UserError(
                f"{directory}: its tokenizer has {schema.vocab_size} tokens, model.vocab_size is {model.vocab_size}"
            )
        if schema.chunk_length != model.chunk_length or (
            not model.is_baseline and schema.neighbour_length != model.neighbour_length
        ):
            raise UserError(
                f"{directory}: chunks of {schema.chunk_length} and neighbours of {schema.neighbour_length} tokens, the "
                f"model has chunk_length {model.chunk_length} and neighbour_length {model.neighbour_length}"
            )
        if not model.is_baseline and schema.neighbours < config.data.neighbours:
            raise UserError(
                f"{directory}: {schema.neighbours} neighbours a chunk, data.neighbours is {config.data.neighbours}"
            )
        length = config.data.length or sources[0].schema.length
        if schema.length != length:
            raise UserError(f"{directory}: sequences of {schema.length} tokens, expected {length}")
        prompt = config.data.prompt or sources[0].prompt_length
        if source.prompt_length != prompt:
            raise UserError(f"{directory}: prompts of {source.prompt_length} tokens, expected {prompt}")
        if prompt and config.mesh.context != 1:
            raise UserError(f"{directory}: sequences with a prompt are not cut by mesh.context; leave it at 1")
        if source.tokenizer_fingerprint != sources[0].tokenizer_fingerprint:
            raise UserError(f"{directory}: another tokenizer than that of {config.data.sequences[0]}")
    tokenizer = Tokenizer(sources[0].tokenizer_path)
    for name in SPECIAL_TOKENS:
        if getattr(tokenizer, name) != getattr(config.model, name):
            raise UserError(
                f"{directories[0]}: its tokenizer's {name} is {getattr(tokenizer, name)}, model.{name} is "
                f"{getattr(config.model, name)}"
            )
    for directory, source in zip(config.validation.sequences, held_out, strict=True):
        if not len(source):
            raise UserError(f"{directory}: holds no sequence; leave it out of validation.sequences")
    saves, validations = config.checkpoint.every_steps, config.validation.every_steps
    if config.checkpoint.keep_best and saves % validations and validations % saves:
        raise UserError(
            f"checkpoint.keep_best needs saves of validated steps: checkpoint.every_steps {saves} and "
            f"validation.every_steps {validations} are no multiples of each other"
        )


def abstract_batch(config: TrainConfig, sharding: NamedSharding) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch: tokens [B, T+1] and, unless the model is a baseline, neighbours [B, L, K, R], int32.

    Of sequences with a prompt it is [B, T] and [B, 1, K, R], see `to_devices`.
    """
    B, T, model = config.batch_size, config.data.length, config.model
    shapes = {"tokens": (B, T if config.data.prompt else T + 1)}
    if not model.is_baseline:
        chunks = 1 if config.data.prompt else T // model.chunk_length
        shapes["neighbours"] = (B, chunks, config.data.neighbours, model.neighbour_length)
    return {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding) for name, shape in shapes.items()}


def to_devices(
    arrays: dict[str, np.ndarray], rows: Sequence[int], batch_size: int, config: TrainConfig, sharding: NamedSharding
) -> dict[str, jax.Array]:
    """What the model reads of a batch, over all devices.

    Of sequences with a prompt the last token of the last chunk is no input, so that the last complete chunk is the
    prompt's last one, and only the neighbours of that one are read: the others have none.

    Args:
      arrays: features of the sequences that this process has read, one a row.
      rows: which rows of the batch they are.
      batch_size: B.
      config: the run.
      sharding: of the batch.
    """
    prompt = config.data.prompt
    local = {"tokens": arrays["tokens"][:, :-1] if prompt else arrays["tokens"]}
    if not config.model.is_baseline:
        last = prompt // config.model.chunk_length
        chunks = slice(last - 1, last) if prompt else slice(None)
        local["neighbours"] = arrays["neighbours"][:, chunks, : config.data.neighbours]
    return hosts.to_global(local, rows, batch_size, sharding)
