"""The model card of an export says what lies there, and how it is opened."""

import dataclasses
import re

import pytest
from small_models import GPT_2, LLAMA, QWEN, RETRO, pretrained, tokenizer

from retro_jax.interop.card import model_card
from retro_jax.interop.export import export_native
from retro_jax.interop.pretrained import retrieval_shapes
from retro_jax.model import layer_shapes

FORMS = {
    "paper": RETRO,
    "shared embedding": dataclasses.replace(RETRO, share_embeddings=True, encoder_width=16),
    "own head": LLAMA,
    "learned positions": GPT_2,
    "baseline": dataclasses.replace(QWEN, cca_layers=()),
}


def listed(card):
    """Patterns of the tensors that a card names."""
    names = re.search(r"layers counted from 1:\n(.*?)\.\nMatrices", card, re.DOTALL)[1]
    found = re.findall(r"`([^`]+)`", names)
    assert ", ".join(f"`{name}`" for name in found) == names
    return [re.escape(name).replace(r"\{N\}", r"\d+").replace(r"\*", r"[\w.]+") for name in found]


def assert_named(card, names):
    patterns = listed(card)
    assert [name for name in names if not any(re.fullmatch(pattern, name) for pattern in patterns)] == []
    assert [pattern for pattern in patterns if not any(re.fullmatch(pattern, name) for name in names)] == []


@pytest.mark.parametrize("form", FORMS)
def test_it_names_every_tensor_and_no_other(form):
    assert_named(model_card(pretrained(FORMS[form]), "Test"), layer_shapes(FORMS[form]))


def test_beside_a_hugging_face_checkpoint_it_names_those_of_retrieval():
    card = model_card(pretrained(LLAMA), "Test", huggingface=True)
    assert_named(card, retrieval_shapes(LLAMA))


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_its_example_runs_as_it_stands(tmp_path, with_tokenizer):
    config = dataclasses.replace(RETRO, num_layers=1, cca_layers=())
    source = pretrained(config, tokenizer(tmp_path) if with_tokenizer else None)
    export_native(source, tmp_path / "model", name="Test")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "model" / "README.md").read_text(), re.DOTALL)
    found = {}
    exec(code.replace("PATH", str(tmp_path / "model")), found)
    assert found["logits"].shape == (1, len(found["tokens"]), config.vocab_size)
    assert len(found["tokens"]) >= 3
