"""What is exported is the model bit for bit, whole or not there; other tools read the same numbers out of it."""

import dataclasses
import gc
import json
import os
import re
import signal
import subprocess
import sys
import tracemalloc
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
from small_models import GPT_2, LLAMA, QWEN, RETRO, pretrained, tokenizer, write_run

import retro_jax
from retro_jax.config import RopeScaling
from retro_jax.errors import UserError
from retro_jax.interop import checkpoint as checkpoint_module
from retro_jax.interop import export as export_module
from retro_jax.interop.checkpoint import open_base, open_checkpoint
from retro_jax.interop.export import export_huggingface, export_native, new_directory
from retro_jax.interop.tensors import Tensors, write_tensors
from retro_jax.model import layer_shapes, to_layers
from retro_jax.model.parameters import layer_places

MODELS = {
    "retro": RETRO,
    "llama": LLAMA,
    "gpt-2": GPT_2,
    "baseline": dataclasses.replace(LLAMA, cca_layers=()),
    "shared embedding": dataclasses.replace(RETRO, share_embeddings=True, encoder_width=16),
}
# Settings that a config.json spells in another way or not at all.
PLAIN = dataclasses.replace(LLAMA, num_kv_heads=0, rope_scaling=RopeScaling("linear", 4.0, 64))
LARGE = dataclasses.replace(LLAMA, width=256, num_layers=6, head_size=64, ffw_width=768, cca_layers=())
# Killed when the weights are there and the rest is not.
KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[2:]
from small_models import RETRO, pretrained
from retro_jax.interop import export

export.model_card = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
export.export_native(pretrained(RETRO), sys.argv[1], name="Test")
"""
# Tells by how many KiB the process grew at most: in memory of its own, for the pages of a file are the system's.
LOADED = """
import dataclasses, re, sys
from pathlib import Path
from retro_jax.interop.pretrained import open_pretrained

def held():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

def watched(name):
    array = opened.read(name)
    grown.append(held() - before)
    return array

