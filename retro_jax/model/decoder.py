"""The decoder: blocks with and without CCA, equal runs of them stacked and scanned (paper algorithm 1).

The encoder runs once, inside the first block with CCA, between its ATTN and its CCA. That block, the `entry`, stands
alone; what lies before and after is cut into segments, each a pattern of blocks that repeats, whose parameters are
stacked along a leading axis "layers" and scanned. Compile time then depends on the patterns, not on the depth.
"""

import functools
from typing import NamedTuple

import jax
from flax import nnx

from retro_jax.config import RetroConfig
from retro_jax.model.attention import SelfAttention
from retro_jax.model.chunked_cross_attention import ChunkedCrossAttention, Memory, cca_positions
from retro_jax.model.layers import FeedForward, decoder_form, norm_of, remat
from retro_jax.model.positions import Positions, positions
from retro_jax.model.weights import decoder_stream, stacked, take
from retro_jax.parallel import rules


class Run(NamedTuple):
    """Layers `first` to `first + repeats * len(pattern) - 1`, 1-based: `pattern` (True: with CCA), repeated."""

    first: int
    pattern: tuple[bool, ...]
    repeats: int

    def layers(self) -> list[int]:
        return list(range(self.first, self.first + self.repeats * len(self.pattern)))


class LayerPlan(NamedTuple):
    """How the decoder's layers are laid out; `entry` is min(P), or None for the baseline."""

    before: tuple[Run, ...]
    entry: int | None
    after: tuple[Run, ...]


@functools.cache
def layer_plan(num_layers: int, cca_layers: tuple[int, ...]) -> LayerPlan:
    """The layout with the fewest blocks to compile for any set P of CCA layers.

    Args:
      num_layers: depth of the decoder.
      cca_layers: P, 1-based.
    """
    if not cca_layers:
        return LayerPlan((Run(1, (False,), num_layers),), None, ())
    entry = min(cca_layers)
    before = (Run(1, (False,), entry - 1),) if entry > 1 else ()
    kinds = tuple(layer in cca_layers for layer in range(entry + 1, num_layers + 1))
    return LayerPlan(before, entry, tuple(_runs(kinds, entry + 1)))


