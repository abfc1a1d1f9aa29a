"""Every setting of the framework, as frozen dataclasses: typed, strict, and the same as JSON."""

import dataclasses
import difflib
import json
import types
import typing
from typing import Any, TypeVar

import ml_collections

from retro_jax.architecture import REMAT_NAMES, SPECIAL_TOKENS, RetroConfig, RopeScaling  # noqa: F401 (settings too)
from retro_jax.errors import UserError, require, require_choice

T = TypeVar("T")


def _split(entries: tuple[str, ...]) -> tuple[str, ...]:
    """A list given on the command line arrives as one string with commas."""
    return tuple(name for entry in entries for name in entry.split(",") if name)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1, for one of them, takes all that are left.

    Attributes:
      data: batch split, parameters replicated.
      fsdp: batch split, parameters and optimizer state split too (ZeRO-3).
      tensor: heads, feed-forward and vocabulary split.
      context: sequence split, at chunk boundaries; self-attention gathers its keys and values.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    context: int = 1


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read and in which order.

    Attributes:
      sequences: directories of the sequences stage; a comma separates several.
      length: T, tokens of a sequence; 0 takes the length that is stored.
      weights: mixture weight of each; empty for weights by number of sequences.
      neighbours: K fed to the model, at most the K stored.
      seed: of the shuffle and the mixture.
      prompt: tokens at the beginning of each sequence that are given, not predicted, as in question answering; known
        from the sequences. Only the last chunk of a prompt has neighbours.
      score_prompt: the labels of the prompt carry loss too.
    """

    sequences: tuple[str, ...] = ()
    length: int = 0
    weights: tuple[float, ...] = ()
    neighbours: int = 2
    seed: int = 0
    prompt: int = 0
    score_prompt: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "sequences", _split(self.sequences))
        require(self.neighbours >= 1, "data.neighbours must be at least 1 (a baseline ignores it)")

    @property
    def unscored_prompt(self) -> int:
        """Tokens at the beginning of each sequence whose labels carry no loss."""
        return 0 if self.score_prompt else self.prompt


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and one cosine cycle (paper appendix C.1; the rest from spec section 5.1).

    Attributes:
      peak_learning_rate: reached after `warmup_steps`, from `initial_learning_rate`.
      final_fraction: learning rate of the last step as a share of the peak.
      beta1, beta2, epsilon: of Adam.
      weight_decay: applied to matrices and embeddings, not to norms and attention biases.
      clip_norm: global gradient norm above which gradients are scaled down; 0 turns clipping off.
      moments_dtype: of Adam's two moments, "float32" or "bfloat16"; they are updated in float32 either way.
    """

    peak_learning_rate: float = 2e-4
    initial_learning_rate: float = 1e-7
    warmup_steps: int = 750
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    moments_dtype: str = "float32"

    def __post_init__(self) -> None:
        require_choice("optimizer.moments_dtype", self.moments_dtype, ("float32", "bfloat16"))
        require(self.peak_learning_rate > 0, "optimizer.peak_learning_rate must be positive")
        require(self.warmup_steps >= 0, "optimizer.warmup_steps must not be negative")
        require(0 <= self.final_fraction <= 1, "optimizer.final_fraction must be between 0 and 1")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep.

    Attributes:
      every_steps: steps between saves; the last step, SIGTERM and a preemption notice save as well.
      every_minutes: a save as well when the last one is this long ago; 0 for never.
      keep_last: newest checkpoints kept.
      keep_every: checkpoints whose step is a multiple of this are kept for good; 0 for none.
      keep_best: so many checkpoints with the lowest validation loss are kept as well (needs `validation`).
    """

    every_steps: int = 1000
    every_minutes: float = 0.0
    keep_last: int = 2
    keep_every: int = 0
    keep_best: int = 0

    def __post_init__(self) -> None:
        require(self.every_steps > 0, "checkpoint.every_steps must be positive")
        require(self.keep_last > 0, "checkpoint.keep_last must be positive")
        for name in ("every_minutes", "keep_every", "keep_best"):
            require(getattr(self, name) >= 0, f"checkpoint.{name} must not be negative, is {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """Loss on held-out sequences in the course of the run; for bits per byte of whole documents see launch/evaluate.py.

    Attributes:
      sequences: directories of the sequences stage, made with the tokenizer of the training data; empty for none.
      every_steps: steps between validations; the last step validates as well.
      examples: sequences read, from the first in stored order; 0 for all.
    """

    sequences: tuple[str, ...] = ()
    every_steps: int = 1000
    examples: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "sequences", _split(self.sequences))
        require(self.every_steps > 0, "validation.every_steps must be positive")
        require(self.examples >= 0, "validation.examples must not be negative")


@dataclasses.dataclass(frozen=True)
class StabilityConfig:
    """What happens when a step goes wrong. A bad step is skipped: parameters and optimizer stay as they were.

    Attributes:
      max_bad_steps: so many bad steps in a row are skipped; the next one stops the run. 0 stops at the first.
      spike_factor: a step is bad when loss or gradients are not finite, and, unless this is 0, also when its loss is
        more than this times the running average of the losses of good steps (from the 20th good step on).
    """

    max_bad_steps: int = 0
    spike_factor: float = 0.0

    def __post_init__(self) -> None:
        require(self.max_bad_steps >= 0, "stability.max_bad_steps must not be negative")
        require(
            self.spike_factor == 0 or self.spike_factor > 1,
            f"stability.spike_factor is 0 (off) or above 1, is {self.spike_factor}",
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
      model: architecture.
      data, optimizer, mesh, checkpoint, validation, stability: see their classes.
      steps: optimizer steps of the run; the cosine ends there.
      batch_size: sequences of a step, over all devices.
      microbatches: parts that a batch is computed in, one after the other, their gradients summed: less memory.
      vocab_block: vocabulary rows of one block of the loss; 0 for the whole vocabulary at once.
      log_every: steps between metric lines.
      seed: of the parameters' initialisation.
      init_from: model whose parameters this run begins with: a run, a checkpoint of one, an export or a Hugging Face
        checkpoint. `model` then says what the retrieval is like (`cca_layers`, `encoder_*`, ...); the decoder is that
        of the model, and stays as it is (RETROfit, paper section 4.2).
      unfreeze_decoder: with `init_from`: the decoder is trained too.
      encoder_embedding: with `init_from`: the encoder's table begins "random" or as the "decoder"'s.
      cca_gate: 0 trains the decoder alone, without retrieval, in a model that has it (InstructRetro); 1 otherwise.
    """

    model: RetroConfig
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    validation: ValidationConfig = dataclasses.field(default_factory=ValidationConfig)
    stability: StabilityConfig = dataclasses.field(default_factory=StabilityConfig)
    steps: int = 1000
    batch_size: int = 8
    microbatches: int = 1
    vocab_block: int = 16_384
    log_every: int = 10
    seed: int = 0
    init_from: str = ""
    unfreeze_decoder: bool = False
    encoder_embedding: str = "random"
    cca_gate: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "microbatches", "log_every"):
            require(getattr(self, name) > 0, f"{name} must be positive, is {getattr(self, name)}")
        require(
            self.batch_size % self.microbatches == 0,
            f"batch_size {self.batch_size} is not a multiple of microbatches {self.microbatches}",
        )
        require(
            not self.checkpoint.keep_best or bool(self.validation.sequences),
            "checkpoint.keep_best needs validation.sequences",
        )
        require(self.vocab_block >= 0, "vocab_block must not be negative")
        require_choice("encoder_embedding", self.encoder_embedding, ("random", "decoder"))
        require(self.cca_gate in (0, 1), f"cca_gate is 0 or 1, is {self.cca_gate}")
        require(
            self.init_from != "" or not self.unfreeze_decoder, "unfreeze_decoder goes with init_from: there is no base"
        )
        require(
            self.cca_gate == 1 or self.unfreeze_decoder or not self.init_from,
            "cca_gate 0 trains the decoder alone; with init_from it needs unfreeze_decoder",
        )


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as plain JSON types (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[T], values: dict[str, Any], path: str = "config") -> T:
    """Builds the dataclass `cls` from nested plain values, strictly.

    Args:
      cls: a dataclass; fields may be dataclasses, `X | None`, tuples of one element type, or int/float/str/bool.
      values: mapping of field name to value; lists stand for tuples, ints are taken for floats.
      path: name of this mapping, for messages.

    Raises:
      UserError: an unknown key (the nearest is named), a missing one, or a value of another type.
    """
    hints = typing.get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls)}
    for key in values:
        if key not in known:
            raise UserError(f"{path}.{key}: unknown key{did_you_mean(key, known)}")
    arguments = {}
    for name, field in known.items():
        if name in values:
            arguments[name] = _convert(hints[name], values[name], f"{path}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{path}.{name}: missing")
    return cls(**arguments)


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
    """A config dataclass as a ConfigDict, for recipes in experiments/ and --config.a.b=value on the command line."""
    return ml_collections.ConfigDict(dataclasses.asdict(config))


def from_config_dict(cls: type[T], config: ml_collections.ConfigDict) -> T:
    """The typed form of a recipe's ConfigDict; raises UserError as `from_dict` does."""
    return from_dict(cls, config.to_dict())


def did_you_mean(name: str, known: typing.Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest known name, or the list of all when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def _convert(kind: Any, value: Any, path: str) -> Any:
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        (kind,) = [option for option in typing.get_args(kind) if option is not type(None)]
        return _convert(kind, value, path)
    if dataclasses.is_dataclass(kind):
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        if not isinstance(value, dict):
            raise UserError(f"{path}: expected a group of settings, found {value!r}")
        return from_dict(kind, value, path)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{path}: expected a list, found {value!r}")
        element = typing.get_args(kind)[0]
        return tuple(_convert(element, item, f"{path}[{i}]") for i, item in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{path}: expected {kind.__name__}, found {value!r}")
    return value
