"""Fed a token or a chunk at a time, the model gives the logits of the full forward pass at every position."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import BLOCKS, QUICK, SMALL, graph, inputs, logits, random_parameters

from retro_jax.model.incremental import split_incremental

M = SMALL.chunk_length
SLOTS = 4 * M
CONFIGS = {
    "transformer_xl": SMALL,
    "rope": dataclasses.replace(SMALL, positions="rope", scan_layers=False, cca_layers=(1, 3)),
    "no positions across": dataclasses.replace(SMALL, cross_positions=False, share_embeddings=True, encoder_width=16),
    "continuation alone": dataclasses.replace(SMALL, neighbour_part="continuation", tie_embeddings=False),
    "baseline": dataclasses.replace(SMALL, cca_layers=()),
    **BLOCKS,
}


class Fed:
    """The programs of one configuration, compiled once for tokens and once for chunks."""

    def __init__(self, config, *, neighbours):
        self.config, self.neighbours = config, neighbours
        self.params = random_parameters(config, seed=1)
        self.graph, self.own = self._split()
        model = self._model(self.own)
        self.distances = model.distances(SLOTS)

    def _split(self):
        found = None

        def split(params):
            nonlocal found
            found, own = split_incremental(nnx.merge(graph(self.config), params))
            return own

        return (own := jax.jit(split, compiler_options=QUICK)(self.params)) and (found, own)

    def _model(self, params):
        return nnx.merge(self.graph, params)

    @functools.cached_property
    def advance(self):
        def run(params, distances, state, tokens, slot, neighbours, ends_chunk, complete):
            hidden, state = self._model(params).advance(
                distances, state, tokens, slot, neighbours, ends_chunk=ends_chunk, complete=complete
            )
            return self._model(params).logits(hidden), state

        return jax.jit(run, static_argnums=6, compiler_options=QUICK)

    def chunks(self, tokens, neighbours, count):
        """State and logits after `count` tokens, in pieces of M, the last one filled up with PAD."""
        state = self._model(self.own).empty(len(tokens), SLOTS, self.neighbours)
        found = []
        for start in range(0, count, M):
            piece = np.full((len(tokens), M), self.config.pad_id, np.int32)
            length = min(M, count - start)
            piece[:, :length] = tokens[:, start : start + length]
            near, complete = None, jnp.asarray(length == M)
            if self.neighbours is not None:
                near = np.full(
                    (len(tokens), self.neighbours, self.config.neighbour_length), self.config.pad_id, np.int32
                )
                if length == M:
                    near = neighbours[:, start // M]
            out, state = self.advance(self.own, self.distances, state, piece, start, near, True, complete)
            found.append(out[:, :length])
        return found, state

    def tokens(self, state, tokens, neighbours, first):
        found = []
        for slot in range(first, tokens.shape[1]):
            ends_chunk = (slot + 1) % M == 0
            near = neighbours[:, slot // M] if self.neighbours is not None and ends_chunk else None
            out, state = self.advance(
                self.own, self.distances, state, tokens[:, slot : slot + 1], slot, near, ends_chunk, jnp.asarray(True)
            )
            found.append(out)
        return found


@functools.cache
def fed(name, neighbours):
    with jax.enable_x64(True):
        return Fed(CONFIGS[name], neighbours=neighbours)


@pytest.mark.parametrize("prompt", [0, 1, M - 1, M, M + 1, 2 * M, 3 * M - 1])
@pytest.mark.parametrize(
    ("name", "k"),
    [("transformer_xl", 2), ("transformer_xl", None), ("rope", 2), ("rope", None)],
)
def test_a_prompt_in_chunks_and_then_tokens_equal_the_full_forward_pass(name, k, prompt):
    programs = fed(name, k)
    tokens, neighbours = inputs(programs.config, length=SLOTS - 1, k=2)
    neighbours[0, 1] = 0  # a chunk without neighbours
    neighbours[1, 0, :, 5:] = 0  # whose documents end
    expected = logits(programs.config, programs.params, tokens, neighbours if k else None)
    found, state = programs.chunks(tokens, neighbours, prompt)
    found += programs.tokens(state, tokens, neighbours, prompt)
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, atol=1e-10)


@pytest.mark.parametrize(("name", "k"), [("no positions across", 1), ("continuation alone", 2), ("baseline", None)])
def test_the_other_configurations_too(name, k):
    programs = fed(name, k)
    tokens, neighbours = inputs(programs.config, length=SLOTS, k=k or 1)
    expected = logits(programs.config, programs.params, tokens, neighbours if k else None)
    found, state = programs.chunks(tokens, neighbours, M + 2)
    found += programs.tokens(state, tokens, neighbours, M + 2)
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, atol=1e-10)


@pytest.mark.parametrize("name", ["mistral and qwen", "gpt-2"])
def test_decoders_of_other_models_too_with_a_row_that_begins_later(name):
    programs = fed(name, 1)
    pad = programs.config.pad_id
    tokens, neighbours = inputs(programs.config, length=SLOTS, k=1)
    tokens[1, :3] = pad
    expected = logits(programs.config, programs.params, tokens, neighbours)
    found, state = programs.chunks(tokens, neighbours, M + 2)
    found += programs.tokens(state, tokens, neighbours, M + 2)
    found = np.concatenate(found, axis=1)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-10)
    np.testing.assert_allclose(found[1, 3:], expected[1, 3:], atol=1e-10)


@pytest.mark.parametrize("positions", ["transformer_xl", "rope"])
def test_rows_that_begin_later_are_as_if_by_themselves(positions):
    programs = fed(positions, 2)
    tokens, neighbours = inputs(programs.config, length=SLOTS - 1, k=2)
    for first in (M, 3):  # on the grid of chunks, and between
        late, near = tokens.copy(), neighbours.copy()
        late[1, :first] = 0
        near[1, : first // M] = 0
        found, state = programs.chunks(late, near, 2 * M + 1)
        found += programs.tokens(state, late, near, 2 * M + 1)
        found = np.concatenate(found, axis=1)
        np.testing.assert_allclose(
            found[0], logits(programs.config, programs.params, tokens, neighbours)[0], atol=1e-10
        )
        np.testing.assert_allclose(
            found[1, first:], logits(programs.config, programs.params, late, near)[1, first:], atol=1e-10
        )
        if first == M:
            alone = logits(programs.config, programs.params, tokens[1:, M:], neighbours[1:, 1:])
            np.testing.assert_allclose(found[1, M:], alone[0], atol=1e-10)
