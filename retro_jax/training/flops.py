"""Floating-point operations of the model in closed form, and the share of a chip's peak that they make (MFU).

Two per multiply-add, matrix products only: what stands beside them (norms, softmax, GELU) is below a few per cent.

- Model FLOPs are what the mathematics asks for: one forward pass, and a backward pass of twice as much. Of a decoder
  that is frozen (RETROfit) the weights have no gradient, and what stands before the first trained parameter has no
  backward pass. Decoder self-attention is causal, so half of its T x T products count (`causal=True`; with False all
  of them, as some published figures do). What is computed again to save memory does not count.
- Hardware FLOPs are what the program executes: recomputation, and masked or padded products where the code does them.

    MFU = step_flops / (peak_flops * seconds of a step * chips)       HFU = hardware_flops / (same)

B sequences of T tokens in L = T // M chunks with K neighbours of R tokens each; D, E widths of decoder and encoder.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from retro_jax.config import RetroConfig, TrainConfig
from retro_jax.errors import UserError
from retro_jax.model.attention import causal_blocks
from retro_jax.parallel.chips import chip_of


class Flops(NamedTuple):
    """FLOPs by part: decoder self-attention and feed-forward, neighbour encoder, CCA, output head."""

    decoder: float
    encoder: float
    cca: float
    head: float

    @property
    def total(self) -> float:
        return sum(self)


class Product(NamedTuple):
    """The matrix products of one kind in one forward pass.

    Attributes:
      part: field of `Flops`.
      name: what they compute: "query", "key", "value", "relative", "scores", "places" (the scores of positions),
        "mixed", "added", "hidden", "down" or "head"; what a block can keep for its backward pass has the name that
        `remat` gives it.
      flops: of the mathematics.
      executed: of the code, which also multiplies some of what is masked or at distances that do not occur.
      causal: half of `flops` is masked.
      per_batch: False for relative-position keys, which every micro-batch computes once for all its sequences.
      backward: products of this size in the backward pass: of both operands' gradients, or of fewer.
      differentiated: False where there is no backward pass at all, so that nothing is computed again for it.
    """

    part: str
    name: str
    flops: float
    executed: float
    causal: bool = False
    per_batch: bool = True
    backward: int = 2
    differentiated: bool = True


def forward_flops(
    config: RetroConfig,
    batch_size: int,
    length: int,
    neighbours: int,
    chunks: int | None = None,
    *,
    causal: bool = True,
) -> Flops:
    """Model FLOPs of one forward pass.

    Args:
      config: the model.
      batch_size: B.
      length: T, tokens of a sequence.
      neighbours: K; 0 is RETRO[OFF]. A baseline ignores it.
      chunks: how many have neighbours; None for all complete ones.
      causal: decoder self-attention counts half of its T x T products.
    """
    sums = dict.fromkeys(Flops._fields, 0.0)
    for product in _products(config, batch_size, length, neighbours, chunks):
        sums[product.part] += _counted(product, causal)
    return Flops(**sums)


def step_flops(config: TrainConfig, *, causal: bool = True) -> float:
    """Model FLOPs of one optimizer step over all devices: three times the forward pass, less where weights are frozen.

    Raises:
      UserError: `data.length` is 0 (take the stored length), which this cannot know.
    """
    products = _products(config.model, *_shape(config), frozen=_is_frozen(config))
    return sum((1 + product.backward) * _counted(product, causal) for product in products)


def hardware_flops(config: TrainConfig) -> float:
    """FLOPs that one optimizer step executes over all devices, recomputation and padded products included.

    What several devices compute alike (relative-position keys) counts once; the exact number of a compiled program on a
    mesh is counted by `retro_jax.parallel.hlo`.

    Raises:
      UserError: as `step_flops`.
    """
    total = 0.0
    # Over `context` every part of the queries multiplies all keys.
    blocks = config.mesh.context == 1
    for product in _products(config.model, *_shape(config), blocks=blocks, frozen=_is_frozen(config)):
        again = _again(config.model.remat, product.name) if product.differentiated else 0
        if product.name == "head":
            total += _head(config, product)
        elif product.per_batch:
            total += product.executed * (1 + product.backward + again)
        else:  # the sinusoids are constants, without a gradient
            total += product.executed * (1 + min(product.backward, 1) + again) * config.microbatches
    return total


def processed_tokens(config: TrainConfig) -> int:
    """Positions that a step computes: targets and, for a RETRO, the tokens that the encoder reads."""
    batch_size, length, neighbours, chunks = _shape(config)
    if config.model.is_baseline or not neighbours:
        return batch_size * length
    read = chunks * neighbours * len(range(*config.model.neighbour_range))
    return batch_size * (length + read)


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Dense peak of one chip in FLOP/s.

    Args:
      device_kind: `jax.Device.device_kind`.
      dtype: of the operands, "bfloat16" or "float32" (at JAX's default precision: bfloat16 on TPU, TF32 on GPU).

    Returns:
      None when it is not known: a CPU, another dtype, a board that `retro_jax.parallel.chips` does not list.
    """
    chip = chip_of(device_kind)
    if chip is None:
        return None
    return {"bfloat16": chip.bf16_flops, "float32": chip.float32_flops}.get(dtype)


