"""Every setting of the framework, as frozen dataclasses: typed, strict, and the same as JSON."""

import dataclasses
import difflib
import json
import types
import typing
from typing import Any, TypeVar

import ml_collections

from retro_jax.errors import UserError

T = TypeVar("T")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _split(entries: tuple[str, ...]) -> tuple[str, ...]:
    """A list given on the command line arrives as one string with commas."""
    return tuple(name for entry in entries for name in entry.split(",") if name)


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, f"{name}: {value!r} is none of {', '.join(choices)}")


def _require_layers(name: str, layers: tuple[int, ...], count: int) -> None:
    _require(
        all(1 <= layer <= count for layer in layers) and len(set(layers)) == len(layers),
        f"{name} are 1-based and distinct, at most {count}; found {layers}",
    )


# What a block can keep for its backward pass: projected queries, keys and values, the relative-position keys, the
# heads' weighted means (before the output projection), what each sublayer adds, and the feed-forward's hidden layer.
REMAT_NAMES = ("query", "key", "value", "relative", "mixed", "added", "hidden")


SPECIAL_TOKENS = ("pad_id", "bos_id", "eos_id", "unk_id")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed for contexts longer than those of the first training.

    Attributes:
      kind: "linear" (all frequencies divided by `factor`), "llama3" (the slow ones only) or "yarn" (as llama3 with a
        ramp over the dimensions, and rotations of another length).
      factor: by which the context grew.
      original_length: tokens of the first training's context; for llama3 and yarn.
      low_frequency_factor, high_frequency_factor: llama3: wavelengths above `original_length / low` are scaled, those
        below `original_length / high` are kept, and what is between goes over smoothly.
      beta_fast, beta_slow: yarn: rotations over `original_length` where the ramp begins and ends.
      truncate: yarn: the ramp begins and ends at whole dimensions.
      attention_factor: yarn: length of the rotated vectors; 0 for 0.1 ln(factor) + 1.
    """

    kind: str
    factor: float
    original_length: int = 0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 0.0

    def __post_init__(self) -> None:
        _require_choice("model.rope_scaling.kind", self.kind, ("linear", "llama3", "yarn"))
        _require(self.factor >= 1, f"model.rope_scaling.factor must be at least 1, is {self.factor}")
        _require(
            self.kind == "linear" or self.original_length > 0,
            f"model.rope_scaling.original_length must be positive with {self.kind}",
        )
        _require(
            self.kind != "llama3" or self.high_frequency_factor > self.low_frequency_factor,
            "model.rope_scaling.high_frequency_factor must be above low_frequency_factor",
        )


@dataclasses.dataclass(frozen=True)
class RetroConfig:
    """The architecture (paper section 2 and Tables 2 and 10). With `cca_layers=()` it is the baseline transformer.

    The settings from `num_kv_heads` to `window` make the decoder's blocks those of models that others trained (Llama,
    Mistral, Qwen, GPT-2); encoder and chunked cross-attention are the paper's beside any of them.

    Attributes:
      vocab_size: V, rows of the embedding tables.
      width: D, decoder width.
      num_layers: decoder blocks.
      num_heads, head_size: N and H of decoder self-attention and chunked cross-attention; N*H may differ from D.
      ffw_width: hidden width of the decoder's feed-forward.
      chunk_length: M, tokens of a chunk.
      neighbour_length: R, tokens of a neighbour with its continuation.
      cca_layers: P, 1-based decoder layers with chunked cross-attention.
      encoder_width: E, width of the neighbour encoder.
      encoder_layers, encoder_num_heads, encoder_head_size, encoder_ffw_width: its sizes.
      encoder_ca_layers: P_enc, 1-based encoder layers that cross-attend to the retrieving chunk.
      neighbour_part: what the encoder reads: "both" a neighbour N and its continuation F, or one of them alone,
        "neighbour" or "continuation" (ablations of the paper's Table 13).
      positions: "transformer_xl" (paper), "rope", or "learned": a vector for each place, counted without PAD, is added
        to the decoder's input, while encoder and chunked cross-attention have transformer_xl.
      cross_positions: positions count in chunked cross-attention and in the encoder's; False is the paper's ablation.
      rope_theta: base of the rotary frequencies.
      rope_scaling: of the frequencies in the decoder's self-attention, or None.
      max_positions: rows of the table of learned positions, the longest context.
      num_kv_heads: key and value heads of decoder self-attention, each shared by as many query heads (grouped-query
        attention); 0 for one each. Not with transformer_xl.
      qk_norm: RMSNorm of each query and key head in decoder self-attention, before they are rotated.
      window: tokens that a position of decoder self-attention sees, itself included; 0 for all before it.
      norm: of the decoder's blocks and output, "rms" or "layer" (with a mean taken off and a bias).
      ffw: decoder feed-forward, "gelu" or "swiglu" (gated, three matrices).
      attention_biases: in decoder self-attention, "none", "qkv" or "all" (the output projection's too).
      ffw_biases: in the decoder's feed-forward.
      tie_embeddings: the output head is the decoder's embedding table.
      share_embeddings: the encoder reads the decoder's embedding table (needs encoder_width == width).
      lora_rank: rank of a trained addition to the query and value projections of the decoder's self-attention (LoRA, Hu
        et al. 2021), which begins at 0; 0 for none.
      norm_epsilon: of every norm.
      init_scale: standard deviation of the initial weights; residual outputs are scaled down by sqrt(2 * num_layers).
      pad_id: token id that is never attended to and never predicted; `vocab_size`, the first id without a row in the
        tables, where a vocabulary has none to spare.
      bos_id, eos_id, unk_id: token ids that begin and end a document, and that stand for what is unknown (-1: none).
      dtype: compute dtype, "float32" or "bfloat16"; parameters, norms, softmax and loss are float32.
      remat: what the backward pass computes again. "none": nothing. "block": all of a block but its input. Or names of
        what a block keeps, separated by commas ("query,key,value,mixed"), out of REMAT_NAMES.
      scan_layers: loop over equal layers at run time, so that compile time does not grow with depth; False writes every
        layer out, which is faster on a CPU (no stacking of what the backward pass needs). The parameters are the same.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    head_size: int
    ffw_width: int
    chunk_length: int = 64
    neighbour_length: int = 128
    cca_layers: tuple[int, ...] = ()
    encoder_width: int = 896
    encoder_layers: int = 2
    encoder_num_heads: int = 16
    encoder_head_size: int = 64
    encoder_ffw_width: int = 3584
    encoder_ca_layers: tuple[int, ...] = (1,)
    neighbour_part: str = "both"
    positions: str = "transformer_xl"
    cross_positions: bool = True
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    max_positions: int = 0
    num_kv_heads: int = 0
    qk_norm: bool = False
    window: int = 0
    norm: str = "rms"
    ffw: str = "gelu"
    attention_biases: str = "none"
    ffw_biases: bool = False
    lora_rank: int = 0
    tie_embeddings: bool = True
    share_embeddings: bool = False
    norm_epsilon: float = 1e-6
    init_scale: float = 0.02
    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    unk_id: int = 3
    dtype: str = "float32"
    remat: str = "none"
    scan_layers: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "cca_layers", tuple(sorted(self.cca_layers)))
        object.__setattr__(self, "encoder_ca_layers", tuple(sorted(self.encoder_ca_layers)))
        for name in ("vocab_size", "width", "num_layers", "num_heads", "head_size", "ffw_width", "chunk_length"):
            _require(getattr(self, name) > 0, f"model.{name} must be positive, is {getattr(self, name)}")
        _require_layers("model.cca_layers", self.cca_layers, self.num_layers)
        _require_choice("model.positions", self.positions, ("transformer_xl", "rope", "learned"))
        self._check_block()
        _require_choice("model.neighbour_part", self.neighbour_part, ("both", "neighbour", "continuation"))
        _require(
            self.neighbour_part == "both" or self.neighbour_length > self.chunk_length,
            f"model.neighbour_part {self.neighbour_part!r}: neighbours of {self.neighbour_length} tokens have no "
            f"continuation beyond a chunk of {self.chunk_length}",
        )
        _require_choice("model.dtype", self.dtype, ("float32", "bfloat16", "float64"))
        kept = self.remat.split(",")
        for name in kept:
            _require_choice("model.remat", name, REMAT_NAMES if len(kept) > 1 else ("none", "block", *REMAT_NAMES))
        _require(
            self.positions != "rope" or self.head_size % 2 == 0,
            f"model.head_size must be even with rope positions, is {self.head_size}",
        )
        _require(
            self.positions != "transformer_xl" or self.width % 2 == 0,
            f"model.width must be even with transformer_xl positions (sine and cosine), is {self.width}",
        )
        if self.cca_layers:
            for name in (
                "neighbour_length",
                "encoder_width",
                "encoder_layers",
                "encoder_num_heads",
                "encoder_head_size",
                "encoder_ffw_width",
            ):
                _require(getattr(self, name) > 0, f"model.{name} must be positive, is {getattr(self, name)}")
            _require_layers("model.encoder_ca_layers", self.encoder_ca_layers, self.encoder_layers)
            _require(
                self.positions != "learned" or self.width % 2 == 0,
                f"model.width must be even where CCA has transformer_xl positions, is {self.width}",
            )
            size, name = (
                (self.encoder_head_size, "encoder_head_size")
                if self.positions == "rope"
                else (self.encoder_width, "encoder_width")
            )
            _require(size % 2 == 0, f"model.{name} must be even with {self.positions} positions, is {size}")
        _require(0 <= self.pad_id <= self.vocab_size, f"model.pad_id {self.pad_id} is above vocab_size")
        _require(
            not self.share_embeddings or self.encoder_width == self.width,
            f"model.share_embeddings needs encoder_width == width, they are {self.encoder_width} and {self.width}",
        )

    def _check_block(self) -> None:
        """What the decoder's block can be."""
        _require_choice("model.norm", self.norm, ("rms", "layer"))
        _require_choice("model.ffw", self.ffw, ("gelu", "swiglu"))
        _require_choice("model.attention_biases", self.attention_biases, ("none", "qkv", "all"))
        for name in ("num_kv_heads", "window", "max_positions", "lora_rank"):
            _require(getattr(self, name) >= 0, f"model.{name} must not be negative, is {getattr(self, name)}")
        _require(
            self.num_heads % self.kv_heads == 0,
            f"model.num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}",
        )
        _require(
            self.positions != "transformer_xl" or self.kv_heads == self.num_heads,
            "model.num_kv_heads goes with rope or learned positions; transformer_xl has keys of the distances per head",
        )
        _require(
            self.rope_scaling is None or self.positions == "rope",
            f"model.rope_scaling goes with rope positions, they are {self.positions}",
        )
        _require(
            (self.positions == "learned") == (self.max_positions > 0),
            f"model.max_positions goes with learned positions and only with them; positions are {self.positions}, "
            f"max_positions is {self.max_positions}",
        )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "RetroConfig":
        """The named size of `retro_jax.model.presets`, with fields replaced by `changes`."""
        from retro_jax.model.presets import preset

        return preset(name, **changes)

    @property
    def kv_heads(self) -> int:
        """Key and value heads of decoder self-attention."""
        return self.num_kv_heads or self.num_heads

    @property
    def is_baseline(self) -> bool:
        return not self.cca_layers

    @property
    def neighbour_range(self) -> tuple[int, int]:
        """First and last + 1 of the R tokens of a neighbour that the encoder reads."""
        middle, end = self.chunk_length, self.neighbour_length
        return {"both": (0, end), "neighbour": (0, middle), "continuation": (middle, end)}[self.neighbour_part]


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
    """

    sequences: tuple[str, ...] = ()
    length: int = 0
    weights: tuple[float, ...] = ()
    neighbours: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "sequences", _split(self.sequences))
        _require(self.neighbours >= 1, "data.neighbours must be at least 1 (a baseline ignores it)")


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
        _require_choice("optimizer.moments_dtype", self.moments_dtype, ("float32", "bfloat16"))
        _require(self.peak_learning_rate > 0, "optimizer.peak_learning_rate must be positive")
        _require(self.warmup_steps >= 0, "optimizer.warmup_steps must not be negative")
        _require(0 <= self.final_fraction <= 1, "optimizer.final_fraction must be between 0 and 1")


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
        _require(self.every_steps > 0, "checkpoint.every_steps must be positive")
        _require(self.keep_last > 0, "checkpoint.keep_last must be positive")
        for name in ("every_minutes", "keep_every", "keep_best"):
            _require(getattr(self, name) >= 0, f"checkpoint.{name} must not be negative, is {getattr(self, name)}")


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
        _require(self.every_steps > 0, "validation.every_steps must be positive")
        _require(self.examples >= 0, "validation.examples must not be negative")


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
        _require(self.max_bad_steps >= 0, "stability.max_bad_steps must not be negative")
        _require(
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
            _require(getattr(self, name) > 0, f"{name} must be positive, is {getattr(self, name)}")
        _require(
            self.batch_size % self.microbatches == 0,
            f"batch_size {self.batch_size} is not a multiple of microbatches {self.microbatches}",
        )
        _require(
            not self.checkpoint.keep_best or bool(self.validation.sequences),
            "checkpoint.keep_best needs validation.sequences",
        )
        _require(self.vocab_block >= 0, "vocab_block must not be negative")
        _require_choice("encoder_embedding", self.encoder_embedding, ("random", "decoder"))
        _require(self.cca_gate in (0, 1), f"cca_gate is 0 or 1, is {self.cca_gate}")
        _require(
            self.init_from != "" or not self.unfreeze_decoder, "unfreeze_decoder goes with init_from: there is no base"
        )
        _require(
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
