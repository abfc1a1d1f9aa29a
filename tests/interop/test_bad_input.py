"""Bad checkpoints end in one clear line that says what is wrong, never in a pickle that is loaded."""

import json
import pickle
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_models import LLAMA, RETRO, byte_level_tokenizer, pretrained, tokenizer
from tokenizers import Tokenizer as Json

from retro_jax.errors import UserError
from retro_jax.interop.checkpoint import open_checkpoint
from retro_jax.interop.export import export_huggingface, export_native
from retro_jax.interop.pretrained import load_pretrained


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Good ones, to be spoilt in copies: "native" with a tokenizer, "hf" in several files."""
    root = tmp_path_factory.mktemp("exports")
    export_native(pretrained(RETRO, tokenizer(root)), root / "native", name="Test")
    export_huggingface(pretrained(LLAMA), root / "hf", name="Test", shard_bytes=8000)
    return root


@pytest.fixture
def copy(exports, tmp_path):
    def make(kind):
        return shutil.copytree(exports / kind, tmp_path / kind)

    return make


def line(directory):
    with pytest.raises(UserError) as error:
        load_pretrained(directory)
    message = str(error.value)
    assert "\n" not in message and str(directory) in message and len(message) < 600
    return message


def edit_tensors(path, change):
    arrays = dict(load_file(path))
    change(arrays)
    save_file(arrays, path, metadata={"format": "pt"})


def edit_config(directory, **changes):
    path = directory / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (values | changes).items() if value != "absent"}))


@pytest.mark.parametrize("size", [0, 5, 200, -1000])
def test_a_file_cut_short(copy, size):
    directory = copy("native")
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert "not a whole safetensors file" in line(directory)


def test_missing_unknown_and_wrong_tensors_are_listed_up_to_three(copy):
    directory = copy("native")

    def spoil(arrays):
        arrays["decoder.layers.1.ffw.up"] = arrays["decoder.layers.1.ffw.up"].T.copy()
        arrays["decoder.layers.9.ffw.up"] = arrays.pop("decoder.layers.2.ffw.up")
        del arrays["encoder.norm.scale"]

    edit_tensors(directory / "model.safetensors", spoil)
    message = line(directory)
    assert "decoder.layers.2.ffw.up is missing; encoder.norm.scale is missing" in message
    assert "decoder.layers.1.ffw.up is [20, 16], not [16, 20] and 1 more differences" in message


def test_a_configuration_of_another_size(copy):
    directory = copy("hf")
    edit_config(directory, hidden_size=32, num_hidden_layers=4)
    message = line(directory)
    assert "the tensors are not those of" in message and "model.layers.3.input_layernorm.weight is missing" in message


def test_a_shard_that_is_not_there(copy):
    directory = copy("hf")
    next(iter(sorted(directory.glob("model-00002*")))).unlink()
    assert "model-00002-of-" in line(directory)


def test_an_index_that_is_none(copy):
    directory = copy("hf")
    (directory / "model.safetensors.index.json").write_text("[]")
    assert "not the index of a sharded safetensors checkpoint" in line(directory)
    elsewhere = {"weight_map": {"lm_head.weight": "../native/model.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(elsewhere))
    assert "not the index of a sharded safetensors checkpoint" in line(directory)


def test_a_checkpoint_without_tensors(copy):
    directory = copy("hf")
    (directory / "model.safetensors.index.json").unlink()
    save_file({}, directory / "model.safetensors")
    assert "embed_tokens.weight is missing" in line(directory)


def test_numbers_that_are_not_finite_or_no_floats(copy):
    directory = copy("native")
    path = directory / "model.safetensors"
    edit_tensors(path, lambda arrays: arrays["decoder.norm.scale"].__setitem__(0, np.nan))
    assert "decoder.norm.scale has numbers that are not finite" in line(directory)
    edit_tensors(path, lambda arrays: arrays.update({"decoder.norm.scale": np.zeros(16, np.int8)}))
    assert "decoder.norm.scale is I8; quantised checkpoints are not read" in line(directory)


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth"])
def test_pickled_weights_are_never_loaded(copy, tmp_path, suffix):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    directory = copy("hf")
    for path in directory.glob("model*"):
        path.unlink()
    (directory / f"pytorch_model.{suffix}").write_bytes(pickle.dumps(Bomb()))
    message = line(directory)
    assert f"pytorch_model.{suffix} is pickled" in message and "save_pretrained" in message
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not known; known: llama, mistral, qwen2, qwen3, gpt2"),
        ({"hidden_size": "absent"}, "hidden_size is missing, which every llama model has"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rotary positions 'dynamic' are not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor is missing"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"num_key_value_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, not a whole number above 0"),
        ({"hidden_size": "16"}, "hidden_size is '16', not a whole number above 0"),
        ({"vocab_size": None}, "vocab_size is None, not a whole number above 0"),
        ({"rope_theta": None}, "a setting is of another type than llama models have"),
        ({"model_type": ["llama"]}, "model_type ['llama'] is not known"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None, not a number above 0"),
        ({"model_type": "gpt2", "layer_norm_epsilon": None}, "layer_norm_epsilon is None, not a number above 0"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', not true or false"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}},
            "rotary positions 'yarn' with mscale 0.7 are not supported",
        ),
        ({"max_position_embeddings": 1e5}, "max_position_embeddings is 100000.0, not a whole number above 0"),
        ({"rope_scaling": "linear"}, "a setting is of another type than llama models have"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "rope_scaling.factor must be at least 1, is 0.5"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "some layers have a sliding window and some have none",
        ),
    ],
)
def test_architectures_and_settings_that_cannot_be_followed(copy, changes, message):
    directory = copy("hf")
    edit_config(directory, **changes)
    assert message in line(directory)


def test_files_that_are_not_what_they_should_be(copy, tmp_path):
    assert "no such file, so no model is here" in line(tmp_path / "nothing")
    (tmp_path / "model.safetensors").touch()
    assert "a file; give the directory of the model" in line(tmp_path / "model.safetensors")
    (tmp_path / "model.pt").touch()
    with pytest.raises(UserError, match=r"model\.pt is pickled"):
        open_checkpoint(tmp_path / "model.pt")
    directory = copy("native")
    (directory / "config.json").write_text('{"format": "retro_jax"')
    assert "not JSON" in line(directory)
    (directory / "config.json").write_text('{"format": "retro_jax", "version": 7}')
    assert "version 7 of the format" in line(directory)
    deep = "[" * 200_000
    (directory / "config.json").write_text(deep)
    assert "not JSON" in line(directory)
    directory = copy("hf")
    (directory / "model.safetensors.index.json").write_text(deep)
    assert "not the index of a sharded safetensors checkpoint" in line(directory)


def test_an_unknown_setting_is_named(copy):
    directory = copy("native")
    values = json.loads((directory / "config.json").read_text())
    edit_config(directory, model=values["model"] | {"widht": 3})
    assert "model.widht: unknown key; did you mean 'width'?" in line(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"num_layers": 0}}, "config.json: model.num_layers must be positive, is 0"),
        ({"context": "long"}, "context is 'long', not a number"),
        ({"neighbours": -1}, "neighbours is -1, not a number"),
        ({"base": []}, "config.json: base is [], not a group of settings"),
        ({"base": {"max_position_embeddings": "x"}}, "config.json: max_position_embeddings is 'x', not a whole number"),
    ],
)
def test_settings_that_cannot_be_are_named_with_their_file(copy, changes, message):
    directory = copy("native")
    values = json.loads((directory / "config.json").read_text())
    edit_config(directory, **changes | {"model": values["model"] | changes.get("model", {})})
    assert message in line(directory)


def test_a_tokenizer_that_does_not_match(copy):
    directory = copy("native")
    tokenizer(directory).path.rename(directory / "tokenizer.model")
    (directory / "tokenizer.model").write_bytes((directory / "tokenizer.model").read_bytes() + b"\x1a\x00")
    assert "the tokenizer has fingerprint" in line(directory)
    (directory / "tokenizer.model").unlink()
    assert "the tokenizer is missing" in line(directory)


def test_a_tokenizer_with_more_tokens_than_the_model(copy, exports):
    directory = copy("hf")
    shutil.copy(exports / "native" / "tokenizer.model", directory)
    edit_config(directory, vocab_size=200)
    for path in directory.glob("model-*.safetensors"):
        edit_tensors(
            path,
            lambda arrays: arrays.update(
                {k: v[:200].copy() for k, v in arrays.items() if "embed" in k or k == "lm_head.weight"}
            ),
        )
    shutil.rmtree(directory / "retrieval")
    message = line(directory)
    assert "290 tokens" in message and "200 rows" in message


def test_a_tokenizer_with_other_special_tokens_than_the_configuration_names(copy, exports):
    directory = copy("hf")
    shutil.copy(exports / "native" / "tokenizer.model", directory)
    shutil.rmtree(directory / "retrieval")
    load_pretrained(directory)  # no token is named
    edit_config(directory, bos_token_id=7, eos_token_id=[8, 9])
    assert f"BOS 1 and EOS 2, where {directory / 'config.json'} names 7, 8, 9; give the tokenizer" in line(directory)
    edit_config(directory, bos_token_id=0, eos_token_id=3)  # its PAD and unknown
    assert "names 0, 3; give the tokenizer" in line(directory)
    edit_config(directory, bos_token_id=None, eos_token_id=[8, 2])  # a model for chats ends otherwise, too
    config = load_pretrained(directory).config
    assert (config.bos_id, config.eos_id) == (1, 2)


def test_a_configuration_may_name_other_special_tokens_of_its_tokenizer(copy):
    """Models for chats name the begin and the end of a message."""
    directory = copy("hf")
    shutil.rmtree(directory / "retrieval")
    path = directory / "tokenizer.json"
    byte_level_tokenizer(path)
    given = Json.from_file(str(path))
    given.add_special_tokens(["<|message|>"])
    given.save(str(path))
    edit_config(directory, bos_token_id=289, eos_token_id=289)
    assert load_pretrained(directory).config.eos_id == 0
    edit_config(directory, bos_token_id=288, eos_token_id=128_001)
    assert "BOS 0 and EOS 0, where" in line(directory)


def test_retrieval_made_for_another_decoder(copy):
    directory = copy("hf")
    edit_config(directory, rms_norm_eps=1e-3)
    assert "made for another decoder" in line(directory)


def test_a_directory_that_holds_no_run(tmp_path):
    with pytest.raises(UserError, match="neither a run nor a model is here"):
        open_checkpoint(tmp_path)


def test_a_configuration_of_nothing_known_and_a_run_in_the_place_of_a_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 16}))
    with pytest.raises(UserError, match="model_type None is not known"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model": {"width": 16}, "steps": 2}))
    assert "is a run of launch/train.py; export it with launch/export.py" in line(tmp_path)