def _shape(config: TrainConfig) -> tuple[int, int, int, int]:
    """B, T, K and the chunks with neighbours, of what a step computes (`retro_jax.training.inputs`)."""
    if not config.data.length:
        raise UserError("FLOPs need data.length; 0 stands for the length that is stored")
    neighbours = config.data.neighbours if config.cca_gate else 0
    if config.data.prompt:
        return config.batch_size, config.data.length - 1, neighbours, 1
    return config.batch_size, config.data.length, neighbours, config.data.length // config.model.chunk_length


def _is_frozen(config: TrainConfig) -> bool:
    """Whether the weights of the decoder, those of its cross-attention apart, are not trained."""
    return config.init_from != "" and not config.unfreeze_decoder


def _counted(product: Product, causal: bool) -> float:
    return product.flops / 2 if causal and product.causal else product.flops


def _head(config: TrainConfig, head: Product) -> float:
    """The loss computes each of several blocks of logits again, and fills the last one up."""
    vocab = config.model.vocab_size
    blocks = math.ceil(vocab / config.vocab_block) if config.vocab_block else 1
    if blocks == 1:
        return (1 + head.backward) * head.executed
    return (2 + head.backward) * head.executed * blocks * math.ceil(vocab / blocks) / vocab


def _again(remat: str, name: str) -> int:
    """How often the backward pass repeats a product."""
    if remat == "none" or name == "down":  # nothing in the backward pass needs the last product of a block
        return 0
    return 0 if name in remat.split(",") else 1


def _products(
    config: RetroConfig,
    batch_size: int,
    length: int,
    neighbours: int,
    chunks: int | None = None,
    *,
    blocks: bool = True,
    frozen: bool = False,
) -> Iterator[Product]:
    """Every kind of matrix product of one forward pass.

    Arguments as `forward_flops`, `blocks` as `_causal_scores`; with `frozen` the decoder's weights have no gradient.
    """
    chunks = length // config.chunk_length if chunks is None else chunks
    heads, encoder_heads = config.num_heads * config.head_size, config.encoder_num_heads * config.encoder_head_size
    tokens = batch_size * length
    stream = (tokens, config.width)
    attention = [
        *_projections("decoder", stream, stream, heads, config.kv_heads * config.head_size),
        *_causal_scores(config, batch_size, length, heads, blocks),
    ]
    ffw = _feed_forward("decoder", *stream, config.ffw_width, gated=config.ffw == "swiglu")
    logits = 2.0 * tokens * config.width * config.vocab_size
    head = Product("head", "head", logits, logits)
    if frozen:
        # ATTN of layer min(P) and what stands before it lead to nothing that is trained, but for LoRA.
        still = 0 if config.lora_rank else min(config.cca_layers, default=config.num_layers)
        yield from _partly(config.num_layers, still, attention)
        yield from _partly(config.num_layers, max(still - 1, 0), ffw)
        yield _frozen(head)
    else:
        yield from _times(config.num_layers, *attention, *ffw)
        yield head
    yield from _times(config.num_layers, *_low_rank(config, tokens))
    if config.is_baseline or not neighbours or not chunks:
        return
    m, r = config.chunk_length, len(range(*config.neighbour_range))
    chunked, retrieved = batch_size * chunks * m, batch_size * chunks * neighbours * r
    decoder, encoder = (chunked, config.width), (retrieved, config.encoder_width)
    relative = config.positions != "rope"
    relative_cross = relative and config.cross_positions
    yield from _times(
        len(config.cca_layers),
        *_projections("cca", decoder, encoder, heads),
        *_scores("cca", decoder, neighbours * r, (r, m + r), heads, relative_cross),
    )
    yield from _times(
        config.encoder_layers,
        *_projections("encoder", encoder, encoder, encoder_heads),
        *_scores("encoder", encoder, r, (r, 2 * r), encoder_heads, relative),
        *_feed_forward("encoder", *encoder, config.encoder_ffw_width),
    )
    yield from _times(
        len(config.encoder_ca_layers),
        *_projections("encoder", encoder, decoder, encoder_heads),
        *_scores("encoder", encoder, m, (m, m + r), encoder_heads, relative_cross),
    )


