"""What must hold for every RETRO, whatever its parameters (spec section 11.1; its numbers in brackets)."""

import dataclasses

import jax
import numpy as np
import pytest
from small import SMALL, encode, inputs, logits, random_parameters

M = SMALL.chunk_length
TOLERANCE = 1e-12


CONFIGS = {
    "transformer_xl": dataclasses.replace(SMALL, num_layers=3, cca_layers=(2, 3)),
    "rope": dataclasses.replace(SMALL, num_layers=2, cca_layers=(1, 2), encoder_layers=1, positions="rope"),
}


@pytest.fixture(scope="module", params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture(scope="module")
def params(config):
    with jax.enable_x64(True):
        return random_parameters(config)


@pytest.fixture
def batch(config):
    return inputs(config)


def other(token):
    return token % (SMALL.vocab_size - 1) + 1


def changed_positions(before, after):
    """Positions of which any logit differs, over the batch."""
    return np.flatnonzero(np.abs(before - after).max(axis=(0, 2)) > TOLERANCE)


def test_no_logit_sees_a_later_token(config, params, batch):  # [2]
    tokens, neighbours = batch
    before = logits(config, params, tokens, neighbours)
    for t in range(tokens.shape[1]):
        changed = tokens.copy()
        changed[:, t] = other(changed[:, t])
        assert changed_positions(before, logits(config, params, changed, neighbours))[0] == t


def test_neighbours_of_a_chunk_are_seen_from_its_last_token_on(config, params, batch):  # [3]
    tokens, neighbours = batch
    before = logits(config, params, tokens, neighbours)
    for chunk in range(neighbours.shape[1]):
        changed = neighbours.copy()
        changed[:, chunk] = other(changed[:, chunk])
        positions = changed_positions(before, logits(config, params, tokens, changed))
        assert positions[0] == (chunk + 1) * M - 1


def test_before_the_first_chunk_ends_on_and_off_are_identical(config, params, batch):  # [4]
    tokens, neighbours = batch
    on, off = logits(config, params, tokens, neighbours), logits(config, params, tokens)
    np.testing.assert_allclose(on[:, : M - 1], off[:, : M - 1], rtol=0, atol=TOLERANCE)
    assert np.abs(on - off)[:, M - 1 :].max(axis=(0, 2)).min() > TOLERANCE


def test_the_order_of_neighbours_does_not_matter(config, params, batch):  # [5]
    tokens, neighbours = batch
    before = logits(config, params, tokens, neighbours)
    np.testing.assert_allclose(logits(config, params, tokens, neighbours[:, :, ::-1]), before, rtol=0, atol=TOLERANCE)


def test_duplicated_neighbours_change_nothing(config, params, batch):  # [6]
    tokens, neighbours = batch
    before = logits(config, params, tokens, neighbours)
    twice = np.concatenate([neighbours, neighbours], axis=2)
    np.testing.assert_allclose(logits(config, params, tokens, twice), before, rtol=0, atol=TOLERANCE)


def test_masked_neighbours_equal_no_neighbours(config, params, batch):  # [7]
    tokens, neighbours = batch
    off = logits(config, params, tokens)
    masked = np.full_like(neighbours, config.pad_id)
    np.testing.assert_allclose(logits(config, params, tokens, masked), off, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(logits(config, params, tokens, neighbours[:, :, :0]), off)


def test_an_empty_neighbour_beside_a_real_one_changes_nothing(config, params, batch):
    tokens, neighbours = batch
    with_empty = neighbours.copy()
    with_empty[:, :, 1] = config.pad_id
    np.testing.assert_allclose(
        logits(config, params, tokens, with_empty),
        logits(config, params, tokens, neighbours[:, :, :1]),
        rtol=0,
        atol=TOLERANCE,
    )


def test_padding_neighbours_on_the_right_changes_nothing(config, params, batch):
    tokens, neighbours = batch
    longer = np.pad(neighbours, ((0, 0), (0, 0), (0, 0), (0, 3)), constant_values=config.pad_id)
    np.testing.assert_allclose(
        logits(config, params, tokens, longer), logits(config, params, tokens, neighbours), rtol=0, atol=TOLERANCE
    )


def test_encoded_chunk_depends_on_tokens_up_to_its_end_only(config, params, batch):  # [10]
    tokens, neighbours = batch
    before = encode(config, params, tokens, neighbours)
    num_chunks = neighbours.shape[1]
    for t in range(tokens.shape[1]):
        changed = tokens.copy()
        changed[:, t] = other(changed[:, t])
        difference = np.abs(encode(config, params, changed, neighbours) - before).max(axis=(0, 2, 3, 4))
        chunk = t // M
        np.testing.assert_allclose(difference[:chunk], 0, atol=TOLERANCE)
        assert chunk == num_chunks or difference[chunk] > TOLERANCE


def test_encoded_neighbours_do_not_see_each_other(config, params, batch):  # [10]
    tokens, neighbours = batch
    before = encode(config, params, tokens, neighbours)
    changed = neighbours.copy()
    changed[:, 1, 0] = other(changed[:, 1, 0])
    difference = np.abs(encode(config, params, tokens, changed) - before).max(axis=(0, 3, 4))
    assert difference[1, 0] > TOLERANCE
    difference[1, 0] = 0
    np.testing.assert_allclose(difference, 0, atol=TOLERANCE)


def test_right_padding_changes_nothing(config, params, batch):
    tokens, neighbours = batch
    before = logits(config, params, tokens, neighbours)
    longer = np.pad(tokens, ((0, 0), (0, M)), constant_values=config.pad_id)  # one more chunk, half of it PAD
    more = np.pad(neighbours, ((0, 0), (0, 1), (0, 0), (0, 0)), constant_values=config.pad_id)
    after = logits(config, params, longer, more)
    np.testing.assert_allclose(after[:, : tokens.shape[1]], before, rtol=0, atol=TOLERANCE)


def test_left_padding_by_chunks_changes_nothing(config, params, batch):
    tokens, neighbours = batch
    before = logits(config, params, tokens, neighbours)
    longer = np.pad(tokens, ((0, 0), (M, 0)), constant_values=config.pad_id)
    more = np.pad(neighbours, ((0, 0), (1, 0), (0, 0), (0, 0)), constant_values=config.pad_id)
    np.testing.assert_allclose(logits(config, params, longer, more)[:, M:], before, rtol=0, atol=TOLERANCE)


def test_left_padding_by_any_number_changes_nothing_without_retrieval(config, params, batch):
    tokens, _ = batch
    longer = np.pad(tokens, ((0, 0), (3, 0)), constant_values=config.pad_id)
    np.testing.assert_allclose(
        logits(config, params, longer)[:, 3:], logits(config, params, tokens), rtol=0, atol=TOLERANCE
    )


def test_sequences_of_a_batch_do_not_see_each_other(config, params, batch):
    tokens, neighbours = batch
    before = logits(config, params, tokens, neighbours)
    changed, more = tokens.copy(), neighbours.copy()
    changed[1], more[1] = other(changed[1]), other(more[1])
    np.testing.assert_allclose(logits(config, params, changed, more)[0], before[0], rtol=0, atol=TOLERANCE)
