"""The Flax BERT computes what BERT is, from any checkpoint of the Hugging Face form, and refuses others clearly."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference_bert
import tiny_bert
from flax import nnx
from safetensors.numpy import load_file, save_file

from retro_jax.errors import UserError
from retro_jax.retrieval.bert import load_bert


def run(bert, rows: list[list[int]], length: int) -> np.ndarray:
    tokens = np.zeros((len(rows), length), np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    graph, state = nnx.split(bert)
    return np.asarray(jax.jit(lambda s, t, m: nnx.merge(graph, s)(t, m))(state, jnp.asarray(tokens), jnp.asarray(mask)))


@pytest.mark.parametrize(
    "changes",
    [{}, {"hidden_act": "gelu_new"}, {"hidden_act": "relu", "num_hidden_layers": 1, "num_attention_heads": 1}],
)
def test_agrees_with_numpy_for_any_shape_of_bert(tmp_path, changes):
    bert = load_bert(tiny_bert.write_tiny_bert(tmp_path, **changes))
    config = tiny_bert.CONFIG | changes
    rows = [np.random.default_rng(n).integers(0, config["vocab_size"], n).tolist() for n in (1, 3, 17, 24)]
    hidden = run(bert, rows, 24)
    weights = tiny_bert.tensors(config)
    for i, row in enumerate(rows):
        np.testing.assert_allclose(
            hidden[i, : len(row)], reference_bert.hidden_states(weights, config, row), atol=2e-5, rtol=0
        )


def test_pretrained_weights_agree_with_numpy(embedder_directory):
    config = json.loads((embedder_directory / "config.json").read_text())
    weights = load_file(embedder_directory / "model.safetensors")
    rows = [[101, 1996, 4248, 2829, 4419, 14523, 2058, 1996, 13971, 3899, 102], [101, 1037, 102]]
    hidden = run(load_bert(embedder_directory), rows, 16)
    for i, row in enumerate(rows):
        expected = reference_bert.hidden_states(weights, config, row)
        assert np.abs(hidden[i, : len(row)] - expected).max() < 1e-4


def test_padding_changes_nothing(tmp_path):
    bert = load_bert(tiny_bert.write_tiny_bert(tmp_path))
    row = list(range(5, 25))
    alone = run(bert, [row], 20)[0]
    padded = run(bert, [list(range(40)), row, [7]], 64)[1, :20]
    np.testing.assert_allclose(alone, padded, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("prefix", "dtype"), [("bert.", np.float32), ("", np.float16), ("", ml_dtypes.bfloat16)])
def test_names_with_prefix_and_other_float_types_load(tmp_path, prefix, dtype):
    bert = load_bert(tiny_bert.write_tiny_bert(tmp_path, prefix=prefix, dtype=dtype))
    expected = tiny_bert.tensors(tiny_bert.CONFIG)["embeddings.word_embeddings.weight"].astype(dtype).astype(np.float32)
    assert bert.word_embedding[...].dtype == jnp.float32
    np.testing.assert_array_equal(bert.word_embedding[...], expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "roberta"}, "'roberta' is not a BERT"),
        ({"hidden_act": "silu"}, "hidden_act 'silu'"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"is_decoder": True}, "is_decoder"),
        ({"num_attention_heads": 5}, "no multiple of the 5 heads"),
    ],
)
def test_other_architectures_are_refused_in_one_line(tmp_path, changes, message):
    tiny_bert.write_tiny_bert(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny_bert.CONFIG | changes))
    with pytest.raises(UserError, match=message) as caught:
        load_bert(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_size_is_named(tmp_path):
    tiny_bert.write_tiny_bert(tmp_path)
    config = {key: value for key, value in tiny_bert.CONFIG.items() if key != "hidden_size"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="hidden_size"):
        load_bert(tmp_path)


def test_missing_or_misshaped_tensor_is_named(tmp_path):
    tiny_bert.write_tiny_bert(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "encoder.layer.1.attention.self.key.bias"
    save_file({key: value for key, value in weights.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"{name}' is missing"):
        load_bert(tmp_path)
    save_file(weights | {name: np.zeros(5, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"{name}' has shape \(5,\)"):
        load_bert(tmp_path)


def test_absent_and_damaged_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        load_bert(tmp_path)
    tiny_bert.write_tiny_bert(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: not a whole safetensors file"):
        load_bert(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: no such file"):
        load_bert(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not JSON"):
        load_bert(tmp_path)
