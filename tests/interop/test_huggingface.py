"""Logits of imported models are those of the transformers library, for every kind of decoder that can be imported."""

import jax
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="needs the interop requirements")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from retro_jax.interop.export import export_huggingface  # noqa: E402
from retro_jax.interop.pretrained import load_pretrained  # noqa: E402
from retro_jax.model.retro import Retro  # noqa: E402

# Compiling dominates; what the compiler's optimiser does is not the subject.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
VOCAB = 61
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "attn_implementation": "eager",
}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
MODELS = {
    "llama 2": ("Llama", {"num_key_value_heads": 4}),
    "llama 3": ("Llama", {"rope_parameters": LLAMA_3, "head_dim": 16}),
    "llama, linear scaling, all biases": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}
        | {"attention_bias": True, "mlp_bias": True},
    ),
    "tinyllama": ("Llama", {"num_key_value_heads": 1, "rms_norm_eps": 1e-5}),
    "smollm": ("Llama", {"tie_word_embeddings": True, "num_attention_heads": 6, "hidden_size": 36}),
    "mistral": ("Mistral", {"sliding_window": 24}),
    "qwen 2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen 2.5": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen 3": ("Qwen3", {"head_dim": 12}),
    "gpt-2": ("GPT2", {}),
}


def build(name, **changes):
    """The model `name`, every parameter drawn at random, norms and biases too."""
    kind, own = MODELS[name]
    sizes = SIZES | own | changes
    if kind == "GPT2":
        sizes |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.3}
        sizes = {key: value for key, value in sizes.items() if key not in ("hidden_size", "num_hidden_layers")}
        sizes = {key: value for key, value in sizes.items() if not key.startswith(("num_", "max_", "intermediate"))}
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM" if kind != "GPT2" else "GPT2LMHeadModel")(
        getattr(transformers, f"{kind}Config")(**sizes)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """A model of transformers, and ours read from what it saved."""
    theirs = build(request.param)
    directory = tmp_path_factory.mktemp("hub")
    theirs.save_pretrained(directory)
    ours = load_pretrained(directory)
    return theirs, ours, logits_of(ours)


def close(directory, theirs):
    """Whether what is read from the directory gives their logits."""
    tokens = np.random.default_rng(3).integers(0, VOCAB, (2, 20))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits_of(load_pretrained(directory))(tokens), expected, atol=1e-4, rtol=0)


def test_shards_in_bfloat16_as_transformers_writes_them(tmp_path):
    build("llama 3").bfloat16().save_pretrained(tmp_path, max_shard_size="20KB")
    files = sorted(tmp_path.glob("model-*-of-*.safetensors"))
    assert len(files) > 2 and (tmp_path / "model.safetensors.index.json").is_file()
    assert {array.dtype for path in files for array in load_file(path).values()} == {torch.bfloat16}
    read = {"dtype": torch.float32, "attn_implementation": "eager"}
    close(tmp_path, transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **read).eval())


def test_gpt_2_without_prefix_and_with_buffers_of_its_masks(tmp_path):
    """As the first checkpoints of GPT-2 were written, which are still the ones that are fetched."""
    theirs = build("gpt-2")
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    arrays = {name.removeprefix("transformer."): array for name, array in load_file(path).items()}
    assert "h.0.attn.c_attn.bias" in arrays
    for layer in range(2):
        arrays[f"h.{layer}.attn.bias"] = torch.tril(torch.ones(512, 512))[None, None]
        arrays[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(arrays, path, metadata={"format": "pt"})
    close(tmp_path, theirs)


def logits_of(ours):
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Retro(ours.config)))
    apply = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens), compiler_options=QUICK)
    return lambda tokens: np.asarray(apply(ours.params, np.asarray(tokens, np.int32)))


def test_logits_equal_transformers(pair):
    theirs, _, ours = pair
    generator = np.random.default_rng(0)
    for batch, length in ((3, 40), (1, 150)):
        tokens = generator.integers(0, VOCAB, (batch, length))
        with torch.no_grad():
            expected = theirs(torch.tensor(tokens)).logits.numpy()
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(ours(tokens), expected, atol=1e-4, rtol=0)


def test_padded_batches_equal_transformers(pair):
    theirs, opened, ours = pair
    generator = np.random.default_rng(1)
    tokens = generator.integers(0, VOCAB, (3, 40))
    seen = np.ones((3, 40), bool)
    seen[1, :7] = False  # on the left
    seen[2, 33:] = False  # on the right
    places = np.maximum(seen.cumsum(1) - 1, 0)
    with torch.no_grad():
        expected = theirs(
            torch.tensor(tokens), attention_mask=torch.tensor(seen.astype(int)), position_ids=torch.tensor(places)
        ).logits.numpy()
    found = ours(np.where(seen, tokens, opened.config.pad_id))
    np.testing.assert_allclose(found[seen], expected[seen], atol=1e-4, rtol=0)


def test_what_is_written_back_is_the_model_that_was_read(pair, tmp_path):
    theirs, ours, _ = pair
    export_huggingface(ours, tmp_path / "model", name="Test")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager").eval()
    assert type(read) is type(theirs)
    found, expected = read.state_dict(), theirs.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    tokens = torch.tensor(np.random.default_rng(4).integers(0, VOCAB, (2, 300)))
    with torch.no_grad():
        torch.testing.assert_close(read(tokens).logits, theirs(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama 2", "llama 3", "llama, linear scaling, all biases", "qwen 2.5"])
def test_logits_equal_transformers_far_beyond_the_first_context(tmp_path, name):
    """Of each kind of rotary positions: plain, llama3, linear, yarn."""
    theirs = build(name, max_position_embeddings=4096, num_hidden_layers=1)
    theirs.save_pretrained(tmp_path)
    tokens = np.random.default_rng(2).integers(0, VOCAB, (1, 3000))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits_of(load_pretrained(tmp_path))(tokens), expected, atol=1e-4, rtol=0)