def _partly(layers: int, still: int, layer: list[Product]) -> Iterator[Product]:
    """Products of a frozen layer, `layers` times, of which the first `still` have no backward pass."""
    yield from _times(still, *(product._replace(backward=0, differentiated=False) for product in layer))
    yield from _times(layers - still, *map(_frozen, layer))


def _frozen(product: Product) -> Product:
    """With constants in the place of its weight, or of what was made of weights alone."""
    constant = {"scores": 0, "mixed": 0, "relative": 2}
    return product._replace(backward=product.backward - constant.get(product.name, 1))


def _projections(
    part: str, queries: tuple[int, int], source: tuple[int, int], heads: int, pairs: int | None = None
) -> list[Product]:
    """Of `queries` and `source`, each (positions over the batch, width), to `heads` numbers a query and `pairs`, as
    many if not given, a key and a value."""
    from_queries, from_source = 2.0 * math.prod(queries) * heads, 2.0 * math.prod(source) * (pairs or heads)
    flops = {"query": from_queries, "key": from_source, "value": from_source, "added": from_queries}
    return [Product(part, name, value, value) for name, value in flops.items()]


def _low_rank(config: RetroConfig, positions: int) -> list[Product]:
    """LoRA's additions to query and value."""
    if not config.lora_rank:
        return []
    widths = {"query": config.num_heads * config.head_size, "value": config.kv_heads * config.head_size}
    flops = {name: 2.0 * positions * config.lora_rank * (config.width + width) for name, width in widths.items()}
    return [Product("decoder", name, value, value) for name, value in flops.items()]


def _scores(
    part: str, queries: tuple[int, int], keys: int, places: tuple[int, int], heads: int, relative: bool
) -> list[Product]:
    """Each query with `keys` keys, and with the relative positions (that occur to one query, that are computed)."""
    positions, width = queries
    pairs = 2.0 * positions * keys * heads
    found = [Product(part, "scores", pairs, pairs), Product(part, "mixed", pairs, pairs)]
    if relative:
        needed, computed = (2.0 * positions * count * heads for count in places)
        found.append(Product(part, "places", needed, computed))
        found.append(_relative(part, places[1], width, heads))
    return found


def _causal_scores(config: RetroConfig, batch_size: int, length: int, heads: int, blocks: bool) -> list[Product]:
    """Decoder self-attention; in `blocks` the code leaves out the keys behind each block of queries."""
    spans = [(stop - start, stop) for start, stop in causal_blocks(length)] if blocks else [(length, length)]
    reach = min(config.window or length, length)
    seen = length * length if reach == length else reach * (2 * length - reach + 1)  # twice the pairs in the window
    pairs = 2.0 * batch_size * seen * heads
    executed = 2.0 * batch_size * heads * sum(queries * keys for queries, keys in spans)
    found = [Product("decoder", name, pairs, executed, causal=True) for name in ("scores", "mixed")]
    if config.positions == "transformer_xl":
        executed = 2.0 * batch_size * heads * sum(queries * (keys + 1) for queries, keys in spans)
        found.append(Product("decoder", "places", pairs, executed, causal=True))
        found.append(_relative("decoder", length + 1, config.width, heads))
    return found


def _relative(part: str, distances: int, width: int, heads: int) -> Product:
    flops = 2.0 * distances * width * heads
    return Product(part, "relative", flops, flops, per_batch=False)


def _feed_forward(part: str, positions: int, width: int, hidden: int, *, gated: bool = False) -> list[Product]:
    flops = 2.0 * positions * width * hidden
    return [Product(part, name, flops, flops) for name in ("hidden", *(("hidden",) if gated else ()), "down")]


def _times(count: int, *layer: Product) -> Iterable[Product]:
    return [product._replace(flops=count * product.flops, executed=count * product.executed) for product in layer]