small, large = map(open_pretrained, sys.argv[1:])
small.load()  # what JAX takes for itself
before, grown, opened = held(), [], large
dataclasses.replace(large, read=watched).load()
print(max(grown))
"""


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
    assert "`model.safetensors` has one tensor a parameter" in card and "`decoder.norm.scale`" in card


@pytest.mark.parametrize("config", [LLAMA, QWEN, GPT_2, PLAIN], ids=["llama", "qwen", "gpt-2", "plain"])
def test_a_hugging_face_export_with_its_retrieval_is_the_model_bit_for_bit(tmp_path, given, config):
    source = pretrained(config, given)
    export_huggingface(source, tmp_path / "model", name="Test", shard_bytes=4000)
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file(), "several files"
    card = (tmp_path / "model" / "README.md").read_text()
    assert "as the transformers library reads it" in card and "`retrieval/model.safetensors` has one tensor" in card
    assert_same(retro_jax.load_pretrained(tmp_path / "model"), source)


@pytest.mark.parametrize("config", [LLAMA, PLAIN], ids=["llama", "plain"])
def test_without_its_retrieval_it_is_the_baseline(tmp_path, config):
    source = pretrained(dataclasses.replace(config, cca_layers=()))
    export_huggingface(source, tmp_path / "model", name="Test")
    found = retro_jax.load_pretrained(tmp_path / "model")
    assert found.config.is_baseline and found.neighbours == 0
    jax.tree.map(np.testing.assert_array_equal, found.params, source.params)


def test_an_export_that_could_not_be_opened_is_not_there(tmp_path, monkeypatch):
    def other(config, settings):
        return write(config, settings) | {"rope_theta": 20_000.0}

    write = export_module.write_config
    monkeypatch.setattr(export_module, "write_config", other)
    for config, reason in ((LLAMA, "made for another decoder"), (MODELS["baseline"], "read back is another one")):
        with pytest.raises(UserError, match=reason):
            export_huggingface(pretrained(config), tmp_path / "model", name="Test")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("length", [12, 64])
def test_the_context_and_the_end_tokens_of_the_base_are_written_back(tmp_path, given, length):
    settings = {"max_position_embeddings": 48, "bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": None}
    source = dataclasses.replace(pretrained(LLAMA, given, context=length), base_settings=settings)
    export_native(open_checkpoint(write_run(tmp_path / "run", source)), tmp_path / "native", name="Test")
    export_huggingface(open_checkpoint(tmp_path / "native"), tmp_path / "hub", name="Test")
    written = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert {name: written[name] for name in settings} == settings | {"max_position_embeddings": max(48, length)}
    found = open_checkpoint(tmp_path / "hub")
    assert found.base_settings == settings | {"max_position_embeddings": max(48, length)} and found.context == length


def test_the_parameters_of_a_run_are_exported_bit_for_bit(tmp_path, given):
    source = pretrained(LLAMA, given)
    write_run(tmp_path / "run", source)
    assert_same(open_checkpoint(tmp_path / "run" / "checkpoints" / "1").load(), source)
    largest = max((tmp_path / "run" / "checkpoints" / "1" / "params").rglob("*"), key=lambda path: path.stat().st_size)
    damaged = bytearray(largest.read_bytes())
    damaged[len(damaged) // 2] ^= 0x10
    largest.write_bytes(damaged)
    with pytest.raises(UserError, match=r"1: damaged checkpoint \(params\..*; there is none before it"):
        export_native(open_checkpoint(tmp_path / "run"), tmp_path / "model", name="Test")
    assert not (tmp_path / "model").exists()


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


def test_a_killed_export_leaves_nothing_to_the_next(tmp_path):
    where = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    command = [sys.executable, "-c", KILLED, str(tmp_path / "model"), *where]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -signal.SIGKILL
    assert not (tmp_path / "model").exists() and list(tmp_path.rglob("model.safetensors"))
    export_native(pretrained(RETRO), tmp_path / "model", name="Test")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert_same(retro_jax.load_pretrained(tmp_path / "model"), pretrained(RETRO))


def test_two_exports_to_one_directory_do_not_meet(tmp_path):
    with new_directory(tmp_path / "model") as first:
        (first / "mine.txt").write_text("mine")
        with pytest.raises(UserError, match="is in use by process"), new_directory(tmp_path / "model"):
            pass
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "mine.txt"]


def test_all_of_it_is_on_disk_before_it_has_its_name(tmp_path, given, monkeypatch):
    synced, before = [], []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(Path(os.readlink(f"/proc/self/fd/{file}"))))

    def renamed(source, target):
        if Path(target) == tmp_path / "model":
            before.extend(path.relative_to(source) for path in synced if path.is_relative_to(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", renamed)
    export_huggingface(pretrained(LLAMA, given), tmp_path / "model", name="Test")
    written = {path.relative_to(tmp_path / "model") for path in (tmp_path / "model").rglob("*")}
    assert len(written) == 7 and written | {Path(".")} <= set(before)
    assert synced[-1] == tmp_path


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


def test_an_export_holds_less_than_two_of_its_files(tmp_path):
    shard = 4_000_000
    export_native(pretrained(LARGE), tmp_path / "first", name="Test")
    assert (tmp_path / "first" / "model.safetensors").stat().st_size > 4 * shard
    peaks = []
    tracemalloc.start()
    try:
        export_huggingface(open_checkpoint(tmp_path / "first"), tmp_path / "second", name="Test", shard_bytes=shard)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.reset_peak()
        export_native(open_checkpoint(tmp_path / "second"), tmp_path / "third", name="Test")
        peaks.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
    assert max(path.stat().st_size for path in (tmp_path / "second").iterdir()) < 1.01 * shard
    assert max(peaks) < 2 * shard
    first, third = (path / "model.safetensors" for path in (tmp_path / "first", tmp_path / "third"))
    assert first.read_bytes() == third.read_bytes()


def test_a_model_that_is_loaded_is_in_memory_once(tmp_path):
    """With the layers of one projection twice, 0.3 of this model, while their stack is made."""
    config = dataclasses.replace(LARGE, width=512, num_layers=8, ffw_width=2048)
    for name, model in (("small", LARGE), ("large", config)):
        export_huggingface(pretrained(model), tmp_path / name, name="Test", shard_bytes=40_000_000)
    size = sum(path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors"))
    assert size > 100_000_000
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", LOADED, str(tmp_path / "small"), str(tmp_path / "large")]
    ended = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert 0.8 * size < 1024 * int(ended.stdout) < 1.7 * size


class Watched:
    """What is read of a run's arrays, and how many of them are held at a time, on the host and on devices."""

    def __init__(self, opened):
        self.opened, self.held, self.paths, self.most, self.on_devices = opened, weakref.WeakValueDictionary(), [], 0, 0

    def __call__(self, *arguments):
        read = self.opened(*arguments)

        def one(path):
            array = read(path)
            self.on_devices = max(self.on_devices, len(jax.live_arrays()))
            self.paths.append(path)
            self.held[path] = copy = np.array(array)
            self.most = max(self.most, len(self.held))
            return copy

        return one


@pytest.fixture
def watched(monkeypatch):
    watched = Watched(checkpoint_module.open_params)
    monkeypatch.setattr(checkpoint_module, "open_params", watched)
    return watched


@pytest.mark.parametrize(("config", "export", "count"), [(LLAMA, export_native, 1), (GPT_2, export_huggingface, 3)])
def test_of_a_run_one_array_is_held_at_a_time(tmp_path, given, watched, config, export, count):
    """Of GPT-2's three, whose query, key and value are one tensor."""
    source = open_checkpoint(write_run(tmp_path / "run", pretrained(config, given)))
    gc.collect()
    before = len(jax.live_arrays())
    export(source, tmp_path / "model", name="Test")
    assert watched.most == count and not watched.held and watched.on_devices <= before + 1


def test_what_a_run_keeps_of_another_reads_one_array_of_a_kind_and_holds_one(tmp_path, given, watched):
    config = dataclasses.replace(LLAMA, num_layers=7)  # of equal layers several are in one array
    source = pretrained(config, given)
    record = open_base(write_run(tmp_path / "run", source)).record()
    kinds = {re.sub(r"\d+", "", name) for name in layer_shapes(config) if ".layers." in name}
    arrays = {path for path, _ in layer_places(config).values()}
    assert len(watched.paths) == len(set(watched.paths)) == len(kinds) < len(arrays)
    assert watched.most == 1 and not watched.held
    export_native(source, tmp_path / "model", name="Test")
    assert open_base(tmp_path / "model").record()["fingerprint"] == record["fingerprint"]
