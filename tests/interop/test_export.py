"""What is exported is the model bit for bit, whole or not there; other tools read the same numbers out of it."""

import dataclasses
import json
import tracemalloc

import jax
import numpy as np
import pytest
from small_models import GPT_2, LLAMA, QWEN, RETRO, pretrained, tokenizer

import retro_jax
from retro_jax.errors import UserError
from retro_jax.interop import export as export_module
from retro_jax.interop.export import export_huggingface, export_native
from retro_jax.interop.tensors import Tensors, write_tensors
from retro_jax.model import to_layers

MODELS = {
    "retro": RETRO,
    "llama": LLAMA,
    "gpt-2": GPT_2,
    "baseline": dataclasses.replace(LLAMA, cca_layers=()),
    "shared embedding": dataclasses.replace(RETRO, share_embeddings=True, encoder_width=16),
}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("tokenizer"))


def assert_same(found, source):
    assert (found.config, found.context, found.neighbours) == (source.config, source.context, source.neighbours)
    assert jax.tree.structure(found.params) == jax.tree.structure(source.params)
    for one, other in zip(jax.tree.leaves(found.params), jax.tree.leaves(source.params), strict=True):
        assert one.dtype == other.dtype and np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize("name", MODELS)
def test_import_of_an_export_is_the_model_bit_for_bit(tmp_path, given, name):
    source = pretrained(MODELS[name], given)
    export_native(source, tmp_path / "model", name="Test")
    found = retro_jax.load_pretrained(tmp_path / "model")
    assert_same(found, source)
    assert found.tokenizer.encode("holds chunks") == given.encode("holds chunks")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"], "no temporary directory stays"


def test_the_file_is_read_by_the_formats_own_library_under_the_documented_names(tmp_path):
    from safetensors.numpy import load_file

    source = pretrained(RETRO)
    export_native(source, tmp_path / "model", name="Test")
    arrays = load_file(tmp_path / "model" / "model.safetensors")
    expected = to_layers(source.params, RETRO)
    assert set(arrays) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "# Test" in card and "load_pretrained" in card and "2, 3" in card
    assert "`model.safetensors` has one tensor a parameter" in card and "`decoder.norm.scale`, `decoder" in card


@pytest.mark.parametrize("config", [LLAMA, QWEN, GPT_2], ids=["llama", "qwen", "gpt-2"])
def test_a_hugging_face_export_with_its_retrieval_is_the_model_bit_for_bit(tmp_path, given, config):
    source = pretrained(config, given)
    export_huggingface(source, tmp_path / "model", name="Test", shard_bytes=4000)
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file(), "several files"
    card = (tmp_path / "model" / "README.md").read_text()
    assert "as the transformers library reads it" in card and "`retrieval/model.safetensors` has one tensor" in card
    assert_same(retro_jax.load_pretrained(tmp_path / "model"), source)


def test_without_its_retrieval_it_is_the_baseline(tmp_path):
    config = dataclasses.replace(LLAMA, cca_layers=())
    source = pretrained(config)
    export_huggingface(source, tmp_path / "model", name="Test")
    found = retro_jax.load_pretrained(tmp_path / "model")
    assert found.config.is_baseline and found.neighbours == 0
    jax.tree.map(np.testing.assert_array_equal, found.params, source.params)


@pytest.mark.parametrize("config", [LLAMA, QWEN, GPT_2], ids=["llama", "qwen", "gpt-2"])
def test_transformers_gives_the_logits_of_retro_off(tmp_path, config):
    torch = pytest.importorskip("torch", reason="needs the interop requirements")
    transformers = pytest.importorskip("transformers")
    source = pretrained(config)
    export_huggingface(source, tmp_path / "model", name="Test", shard_bytes=4000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager").eval()
    tokens = np.random.default_rng(0).integers(1, config.vocab_size, (2, 14))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    found = jax.jit(source.model.__call__)(np.asarray(tokens, np.int32))
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-5)


def test_lora_is_put_into_the_projections_of_a_hugging_face_export(tmp_path):
    config = dataclasses.replace(LLAMA, cca_layers=(), lora_rank=3)
    source = pretrained(config)
    export_huggingface(source, tmp_path / "model", name="Test")
    found = retro_jax.load_pretrained(tmp_path / "model")
    assert found.config.lora_rank == 0
    tokens = np.random.default_rng(0).integers(1, config.vocab_size, (2, 9), np.int32)
    expected = jax.jit(source.model.__call__)(tokens)
    np.testing.assert_allclose(jax.jit(found.model.__call__)(tokens), expected, atol=1e-4 * np.abs(expected).max())


def test_a_decoder_that_no_architecture_has_is_refused(tmp_path):
    for config, reason in (
        (RETRO, "positions are transformer_xl"),
        (dataclasses.replace(LLAMA, ffw="gelu"), "norm is rms and ffw gelu"),
        (dataclasses.replace(QWEN, ffw_biases=True), "qwen2 has no"),
    ):
        with pytest.raises(UserError, match=reason):
            export_huggingface(pretrained(config), tmp_path / "model", name="Test")
        assert not list(tmp_path.iterdir())


def test_a_directory_that_is_there_is_not_touched(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is there already; give another --output"):
        export_native(pretrained(RETRO), tmp_path / "model", name="Test")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "mine.txt"]


def test_an_export_that_reads_back_otherwise_is_not_there(tmp_path, monkeypatch):
    write = export_module.write_tensors

    def spoil(directory, *arguments, **options):
        (path,) = write(directory, *arguments, **options)
        content = bytearray(path.read_bytes())
        content[-2] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(export_module, "write_tensors", spoil)
    with pytest.raises(UserError, match="read back is not what was written"):
        export_native(pretrained(RETRO), tmp_path / "model", name="Test")
    assert not list(tmp_path.iterdir())


def test_writing_and_reading_hold_less_than_two_of_the_largest_arrays(tmp_path):
    shapes = {f"array{number}": ((256, 1024), "float32") for number in range(20)}
    size = 256 * 1024 * 4
    tracemalloc.start()
    try:
        write_tensors(
            tmp_path,
            shapes,
            lambda name: np.full((256, 1024), int(name[5:]), np.float32),
            metadata={},
            shard_bytes=5 * size,
        )
        tensors = Tensors(tmp_path)
        assert all(tensors[name].max() == int(name[5:]) for name in shapes)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]) == 20
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    assert peak < 2 * size
