"""The architecture of a model as a frozen dataclass, checked when it is made."""

import dataclasses
from typing import Any

from retro_jax.errors import require, require_choice

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
        require_choice("model.rope_scaling.kind", self.kind, ("linear", "llama3", "yarn"))
        require(self.factor >= 1, f"model.rope_scaling.factor must be at least 1, is {self.factor}")
        require(
            self.kind == "linear" or self.original_length > 0,
            f"model.rope_scaling.original_length must be positive with {self.kind}",
        )
        require(
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
            require(getattr(self, name) > 0, f"model.{name} must be positive, is {getattr(self, name)}")
        _require_layers("model.cca_layers", self.cca_layers, self.num_layers)
        require_choice("model.positions", self.positions, ("transformer_xl", "rope", "learned"))
        self._check_block()
        require_choice("model.neighbour_part", self.neighbour_part, ("both", "neighbour", "continuation"))
        require(
            self.neighbour_part == "both" or self.neighbour_length > self.chunk_length,
            f"model.neighbour_part {self.neighbour_part!r}: neighbours of {self.neighbour_length} tokens have no "
            f"continuation beyond a chunk of {self.chunk_length}",
        )
        require_choice("model.dtype", self.dtype, ("float32", "bfloat16", "float64"))
        kept = self.remat.split(",")
        for name in kept:
            require_choice("model.remat", name, REMAT_NAMES if len(kept) > 1 else ("none", "block", *REMAT_NAMES))
        require(
            self.positions != "rope" or self.head_size % 2 == 0,
            f"model.head_size must be even with rope positions, is {self.head_size}",
        )
        require(
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
                require(getattr(self, name) > 0, f"model.{name} must be positive, is {getattr(self, name)}")
            _require_layers("model.encoder_ca_layers", self.encoder_ca_layers, self.encoder_layers)
            require(
                self.positions != "learned" or self.width % 2 == 0,
                f"model.width must be even where CCA has transformer_xl positions, is {self.width}",
            )
            size, name = (
                (self.encoder_head_size, "encoder_head_size")
                if self.positions == "rope"
                else (self.encoder_width, "encoder_width")
            )
            require(size % 2 == 0, f"model.{name} must be even with {self.positions} positions, is {size}")
        require(0 <= self.pad_id <= self.vocab_size, f"model.pad_id {self.pad_id} is above vocab_size")
        require(
            not self.share_embeddings or self.encoder_width == self.width,
            f"model.share_embeddings needs encoder_width == width, they are {self.encoder_width} and {self.width}",
        )

    def _check_block(self) -> None:
        """What the decoder's block can be."""
        require_choice("model.norm", self.norm, ("rms", "layer"))
        require_choice("model.ffw", self.ffw, ("gelu", "swiglu"))
        require_choice("model.attention_biases", self.attention_biases, ("none", "qkv", "all"))
        for name in ("num_kv_heads", "window", "max_positions", "lora_rank"):
            require(getattr(self, name) >= 0, f"model.{name} must not be negative, is {getattr(self, name)}")
        require(
            self.num_heads % self.kv_heads == 0,
            f"model.num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}",
        )
        require(
            self.positions != "transformer_xl" or self.kv_heads == self.num_heads,
            "model.num_kv_heads goes with rope or learned positions; transformer_xl has keys of the distances per head",
        )
        require(
            self.rope_scaling is None or self.positions == "rope",
            f"model.rope_scaling goes with rope positions, they are {self.positions}",
        )
        require(
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


def _require_layers(name: str, layers: tuple[int, ...], count: int) -> None:
    require(
        all(1 <= layer <= count for layer in layers) and len(set(layers)) == len(layers),
        f"{name} are 1-based and distinct, at most {count}; found {layers}",
    )