def _runs(kinds: tuple[bool, ...], first: int) -> list[Run]:
    """Cuts `kinds` into repeated patterns: fewest blocks in all patterns together, then fewest runs."""
    best: list[tuple[tuple[int, int], list[Run]]] = [((0, 0), [])]  # best[n]: (cost, runs) of the first n layers
    for end in range(1, len(kinds) + 1):
        options = []
        for start in reversed(range(end)):
            length = end - start
            period = next(p for p in range(1, length + 1) if length % p == 0 and _repeats(kinds[start:end], p))
            (blocks, runs), before = best[start]
            run = Run(first + start, kinds[start : start + period], length // period)
            options.append(((blocks + period, runs + 1), [*before, run]))
        best.append(min(options, key=lambda option: option[0]))
    return best[-1][1]


def _repeats(kinds: tuple[bool, ...], period: int) -> bool:
    return kinds == kinds[:period] * (len(kinds) // period)


class Block(nnx.Module):
    """LM block H <- FFW(ATTN(H)), or RETRO block H <- FFW(CCA(ATTN(H), E)) (paper equation 2)."""

    def __init__(self, attention: SelfAttention, cca: ChunkedCrossAttention | None, ffw: FeedForward):
        self.attention = attention
        self.cca = cca
        self.ffw = ffw

    def __call__(self, x: jax.Array, context: "Context") -> jax.Array:
        """x [B, T, D] to [B, T, D]; without memory CCA is skipped."""
        return self.finish(self.attention(x, context.valid, context.self_positions, causal=True), context)

    def finish(self, x: jax.Array, context: "Context") -> jax.Array:
        """The block after its ATTN."""
        if self.cca is not None and context.memory is not None:
            x = self.cca(x, context.memory, context.cca_positions)
        return rules.constrain(self.ffw(x), "batch", "tokens", None)


class Context(NamedTuple):
    """What all blocks see: validity of the tokens [B, T], positions, and E, or None for RETRO[OFF]."""

    valid: jax.Array
    self_positions: Positions
    memory: Memory | None = None
    cca_positions: Positions | None = None


class Segment(nnx.Module):
    """The blocks of one Run: one module per place in the pattern, its parameters stacked over the repeats."""

    def __init__(self, blocks: list[Block], run: Run, config: RetroConfig):
        self.blocks = nnx.List(blocks)
        self.repeats = run.repeats
        self.config = config

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        graphdef, stacked = nnx.split(self.blocks)

        def repeat(x: jax.Array, params: nnx.State) -> tuple[jax.Array, None]:
            for block in nnx.merge(graphdef, params):
                x = remat(self.config, block, scanned=self.config.scan_layers)(x, context)
            return x, None

        if self.config.scan_layers:
            return jax.lax.scan(repeat, x, stacked)[0]
        for index in range(self.repeats):
            x, _ = repeat(x, jax.tree.map(lambda leaf: leaf[index], stacked))  # noqa: B023 (used at once)
        return x


class Decoder(nnx.Module):
    """All blocks and the final norm, from embedded tokens to the input of the output head."""

    def __init__(self, config: RetroConfig, key: jax.Array):
        stream, depth, chosen = decoder_stream(config), config.num_layers, config.cca_layers
        # Drawn for all layers at once and then laid out: a layer's initial parameters depend on the seed and its
        # number, not on P, and a baseline starts from the same ones as RETRO.
        keys = jax.random.split(key, 3)
        form, relative = decoder_form(config), config.positions == "transformer_xl"
        heads = (config.num_heads, config.head_size)
        attention = stacked(
            lambda key: SelfAttention(config, stream, *heads, depth, key, relative=relative, form=form), keys[0], depth
        )
        ffw = stacked(lambda key: FeedForward(config, stream, config.ffw_width, depth, key, form), keys[1], depth)
        cca = stacked(lambda key: ChunkedCrossAttention(config, key), keys[2], len(chosen)) if chosen else None

        def block(run: Run, place: int) -> Block:
            first = run.first + place
            own = None
            if run.pattern[place]:
                # The CCA layers of a repeating pattern follow each other at a fixed stride in P too.
                own = take(cca, slice(chosen.index(first), None, sum(run.pattern)))
                own = take(own, slice(run.repeats))
            layers = slice(first - 1, run.first - 1 + run.repeats * len(run.pattern), len(run.pattern))
            return Block(take(attention, layers), own, take(ffw, layers))

        def segment(run: Run) -> Segment:
            return Segment([block(run, place) for place in range(len(run.pattern))], run, config)

        plan = layer_plan(depth, chosen)
        self.config = config
        self.before = nnx.List([segment(run) for run in plan.before])
        self.entry = Block(take(attention, plan.entry - 1), take(cca, 0), take(ffw, plan.entry - 1)) if chosen else None
        self.after = nnx.List([segment(run) for run in plan.after])
        self.norm = norm_of(form, config, stream)

    def context(self, valid: jax.Array) -> Context:
        """For tokens of validity [B, T], without memory."""
        config, length = self.config, valid.shape[1]
        where = positions(
            config,
            query_width=config.width,
            head_size=config.head_size,
            queries=length,
            keys=length,
            causal=True,
            parts=rules.axis_size("context"),
        )
        return Context(valid, where)

    def enter(self, x: jax.Array, context: Context) -> jax.Array:
        """[B, T, D] up to and with ATTN of layer min(P): the H that the encoder is conditioned on."""
        for segment in self.before:
            x = segment(x, context)
        if self.entry is not None:
            attention = functools.partial(self.entry.attention, causal=True)
            x = remat(self.config, attention)(x, context.valid, context.self_positions)
        return rules.constrain(x, "batch", "tokens", None)

    def leave(self, x: jax.Array, context: Context, memory: Memory | None) -> jax.Array:
        """[B, T, D] from where `enter` stopped to the end, final norm included; memory None is RETRO[OFF]."""
        if memory is not None:
            where = cca_positions(self.config, memory.values.shape[-2])
            context = context._replace(memory=memory, cca_positions=where)
        if self.entry is not None:
            x = remat(self.config, self.entry.finish)(x, context)
        for segment in self.after:
            x = segment(x, context)
        return self.norm(x)
